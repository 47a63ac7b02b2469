"""Groups of completions sampled from a model, and what an update needs of them."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lm.inference.engine import Engine
from lm.loss import token_log_probs
from lm.model import Output, Transformer
from lm.tokenizer import ByteTokenizer
from moe import MoE, Routing

from . import tasks
from .tasks import Problem

TOKENIZER = ByteTokenizer()
END = ord(tasks.END)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    size: int = 8  # completions of a problem
    max_new_tokens: int = 64
    temperature: float = 1.0
    record_experts: bool = False


class Sample(NamedTuple):
    """One completion."""

    prompt: list[int]
    tokens: list[int]  # with the END that was drawn: without it, stopping would not be learned
    ended: bool
    log_probs: list[float]  # of each token as it was drawn
    experts: Tensor | None  # (tokens read, layers, top_k)


@dataclass(frozen=True)
class Rollout:
    """A group of completions for each of some problems. Rows of a group follow one another.

    Attributes:
        rewards, right, in_form: (problems, size), see `tasks.score`.
        tokens: (rows, time) int64, prompt and completion, padded with 0 on the right.
        mask: (rows, time - 1) bool, True where the target is a token of the completion, its END included;
            the prompt and the padding are not trained.
        old: (rows, time - 1), log-probabilities of the targets as they were drawn; 0 outside the mask.
        experts: (layers, rows, time - 1, top_k) int64, chosen while sampling, -1 in the padding; or None.
    """

    problems: list[Problem]
    completions: list[str]
    rewards: Tensor
    right: Tensor
    in_form: Tensor
    tokens: Tensor
    mask: Tensor
    old: Tensor
    experts: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, (problems, size)"""
        return self.mask.sum(-1).view(self.rewards.shape)

    def groups(self, start: int, stop: int) -> "Rollout":
        """The part with the problems start..stop - 1"""
        size = self.rewards.shape[1]
        rows = slice(start * size, stop * size)
        own = slice(start, stop)
        return Rollout(
            self.problems[own],
            self.completions[rows],
            self.rewards[own],
            self.right[own],
            self.in_form[own],
            self.tokens[rows],
            self.mask[rows],
            self.old[rows],
            None if self.experts is None else self.experts[:, rows],
        )


def draw(
    engine: Engine, problems: Sequence[Problem], seed: int, sampling: Sampling, first: int = 0
) -> list[Sample]:
    """Completions of each problem, the groups in order.

    Each completion has its own seed, so that it does not depend on what else is sampled beside it.

    Args:
        first: place of problems[0] among all problems of this seed.
    """
    size = sampling.size
    requests = {}
    # one completion of each problem first: their prompts are read together, and the rest of a group copies
    for turn in range(size):
        for place, problem in enumerate(problems):
            requests[place, turn] = engine.submit(
                TOKENIZER.encode(problem.prompt),
                sampling.max_new_tokens,
                sampling.temperature,
                seed=(seed * 1_000_003 + (first + place) * size + turn) % 2**63,
                ends=(END,),
                record_experts=sampling.record_experts,
            )
    engine.run()
    samples = []
    for _, request in sorted(requests.items()):
        if request.error:
            raise ValueError(f"a completion failed: {request.error}")
        tokens = [*request.tokens, *([] if request.ended is None else [request.ended])]
        experts = torch.stack(request.experts) if request.experts else None
        samples.append(Sample(request.prompt, tokens, request.ended is not None, request.log_probs, experts))
    return samples


