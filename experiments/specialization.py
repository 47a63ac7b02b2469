"""Do experts specialise, and are DeepSeekMoE's harder to replace?

lm experiment specialization [--quick]  ->  experiments/results/specialization.json and .png

Claim: with the best experts of each token disabled, the loss of a DeepSeekMoE rises more than that of a
GShard of equal loss: its experts are less redundant (DeepSeekMoE, arXiv 2401.06066 section 4.5, figure 4).
Prediction: experts specialise in verse, Python source or sums, and the difference has the published sign.

The text is a third each of Shakespeare, the standard library of the running Python, and sums. With a share of
its best experts disabled, a token is routed to the best of the others. The paper's first step, a sixteenth of
16 experts, disables one of the two experts of a token in GShard; with 32 experts here 1/32 does. Losses are
the mean over the three texts.

Does not reproduce here, because with its best routed experts disabled a DeepSeekMoE keeps its shared
expert, a quarter of its active parameters, while a GShard loses the better one of its two experts. With the
shared expert disabled too, the loss of a DeepSeekMoE rises more than that of a GShard: its routed experts
hardly replace each other.
"""

import functools
import hashlib
import random
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm import data
from lm.config import Config
from lm.evaluate import evaluate
from lm.model import Transformer
from moe import Routing, balance

from . import command, common

DOMAINS = ("verse", "Python", "sums")
SHARES = (0, 1 / 32, 1 / 16, 2 / 16, 3 / 16, 4 / 16)  # of the experts, to disable
TOKENS = 32768  # held-out tokens per domain and evaluation
BLOCK = 2048  # bytes of one domain before the next


def verse(size: int) -> bytes:
    return (data.CORPUS / "train.txt").read_bytes()[:size]


def python(size: int) -> bytes:
    """Modules of the standard library, sorted by name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return b"".join(path.read_bytes() for path in paths)[:size]


def sums(size: int) -> bytes:
    """Additions of numbers with one to four digits, one per line."""
    rng = random.Random(0)
    lines, length = [], 0
    while length < size:
        a, b = (rng.randrange(10 ** rng.randint(1, 4)) for _ in range(2))
        lines.append(f"{a}+{b}={a + b}\n".encode())
        length += len(lines[-1])
    return b"".join(lines)[:size]


def texts(folder: Path, size: int) -> dict[str, Path]:
    """Files with the training mixture and each domain's held-out tenth, created if missing."""
    parts = dict(zip(DOMAINS, (verse(size), python(size), sums(size))))
    shortest = min(map(len, parts.values()))
    cut = shortest * 9 // 10
    starts = range(0, cut - BLOCK + 1, BLOCK)
    mixed = b"".join(part[start : start + BLOCK] for start in starts for part in parts.values())
    held_out = {name: part[cut:shortest] for name, part in parts.items()}
    found = {}
    for name, text in {"mixed": mixed, **held_out}.items():
        found[name] = folder / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.txt"
        if not found[name].exists():
            found[name].write_bytes(text)
    return found


def models(config: Config) -> dict[str, Config]:
    """The DeepSeekMoE, and a GShard with equal total and active parameters."""
    moe = config.model.moe
    quarter = (moe.top_k + moe.num_shared_experts) // 2  # experts as wide as one of GShard's
    gshard = {
        "router": "gshard", "num_experts": (moe.num_experts + moe.num_shared_experts) // quarter, "top_k": 2,
        "hidden_dim": quarter * moe.hidden_dim, "num_shared_experts": 0, "routed_scaling_factor": 1.0,
    }  # fmt: skip
    return {"DeepSeekMoE": config, "GShard": common.changed(config, moe=gshard, train={"switch_loss": 0.01})}


class Without(nn.Module):
    """A trained router with each token's best experts disabled; weights are normalised over the rest."""

    def __init__(self, router: Any, share: float):
        super().__init__()
        self.router = router
        self.disabled = round(share * router.num_experts)

    def forward(self, x: Tensor) -> Routing:
        routing = self.router(x)
        bias = balance.selection_bias(self.router)
        choice = routing.scores if bias is None else routing.scores + bias
        best = choice.topk(self.disabled).indices
        experts = choice.scatter(-1, best, float("-inf")).topk(self.router.top_k).indices
        weights = routing.scores.gather(-1, experts)
        scale = getattr(self.router, "routed_scaling_factor", 1.0)
        return routing._replace(experts=experts, weights=scale * weights / weights.sum(-1, keepdim=True))


