"""Training: from a config to a run folder. A run can be stopped at any step and resumed."""

import contextlib
import copy
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from moe import balance, metrics

from . import checkpoint, console, count, data, files, history, loss, machine, parts
from .budget import check_memory
from .config import Config, TrainConfig
from .evaluate import evaluate
from .inference.generate import stream
from .model import Block, Transformer
from .optim import build_optimizer, learning_rate
from .run import Abandoned, Run, RunFailed, open_run
from .tokenizer import ByteTokenizer


def train(config: Config, run: Path, resume: bool = False) -> int:
    """Train, writing a run folder: config.toml, metrics.jsonl, checkpoints, samples.txt.

    Args:
        run: the run folder: new or empty, or with resume an existing run.

    Returns:
        0, or 128 + the number of the signal that stopped it (after saving a checkpoint).

    Raises:
        ValueError: the config, the data or the folder is invalid; nothing was written.
        RunFailed: training cannot continue; names the step and the last checkpoint.
    """
    device = machine.pick_device(config.train.device)
    if config.train.compile:
        machine.check_compiler(device, "train.compile")
    check_memory(config.model, config.train)
    torch.manual_seed(config.train.seed)
    model = Transformer(config.model)  # an invalid config fails here, before anything is written
    model.initialize(torch.Generator().manual_seed(config.train.seed))
    parts.try_parts(model)
    device = machine.or_cpu(config.train.device, device, functools.partial(trial_step, model, config.train))
    windows, validation = data.open_windows(config)
    with console.streams(), open_run(run, resume):
        trainer = Trainer(config, run, model.to(device), windows, validation)
        trainer.read_text()
        if resume:
            trainer.resume()
        else:
            files.write_file(run / "config.toml", config.to_toml())
        return trainer.run_steps()


def trial_step(model: Transformer, config: TrainConfig, device: torch.device) -> None:
    """Run what training needs on a device once, on a copy of the model: a step, its bias update, a sample."""
    with torch.random.fork_rng(devices=[]):
        model = copy.deepcopy(model).to(device)
        tokens = torch.zeros(1, min(16, config.context), dtype=torch.int64, device=device)
        dtype = machine.pick_dtype(config.dtype, device)
        losses = loss.training_losses(model, tokens, tokens, config, (), dtype, run_block(config))
        sum_of(losses.named).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        build_optimizer(model, config).step()
        update_biases(model, losses.counts, config)
        list(stream(model.eval(), [[0]], 2))


def run_block(config: TrainConfig) -> Callable[..., Any]:
    """The function that runs a block in training, with compilation and recomputation as configured.

    Blocks of the same structure share one compilation.
    """
    run: Callable[..., Any] = Block.__call__
    if config.compile:
        run = torch.compile(run)
    if config.recompute:
        run = functools.partial(torch.utils.checkpoint.checkpoint, run, use_reentrant=False)
    return run