def collect(problems: Sequence[Problem], samples: Sequence[Sample]) -> Rollout:
    """The samples of `draw` in tensors, with their rewards."""
    size = len(samples) // len(problems)
    completions = [TOKENIZER.decode(sample.tokens) for sample in samples]
    scores = [
        tasks.score(problems[row // size], completion, sample.ended)
        for row, (completion, sample) in enumerate(zip(completions, samples))
    ]
    longest = max(len(sample.prompt) + len(sample.tokens) for sample in samples)
    tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
    mask = torch.zeros(len(samples), longest - 1, dtype=torch.bool)
    old = torch.zeros(len(samples), longest - 1)
    for row, sample in enumerate(samples):
        start, stop = len(sample.prompt), len(sample.prompt) + len(sample.tokens)
        tokens[row, :stop] = torch.tensor([*sample.prompt, *sample.tokens])
        mask[row, start - 1 : stop - 1] = True
        old[row, start - 1 : stop - 1] = torch.tensor(sample.log_probs)
    rewards, right, in_form = (torch.tensor(part).view(-1, size) for part in zip(*scores))
    experts = None
    if all(sample.experts is not None for sample in samples):
        experts = nn.utils.rnn.pad_sequence(
            [sample.experts[: longest - 1] for sample in samples],  # type: ignore[index]
            batch_first=True,
            padding_value=-1,
        )
        short = longest - 1 - experts.shape[1]
        experts = nn.functional.pad(experts, (0, 0, 0, 0, 0, short), value=-1).permute(2, 0, 1, 3)
    return Rollout(list(problems), completions, rewards, right, in_form, tokens, mask, old, experts)


def sample(engine: Engine, problems: Sequence[Problem], seed: int, sampling: Sampling) -> Rollout:
    """`sampling.size` completions for each problem."""
    return collect(problems, draw(engine, problems, seed, sampling))


class Judged(NamedTuple):
    """Completions under a model as it is trained."""

    log_probs: Tensor  # (rows, time - 1), of each target at the sampling's temperature; 0 outside the mask
    entropy: Tensor  # (rows, time - 1), of the distribution that it was drawn from, without gradient
    routings: list[Routing]  # of each MoE layer


def judge(model: Transformer, rollout: Rollout, temperature: float = 1.0, replay: bool = False) -> Judged:
    """Read completions with the forward pass of training.

    Args:
        replay: use the experts that were chosen while sampling; their weights are computed anew.
    """
    with replayed(model, rollout.experts if replay else None):
        out: Output = model(rollout.tokens[:, :-1])
    logits = out.logits.float() / temperature
    log_probs = token_log_probs(logits, rollout.tokens[:, 1:]).where(rollout.mask, 0)
    probabilities = logits.detach().log_softmax(-1)
    entropy = -(probabilities.exp() * probabilities).sum(-1).where(rollout.mask, 0)
    return Judged(log_probs, entropy, out.routings)


class Replay(nn.Module):
    """A router whose choice is given: only the weights of these experts are computed (arXiv 2507.18071 5.3).

    experts (..., top_k) int64; where it is -1, the router's own choice stays.
    """

    def __init__(self, router: nn.Module, experts: Tensor):
        super().__init__()
        for name in ("normalize", "routed_scaling_factor"):
            if not hasattr(router, name):
                raise ValueError(
                    f"replay: {type(router).__name__} has no {name}; use a sigmoid or softmax router"
                )
        self.router = router
        self.experts = experts

    def forward(self, x: Tensor) -> Routing:
        routing = self.router(x)
        experts = self.experts.where(self.experts >= 0, routing.experts)
        weights = routing.scores.gather(-1, experts)
        if self.router.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return routing._replace(experts=experts, weights=weights * self.router.routed_scaling_factor)


@contextlib.contextmanager
def replayed(model: Transformer, experts: Tensor | None) -> Iterator[None]:
    """Within it, the MoE layers use these experts (layers, rows, time, top_k); None: those they choose."""
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoE)]
    routers = [layer.router for layer in layers]
    try:
        for layer, chosen in zip(layers, () if experts is None else experts):
            layer.router = Replay(layer.router, chosen)
        yield
    finally:
        for layer, router in zip(layers, routers):
            layer.router = router


def disagreement(routings: Sequence[Routing], rollout: Rollout) -> float:
    """Share of token-layers of the completions whose set of experts is not the one chosen while sampling."""
    if rollout.experts is None:
        raise ValueError("the rollout holds no experts: sample with record_experts")
    read = rollout.mask & (rollout.experts[0, ..., 0] >= 0)
    differs = [
        (routing.experts.sort(-1).values != experts.sort(-1).values).any(-1)[read]
        for routing, experts in zip(routings, rollout.experts)
    ]
    return float(torch.cat(differs).float().mean())


class Sampler:
    """Draws completions, in this process or in several others; the samples are the same."""

    def __init__(self, model: Transformer, processes: int):
        self.model = model
        self.processes = processes
        self.engine = Engine(model, max_batch=256) if processes == 1 else None
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Sampler":
        if self.processes > 1:
            spawn = get_context("spawn")
            self.pool = ProcessPoolExecutor(self.processes, spawn, start_worker, (self.model.config,))
        return self

    def __exit__(self, *failure: Any) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def draw(self, problems: list[Problem], seed: int, sampling: Sampling) -> list[Sample]:
        """As `rollout.draw`, the groups in order."""
        self.model.eval()
        if self.pool is None:
            assert self.engine is not None
            return draw(self.engine, problems, seed, sampling)
        weights = {name: tensor.detach().numpy() for name, tensor in self.model.state_dict().items()}
        share = math.ceil(len(problems) / self.processes)
        jobs = [
            self.pool.submit(work, weights, problems[at : at + share], seed, sampling, at)
            for at in range(0, len(problems), share)
        ]
        return [sample for job in jobs for sample in job.result()]


WORKER: dict[str, Engine] = {}  # a worker process's engine


def start_worker(config: Any) -> None:
    """Build the model of a worker process."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process finishes its step
    torch.set_num_threads(1)
    WORKER["engine"] = Engine(Transformer(config).eval(), max_batch=256)


def work(weights: dict[str, Any], *what: Any) -> list[Sample]:
    """`rollout.draw` in a worker process, with these weights."""
    engine = WORKER["engine"]
    engine.model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return draw(engine, *what)