@torch.no_grad()
def look(model: Transformer, config: Config, paths: dict[str, Path]) -> dict[str, Any]:
    """Each expert's share of each domain, and the loss with more and more of the best experts disabled."""
    windows = {name: data.Windows(data.open_text(paths[name]), config.train.context) for name in DOMAINS}
    count = TOKENS // config.train.context
    model.eval()
    use = []
    for name in DOMAINS:
        tokens = torch.stack([windows[name][i][:-1] for i in range(min(len(windows[name]), count))])
        counts = [balance.tokens_per_expert(routing).double() for routing in model.trunk(tokens)[1]]
        use.append(torch.stack(counts) / tokens.numel())  # (layers, experts)
    shares = torch.stack(use)  # (domains, layers, experts)
    mean = shares.mean(0)
    top = shares.amax(0) / mean.where(mean > 0, 1)
    found: dict[str, Any] = {
        "use": [[[round(float(x), 4) for x in layer] for layer in domain] for domain in shares],
        "specialisation": float((top * mean).sum() / mean.sum()),  # weighted by their load
    }
    kept = [(block.mlp.router, block.mlp.shared) for block in model.blocks]
    ways = [(share, False) for share in SHARES] + [(SHARES[1], True)]
    for share, without_shared in ways:
        for block, (router, shared) in zip(model.blocks, kept):
            block.mlp.router = Without(router, share)
            block.mlp.shared = None if without_shared else shared
        losses = [
            evaluate(model, windows[name], TOKENS, torch.float32, config.train.batch_size) for name in DOMAINS
        ]
        found[disabled(share, without_shared)] = sum(losses) / len(losses)
        found.setdefault("losses", dict(zip(DOMAINS, losses)))
    for block, (router, shared) in zip(model.blocks, kept):
        block.mlp.router, block.mlp.shared = router, shared
    return found


def disabled(share: float, without_shared: bool = False) -> str:
    """The key of a loss in a row."""
    return f"loss, {share:.4f} disabled" + (" and the shared" if without_shared else "")


def draw(rows: list[dict[str, Any]], given: Any) -> None:
    """Plot the experts' shares of the domains in one model, and the loss with experts disabled."""
    figure, axes = common.plt.subplots(1, 3, figsize=(14, 3.6))
    for axis, name in zip(axes, ("DeepSeekMoE", "GShard")):
        use = torch.tensor(next(row["use"] for row in rows if row["model"] == name))[
            :, -1
        ]  # (domains, experts)
        relative = use / use.mean(0).clamp(min=1e-9)
        order = relative.argmax(0).double().add(-relative.amax(0) / 10).argsort()
        axis.imshow(relative[:, order], aspect="auto", vmin=0, vmax=len(DOMAINS))
        axis.set_yticks(range(len(DOMAINS)), DOMAINS)
        axis.set_xlabel(f"{name}: experts of the last layer")
    for name in ("DeepSeekMoE", "GShard"):
        values = [common.last(rows, disabled(share))[name] for share in SHARES]
        means, errors = zip(*map(common.mean_and_error, values))
        axes[2].errorbar(SHARES, means, errors, marker="o", ms=4, capsize=2, label=name)
    axes[2].set_xlabel("share of a token's best experts, disabled")
    axes[2].set_ylabel("held-out loss, nats a byte")
    axes[2].legend(frameon=False)
    common.tidy(axes[2])
    common.save(figure, "specialization", given)


def risen(rows: list[dict[str, Any]], name: str, share: float, without_shared: bool = False) -> list[float]:
    """The rise of a model's loss with this share of the experts disabled, for each seed."""
    before, after = disabled(0), disabled(share, without_shared)
    return [row[after] - row[before] for row in rows if row["model"] == name]


def main(arguments: list[str] | None = None) -> None:
    """Train on the mixture, measure the experts' shares, disable the best experts."""
    given = command.options("specialization", __doc__, 600, arguments)
    paths = texts(given.runs, 60_000 if given.quick else 1_200_000)
    config = common.changed(common.base(given), data={"path": str(paths["mixed"])})
    configs = models(config)
    rows = common.train_all(configs, given, measure=functools.partial(look, paths=paths))
    special = common.last(rows, "specialisation")
    losses = {share: common.last(rows, disabled(share)) for share in SHARES}
    one, two = (
        " and ".join(f"{common.shown(risen(rows, name, share))} in a {name}" for name in special)
        for share in SHARES[1:3]
    )
    bare = common.shown(risen(rows, "DeepSeekMoE", SHARES[1], True))
    most = {name: f"{common.mean(special[name]):.2f}" for name in special}
    answer = [
        f"With a token's best 1/32 of the experts disabled the loss rises by {one}, with its best 1/16 by "
        f"{two}.",
        f"With the shared expert disabled too, that of a DeepSeekMoE rises by {bare} at 1/32.",
        f"An expert's share of its favourite domain is {most['DeepSeekMoE']} times its mean share "
        f"in a DeepSeekMoE, {most['GShard']} times in a GShard (1: no preference, 3: that domain alone).",
    ]
    table = [["share of a token's best experts disabled", *special]]
    for share in SHARES:
        table.append([f"{share:.4g}", *(common.shown(losses[share][name]) for name in special)])
    worse = (risen(rows, name, SHARES[1]) for name in special)
    claimed = common.as_claimed([deepseek - gshard for deepseek, gshard in zip(*worse)])
    python = sysconfig.get_python_version()
    common.write("specialization", given, claimed, answer, table, rows, configs, python=python)
    draw(rows, given)


if __name__ == "__main__":
    main()