class Trainer:
    """A model with its optimizer, data and training state."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        model: Transformer,
        windows: data.Windows,
        validation: data.Windows,
    ):
        train = config.train
        self.config = config
        self.run = Run(folder, train.steps, train.keep, train.tensorboard)
        self.model = model
        self.windows = windows
        self.validation = validation
        self.device = next(model.parameters()).device
        self.dtype = machine.pick_dtype(train.dtype, self.device)
        self.optimizer = build_optimizer(model, train)
        self.run_block = run_block(train)
        self.tokenizer = ByteTokenizer()
        self.state: dict[str, Any] = {
            "step": 0,
            "tokens": 0,
            "windows": 0,
            "context": train.context,
            "seed": windows.seed,
            "seconds": 0.0,
            **self.circumstances(),
        }

    def circumstances(self) -> dict[str, Any]:
        """What a run's exact bits depend on besides its seed."""
        facts = machine.describe(self.device)
        chosen = {key: facts[key] for key in ("cpu_capability", "threads", "torch")}
        return {"dtype": str(self.dtype), **chosen}

    def read_text(self) -> None:
        """Put the fingerprints of the texts into the state, which checkpoints keep."""
        texts = {"training": self.windows.tokens, "held-out": self.validation.tokens}
        self.state["text"] = {name: data.fingerprint(text) for name, text in texts.items()}

    def resume(self) -> None:
        """Restore model, optimizer, place in the data and log from the newest checkpoint that can go on.

        Raises:
            ValueError: no checkpoint is intact, or the run does not match the config or the text.
        """
        train, folder = self.config.train, self.run.folder
        if not history.checkpoints(folder):
            self.run.say(f"{folder}: stopped before its first checkpoint; starting over")
            self.run.start(self.config)
            return
        newest = history.newest_checkpoint(folder)
        earlier, ahead = self.restore(newest), self.loss_ahead()
        if not math.isfinite(ahead):
            warnings.warn(f"checkpoint skipped: {newest}: its next loss is not finite", stacklevel=2)
            newest, earlier, ahead = self.restore_earlier(newest)
        self.state.setdefault("best_loss", ahead)  # missing in states of earlier versions
        now = self.circumstances()
        if train.dtype == "auto" and earlier["dtype"] != now["dtype"]:
            self.dtype = getattr(torch, earlier["dtype"].removeprefix("torch."))
            now["dtype"] = earlier["dtype"]
        changed = [f"{key} {earlier[key]} -> {value}" for key, value in now.items() if earlier[key] != value]
        if changed:
            listed = ", ".join(changed)
            warnings.warn(f"the last bits may differ from an uninterrupted run: {listed}", stacklevel=2)
        self.state |= now
        self.run.go_on(self.config, earlier["step"])
        history.prune(folder, train.keep, newest)
        self.run.say(f"resuming from {newest} ({earlier['step']} of {train.steps} steps)")

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint that this config and text can continue -> its state"""
        train = self.config.train
        before = history.read_state(folder)
        if before["step"] > train.steps:
            raise ValueError(
                f"train.steps {train.steps} is less than the {before['step']} steps already done"
            )
        old = Config.load(self.run.folder / "config.toml").train
        before = {  # an earlier version did not store these
            "context": old.context,
            "windows": before["tokens"] // old.context,
            "seed": old.seed,
            "text": self.state["text"],
            **before,
        }
        if before["context"] != train.context:
            raise ValueError(
                f"train.context is {before['context']} in the run and {train.context} now; it must not change"
            )
        for name, found in self.state["text"].items():
            if before["text"].get(name) != found:
                raise ValueError(
                    f"the {name} text is not the one that {folder} was trained with (its sha256 differs)"
                )
        earlier = checkpoint.load_checkpoint(folder, self.model, self.optimizer)
        self.state = {**before, **earlier}
        self.windows.seed = self.state["seed"]  # the epoch goes on in its order, whatever train.seed is now
        return earlier

    def restore_earlier(self, failed: Path) -> tuple[Path, dict[str, Any], float]:
        """Load the newest checkpoint before this one whose next loss is finite -> folder, state, loss"""
        found = history.checkpoints(self.run.folder)
        for path in history.whole_checkpoints(found[: found.index(failed)]):
            earlier, ahead = self.restore(path), self.loss_ahead()
            if math.isfinite(ahead):
                return path, earlier, ahead
        raise RunFailed(f"{self.run.folder}: the next loss is not finite from any checkpoint")

    def run_steps(self) -> int:
        """Run the remaining steps -> 0, or 128 + the number of the signal that stopped them."""
        train, run = self.config.train, self.run
        if self.state["step"] == train.steps:
            run.say(f"{run.folder}: all {train.steps} steps are done")
            return 0
        parameters = count.built_parameters(self.model)
        run.say(f"{run.folder}: {parameters:,} parameters, {self.device}, {self.dtype}, {train.steps} steps")
        started = time.perf_counter() - self.state["seconds"]
        with run.at_work(self.state["step"]):
            for step in range(self.state["step"] + 1, train.steps + 1):
                try:
                    row = self.step(step)
                except Abandoned:
                    if self.state["step"] > run.saved:
                        self.save()
                    break
                self.state["seconds"] = time.perf_counter() - started
                row["seconds"] = round(self.state["seconds"], 3)
                last = step == train.steps
                if step % train.eval_every == 0 or last:
                    row["val_loss"] = self.evaluate(None if last else train.eval_tokens)
                    run.check_finite(step, held_out_loss=row["val_loss"])
                if step % train.log_every == 0 or "val_loss" in row:
                    self.log(row)
                if step % train.sample_every == 0 or last:
                    self.sample(step)
                run.bar.update(1)
                if step % train.save_every == 0 or last or run.signal:
                    self.save()
                if run.signal:
                    break
        if run.signal:
            done = f"stopped after step {run.saved}, saved" if run.saved else "stopped in the first step"
            run.say(f"{done}; resume with: lm train --resume --out-dir {run.folder}")
            return 128 + run.signal
        return 0

    def step(self, step: int) -> dict[str, Any]:
        """Update the weights, then the selection biases from the whole batch's counts -> a log row."""
        train = self.config.train
        began = time.perf_counter()
        self.model.train()
        torch.manual_seed(train.seed + step)  # a router's noise is then the same, resumed or not
        rate = learning_rate(step, train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        totals: dict[str, Tensor] = {}
        counts: list[Tensor] = []
        with self.may_be_abandoned():
            for part in range(train.accumulation):
                inputs, targets = self.batch(part)
                masks = self.windows.masks(inputs, targets)
                losses, counts = loss.training_losses(
                    self.model, inputs, targets, train, counts, self.dtype, self.run_block, masks
                )
                (sum_of(losses) / train.accumulation).backward()
                for name, value in losses.items():
                    share = value.detach() / train.accumulation
                    totals[name] = totals.get(name, torch.zeros_like(value)) + share
        limit = train.grad_clip or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        named = {name: float(total) for name, total in totals.items()}
        main = named.pop("cross_entropy")
        self.run.check_finite(step, of_weights=True, loss=main, gradient_norm=float(grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_biases(self.model, counts, train)
        tokens = train.batch_size * train.accumulation * train.context
        windows = self.state["windows"] + train.batch_size * train.accumulation
        self.state.update(step=step, tokens=self.state["tokens"] + tokens, windows=windows)
        if step == 1:
            self.state["first_loss"] = main
        counts = [load.cpu() for load in counts]
        violations = [float(balance.max_violation(load)) for load in counts]
        return {
            "step": step,
            "tokens": self.state["tokens"],
            "loss": main,
            "losses": named,  # the balance losses, each times its weight
            "learning_rate": rate,
            "grad_norm": float(grad_norm),
            "max_violation": sum(violations) / max(1, len(violations)),
            "max_violations": violations,  # one per MoE layer
            "load_entropies": [float(metrics.load_entropy(load)) for load in counts],
            "dead_experts": [int(metrics.dead_experts(load)) for load in counts],
            "tokens_per_second": round(tokens / (time.perf_counter() - began), 1),
        }

    def batch(self, part: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step's forward pass number `part`."""
        size = self.config.train.batch_size
        inputs, targets = self.windows.batch(self.state["windows"] + part * size, size)
        return inputs.to(self.device), targets.to(self.device)

    @contextlib.contextmanager
    def may_be_abandoned(self) -> Iterator[None]:
        """Within it, a signal may end the step, which then leaves no gradient and no changed buffer."""
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.run.can_abandon = True
        try:
            yield
        except Abandoned:
            self.optimizer.zero_grad()
            for name, buffer in self.model.named_buffers():
                buffer.copy_(before[name])
            raise
        finally:
            self.run.can_abandon = False

    def save(self) -> None:
        """Write a checkpoint, unless the loss of the next batch is not finite; one far too high is marked.

        Raises:
            RunFailed: the training has diverged, or writing failed.
        """
        ahead = self.loss_ahead()
        self.run.check_finite(self.state["step"], next_loss=ahead)
        self.state["diverged"] = self.has_diverged(ahead)
        self.state["best_loss"] = min(ahead, self.state.get("best_loss", ahead))
        self.run.save(self.model, self.optimizer, self.state)

    def has_diverged(self, ahead: float) -> bool:
        """Whether a finite loss shows divergence: far above the first, or exactly uniform after learning.

        With huge weights the norms overflow to infinity and return zeros, and so do all logits.
        """
        uniform = math.log(self.config.model.vocab_size)
        collapsed = abs(ahead - uniform) < 1e-3 and self.state.get("best_loss", uniform) < uniform - 0.1
        return collapsed or ahead > 1.5 * max(self.state.get("first_loss", 0.0), uniform)

    @torch.no_grad()
    def loss_ahead(self) -> float:
        """Cross-entropy of the next batch."""
        self.model.eval()
        inputs, targets = self.batch()
        masks = self.windows.masks(inputs, targets)
        losses = loss.training_losses(
            self.model, inputs, targets, self.config.train, (), self.dtype, masks=masks
        )
        return float(losses.named["cross_entropy"])

    @torch.no_grad()
    def evaluate(self, tokens: int | None) -> float:
        """Held-out loss in nats per token, on the whole text or on about `tokens` tokens spread over it."""
        return evaluate(self.model, self.validation, tokens, self.dtype, self.config.train.batch_size)

    def sample(self, step: int) -> None:
        """Generate a short sample; append it to samples.txt and print it."""
        train = self.config.train
        self.model.eval()
        prompt, end = self.validation.question(), self.validation.document_end
        if not prompt:
            prompt = [min(self.tokenizer.encode("\n")[0], self.config.model.vocab_size - 1)]
        steps = stream(self.model, [prompt], 200, 0.8, seed=train.seed, window=train.context)
        tokens = list(itertools.takewhile(lambda token: token != end, map(int, steps)))
        text = self.tokenizer.decode([*self.validation.question(), *tokens])
        with open(self.run.folder / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n")
        self.run.say(f"--- sample at step {step}:\n{text}\n---")

    def log(self, row: dict[str, Any]) -> None:
        """Write a row to the run's log and print its main values."""
        shown = {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_second']:,.0f}"}
        if row["max_violations"]:
            shown["MaxVio"] = f"{row['max_violation']:.2f}"
        if "val_loss" in row:
            shown["val"] = f"{row['val_loss']:.3f}"
        self.run.log(row, shown)
        if "val_loss" in row and not self.run.bar.disable:
            self.run.say(f"step {row['step']}: held-out loss {row['val_loss']:.4f} nats per byte")


def update_biases(model: Transformer, counts: list[Tensor], config: TrainConfig) -> None:
    """Update the selection biases from each MoE layer's tokens per expert, as the config says."""
    if not config.bias_update_rate:
        return
    kinds = {kind: config.bias_update == kind for kind in ("centred", "proportional")}
    for router, load in zip(model.routers(), counts):
        if balance.selection_bias(router) is not None:
            balance.update_bias_(router, load, config.bias_update_rate, **kinds)


def sum_of(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the losses, whose first entry is the cross-entropy."""
    first, *others = losses.values()
    return first + sum(others)
