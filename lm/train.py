"""Training: from a config to a run folder. A run can be stopped at any step and resumed."""

import functools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from moe import balance, metrics

from . import checkpoint, count, data, files, loss, machine, parts
from .config import Config, ModelConfig, TrainConfig
from .evaluate import evaluate
from .inference.generate import stream
from .model import Block, Transformer
from .optim import build_optimizer, learning_rate
from .run import Run, open_run
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
    check_memory(config.model)
    torch.manual_seed(config.train.seed)
    model = Transformer(config.model)  # an invalid config fails here, before anything is written
    model.initialize(torch.Generator().manual_seed(config.train.seed))
    parts.try_parts(model)
    texts = data.load(config.data, config.model.vocab_size)
    windows = data.Windows(texts[0], config.train.context, config.train.seed)
    validation = data.Windows(texts[1], config.train.context)
    with open_run(run, resume):
        trainer = Trainer(config, run, model.to(device), windows, validation)
        if resume:
            trainer.resume()
        else:
            files.write_file(run / "config.toml", config.to_toml())
        return trainer.run_steps()


def check_memory(config: ModelConfig) -> None:
    """Raise ValueError if fp32 weights, gradients and two moments do not fit into this machine's memory."""
    try:
        parameters = count.total_parameters(config)
    except ValueError:  # a custom router or attention cannot be counted before it is built
        return
    needed, here = 16 * parameters, machine.memory()
    if 0 < here < needed:
        raise ValueError(
            f"the model has {parameters:,} parameters; training them takes {needed / 2**30:,.0f} GiB; "
            f"this machine has {here / 2**30:,.0f} GiB"
        )


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
        self.state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, **self.circumstances()}

    def circumstances(self) -> dict[str, Any]:
        """What a run's exact bits depend on besides its seed."""
        facts = machine.describe(self.device)
        chosen = {key: facts[key] for key in ("cpu_capability", "threads", "torch")}
        return {"dtype": str(self.dtype), **chosen}

    def resume(self) -> None:
        """Restore model, optimizer, data position and log from the newest intact checkpoint."""
        train, folder = self.config.train, self.run.folder
        if not checkpoint.checkpoints(folder):
            self.run.say(f"{folder}: stopped before its first checkpoint; starting over")
            self.run.start(self.config)
            return
        newest = checkpoint.newest_checkpoint(folder)
        earlier = checkpoint.load_checkpoint(newest, self.model, self.optimizer)
        if earlier["step"] > train.steps:
            raise ValueError(
                f"train.steps {train.steps} is less than the {earlier['step']} steps already done"
            )
        now = self.circumstances()
        if train.dtype == "auto" and earlier["dtype"] != now["dtype"]:
            self.dtype = getattr(torch, earlier["dtype"].removeprefix("torch."))
            now["dtype"] = earlier["dtype"]
        changed = [f"{key} {earlier[key]} -> {value}" for key, value in now.items() if earlier[key] != value]
        if changed:
            listed = ", ".join(changed)
            warnings.warn(f"the last bits may differ from an uninterrupted run: {listed}", stacklevel=2)
        self.state = {**earlier, **now}
        self.run.go_on(self.config, earlier["step"])
        self.run.say(f"resuming from {newest} ({earlier['step']} of {train.steps} steps)")

    def run_steps(self) -> int:
        """Run the remaining steps -> 0, or 128 + the number of the signal that stopped them."""
        train, run = self.config.train, self.run
        if self.state["step"] == train.steps:
            run.say(f"{run.folder}: all {train.steps} steps are done")
            return 0
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        run.say(f"{run.folder}: {parameters:,} parameters, {self.device}, {self.dtype}, {train.steps} steps")
        started = time.perf_counter() - self.state["seconds"]
        with run.at_work(self.state["step"]):
            for step in range(self.state["step"] + 1, train.steps + 1):
                row = self.step(step)
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
                    run.save(self.model, self.optimizer, self.state)
                if run.signal:
                    break
        if run.signal:
            then = f"resume with: lm train --resume --out-dir {run.folder}"
            run.say(f"stopped after step {run.saved}, saved; {then}")
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
        for part in range(train.accumulation):
            first = ((step - 1) * train.accumulation + part) * train.batch_size
            inputs, targets = (t.to(self.device) for t in self.windows.batch(first, train.batch_size))
            losses, counts = loss.training_losses(
                self.model, inputs, targets, train, counts, self.dtype, self.run_block
            )
            (sum_of(losses) / train.accumulation).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach() / train.accumulation
        limit = train.grad_clip or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        named = {name: float(total) for name, total in totals.items()}
        main = named.pop("cross_entropy")
        self.run.check_finite(step, loss=main, gradient_norm=float(grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if train.bias_update_rate:
            kinds = {kind: train.bias_update == kind for kind in ("centred", "proportional")}
            for router, count in zip(self.model.routers(), counts):
                if balance.selection_bias(router) is not None:
                    balance.update_bias_(router, count, train.bias_update_rate, **kinds)
        tokens = train.batch_size * train.accumulation * train.context
        self.state.update(step=step, tokens=self.state["tokens"] + tokens)
        counts = [count.cpu() for count in counts]
        violations = [float(balance.max_violation(count)) for count in counts]
        return {
            "step": step,
            "tokens": self.state["tokens"],
            "loss": main,
            "losses": named,  # the balance losses, each times its weight
            "learning_rate": rate,
            "grad_norm": float(grad_norm),
            "max_violation": sum(violations) / max(1, len(violations)),
            "max_violations": violations,  # one per MoE layer
            "load_entropies": [float(metrics.load_entropy(count)) for count in counts],
            "dead_experts": [int(metrics.dead_experts(count)) for count in counts],
            "tokens_per_second": round(tokens / (time.perf_counter() - began), 1),
        }

    @torch.no_grad()
    def evaluate(self, tokens: int | None) -> float:
        """Held-out loss in nats per token, on the whole text or on about `tokens` tokens spread over it."""
        return evaluate(self.model, self.validation, tokens, self.dtype, self.config.train.batch_size)

    def sample(self, step: int) -> None:
        """Generate a short sample; append it to samples.txt and print it."""
        train = self.config.train
        self.model.eval()
        newline, last = self.tokenizer.encode("\n")[0], self.config.model.vocab_size - 1
        prompt = [min(newline, last)]
        steps = stream(self.model, [prompt], 200, 0.8, seed=train.seed, window=train.context)
        text = self.tokenizer.decode([int(token) for token in steps])
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


def sum_of(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the losses, whose first entry is the cross-entropy."""
    first, *others = losses.values()
    return first + sum(others)
