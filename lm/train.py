"""Training: one function from a config to a run folder, that can be stopped anywhere and gone on with."""

import contextlib
import copy
import functools
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from tqdm import tqdm

from moe import balance, metrics

from . import checkpoint, count, data, loss, machine, own
from .config import Config, ModelConfig, TrainConfig
from .decode import stream
from .evaluate import evaluate
from .model import Block, Transformer
from .optim import build_optimizer, learning_rate
from .runs import open_run, read_metrics
from .tokenizer import ByteTokenizer


class RunFailed(RuntimeError):
    """Training could not go on: a loss that is not finite, a full disk. The last checkpoint is as it was."""


def train(config: Config, run: Path, resume: bool = False) -> int:
    """Train, writing a run folder: config.toml, metrics.jsonl, checkpoints, samples.txt.

    Args:
        run: the folder; new or empty, or with resume one that an earlier call left.

    Returns:
        0, or 128 + the number of the signal that stopped it (after this step's checkpoint).

    Raises:
        ValueError: the config, the data or the folder does not fit; nothing was written.
        RunFailed: names the step, and the checkpoint that is left.
    """
    device = machine.pick_device(config.train.device)
    if config.train.compile:
        machine.check_compiler(device, "train.compile")
    check_memory(config.model)
    torch.manual_seed(config.train.seed)
    model = Transformer(config.model)  # a config that does not fit shows here, before anything is written
    model.initialize(torch.Generator().manual_seed(config.train.seed))
    own.try_parts(model)
    texts = data.load(config.data, config.model.vocab_size)
    windows = data.Windows(texts[0], config.train.context, config.train.seed)
    validation = data.Windows(texts[1], config.train.context)
    with open_run(run, resume):
        trainer = Trainer(config, run, model.to(device), windows, validation)
        if resume:
            trainer.resume()
        else:
            checkpoint.write_file(run / "config.toml", config.to_toml())
        return trainer.run_steps()


def check_memory(config: ModelConfig) -> None:
    """Raise ValueError for a model whose weights, gradients and two moments in fp32 no memory here holds."""
    try:
        parameters = count.total_parameters(config)
    except ValueError:  # a router or attention of one's own: nobody knows before it is made
        return
    needed, here = 16 * parameters, machine.memory()
    if 0 < here < needed:
        raise ValueError(
            f"the model has {parameters:,} parameters; training them takes {needed / 2**30:,.0f} GiB, "
            f"this machine has {here / 2**30:,.0f}"
        )


def run_block(config: TrainConfig) -> Callable[..., Any]:
    """How training calls a block: compiled, computed again in the backward pass, both or neither.

    Blocks that are alike share one compilation.
    """
    run: Callable[..., Any] = Block.__call__
    if config.compile:
        run = torch.compile(run)
    if config.recompute:
        run = functools.partial(torch.utils.checkpoint.checkpoint, run, use_reentrant=False)
    return run


class Trainer:
    """A model, its optimizer, its data and where it stands."""

    def __init__(
        self, config: Config, run: Path, model: Transformer, windows: data.Windows, validation: data.Windows
    ):
        self.config = config
        self.run = run
        self.model = model
        self.windows = windows
        self.validation = validation
        self.device = next(model.parameters()).device
        self.dtype = machine.pick_dtype(config.train.dtype, self.device)
        self.optimizer = build_optimizer(model, config.train)
        self.run_block = run_block(config.train)
        self.tokenizer = ByteTokenizer()
        self.state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, **self.circumstances()}
        self.signal = 0
        self.board: Any = None

    def circumstances(self) -> dict[str, Any]:
        """What the bits of a run depend on besides its seed."""
        facts = machine.describe(self.device)
        chosen = {key: facts[key] for key in ("cpu_capability", "threads", "torch")}
        return {"dtype": str(self.dtype), **chosen}

    def resume(self) -> None:
        """Go on from the newest whole checkpoint.

        Weights, optimizer, selection biases, place in the data and log are put back to where it was saved.
        """
        train = self.config.train
        if not checkpoint.checkpoints(self.run):
            self.say(f"{self.run}: was stopped before its first checkpoint; starting again")
            checkpoint.write_file(self.run / "config.toml", self.config.to_toml())
            checkpoint.write_file(self.run / "metrics.jsonl", "")
            return
        newest = checkpoint.newest_checkpoint(self.run)
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
            warnings.warn(f"the last bits may differ from an unbroken run: {listed}", stacklevel=2)
        self.state = {**earlier, **now}
        checkpoint.write_file(self.run / "config.toml", self.config.to_toml())
        log = self.run / "metrics.jsonl"
        rows = [row for row in read_metrics(self.run) if row["step"] <= earlier["step"]]
        checkpoint.write_file(log, "".join(json.dumps(row) + "\n" for row in rows))
        self.say(f"going on from {newest} ({earlier['step']} of {train.steps} steps)")

    def run_steps(self) -> int:
        """All steps that are left -> 0, or 128 + the signal that stopped it."""
        train = self.config.train
        if self.state["step"] == train.steps:
            self.say(f"{self.run}: all {train.steps} steps are done")
            return 0
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.say(f"{self.run}: {parameters:,} parameters, {self.device}, {self.dtype}, {train.steps} steps")
        started = time.perf_counter() - self.state["seconds"]
        saved = self.state["step"]
        with self.signals(), self.progress() as bar, open(self.run / "metrics.jsonl", "a") as log:
            for step in range(self.state["step"] + 1, train.steps + 1):
                row = self.step(step)
                self.state["seconds"] = time.perf_counter() - started
                row["seconds"] = round(self.state["seconds"], 3)
                last = step == train.steps
                if step % train.eval_every == 0 or last:
                    row["val_loss"] = self.evaluate(None if last else train.eval_tokens)
                    self.check_finite(step, held_out_loss=row["val_loss"])
                if step % train.log_every == 0 or "val_loss" in row:
                    self.log(row, log, bar)
                if step % train.sample_every == 0 or last:
                    self.sample(step)
                bar.update(1)
                if step % train.save_every == 0 or last or self.signal:
                    self.save(log)
                    saved = step
                if self.signal:
                    break
        if self.signal:
            self.say(f"stopped after step {saved}, saved; go on with: lm train --resume --out-dir {self.run}")
            return 128 + self.signal
        return 0

    def step(self, step: int) -> dict[str, Any]:
        """One update of the weights, and of the selection biases on the whole batch's counts -> a log row."""
        train = self.config.train
        began = time.perf_counter()
        self.model.train()
        torch.manual_seed(train.seed + step)  # of a router's noise: the same, resumed or not
        rate = learning_rate(step, train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        counts: list[Tensor] = []
        for part in range(train.accumulation):
            first = ((step - 1) * train.accumulation + part) * train.batch_size
            inputs, targets = (t.to(self.device) for t in self.windows.batch(first, train.batch_size))
            with self.autocast():
                hidden, routings = self.model.trunk(inputs, run=self.run_block)
                main = loss.head_cross_entropy(self.model.norm(hidden), self.model.head.weight, targets)
            here = [balance.tokens_per_expert(routing, dropped=True) for routing in routings]
            counts = [a + b for a, b in zip(counts, here)] if counts else here
            objective = main + sum(loss.balance_loss(*layer, train) for layer in zip(routings, counts))
            (objective / train.accumulation).backward()
            total += main.detach() / train.accumulation
        limit = train.grad_clip or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.check_finite(step, loss=float(total), gradient_norm=float(grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if train.bias_update_rate:
            for router, count in zip(self.model.routers(), counts):
                bias = getattr(router, "bias", None)
                if isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter):  # which a gradient trains
                    kinds = {kind: train.bias_update == kind for kind in ("centred", "proportional")}
                    balance.update_bias_(router, count, train.bias_update_rate, **kinds)
        tokens = train.batch_size * train.accumulation * train.context
        self.state.update(step=step, tokens=self.state["tokens"] + tokens)
        counts = [count.cpu() for count in counts]
        violations = [float(balance.max_violation(count)) for count in counts]
        return {
            "step": step,
            "tokens": self.state["tokens"],
            "loss": float(total),
            "learning_rate": rate,
            "grad_norm": float(grad_norm),
            "max_violation": sum(violations) / max(1, len(violations)),
            "max_violations": violations,  # of each MoE layer
            "load_entropies": [float(metrics.load_entropy(count)) for count in counts],
            "dead_experts": [int(metrics.dead_experts(count)) for count in counts],
            "tokens_per_second": round(tokens / (time.perf_counter() - began), 1),
        }

    @torch.no_grad()
    def evaluate(self, tokens: int | None) -> float:
        """Held-out loss, nats a token: on the whole text, or on spread windows of about that many tokens."""
        return evaluate(self.model, self.validation, tokens, self.dtype, self.config.train.batch_size)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sample(self, step: int) -> None:
        """Write a little text, into samples.txt and onto the screen."""
        train = self.config.train
        self.model.eval()
        newline, last = self.tokenizer.encode("\n")[0], self.config.model.vocab_size - 1
        prompt = [min(newline, last)]
        model = copy.deepcopy(self.model)  # writing lays out weights anew, and the order of sums with them
        steps = stream(model, [prompt], 200, 0.8, seed=train.seed, window=train.context)
        text = self.tokenizer.decode([int(token) for token in steps])
        with open(self.run / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n")
        self.say(f"--- step {step} writes:\n{text}\n---")

    def log(self, row: dict[str, Any], log: Any, bar: tqdm) -> None:
        """A row into metrics.jsonl, onto the screen, and to TensorBoard if asked."""
        log.write(json.dumps(row, allow_nan=False) + "\n")
        log.flush()
        shown = {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_second']:,.0f}"}
        if row["max_violations"]:
            shown["MaxVio"] = f"{row['max_violation']:.2f}"
        if "val_loss" in row:
            shown["val"] = f"{row['val_loss']:.3f}"
        if bar.disable:
            steps = self.config.train.steps
            left = row["seconds"] / row["step"] * (steps - row["step"])
            text = " ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"step {row['step']}/{steps} {text} left {left:.0f} s")
        else:
            bar.set_postfix(shown, refresh=False)
            if "val_loss" in row:
                self.say(f"step {row['step']}: held-out loss {row['val_loss']:.4f} nats a byte")
        if self.config.train.tensorboard:
            if self.board is None:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.run / "tensorboard"))
            for key in ("loss", "val_loss", "learning_rate", "grad_norm", "max_violation"):
                if key in row:
                    self.board.add_scalar(key, row[key], row["step"])

    def save(self, log: Any) -> None:
        """A checkpoint, and the log up to it, on disk.

        Raises:
            RunFailed: they cannot be written; the checkpoint before is as it was.
        """
        largest = max(float(parameter.detach().abs().max()) for parameter in self.model.parameters())
        self.check_finite(self.state["step"], largest_weight=largest)
        try:
            os.fsync(log.fileno())
            keep = self.config.train.keep
            checkpoint.save_checkpoint(self.run, self.model, self.optimizer, self.state, keep)
        except (OSError, checkpoint.SafetensorError, RuntimeError) as error:
            kept = self.last_checkpoint()
            raise RunFailed(f"step {self.state['step']}: checkpoint not written ({error}); {kept}") from None

    def check_finite(self, step: int, **values: float) -> None:
        """Raise RunFailed for a value that is NaN or infinite."""
        if not all(map(math.isfinite, values.values())):
            listed = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
            raise RunFailed(f"step {step}: {listed}; {self.last_checkpoint()}")

    def last_checkpoint(self) -> str:
        found = checkpoint.checkpoints(self.run)
        return f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM: finish the step and save. A second one: leave at once."""

        def stop(number: int, frame: Any) -> None:
            if self.signal:
                os._exit(128 + number)  # checkpoints are renamed into place, so nothing can be half-written
            self.signal = number
            with contextlib.suppress(RuntimeError):  # it may come while a line is being written
                self.say("stopping after this step; once more to leave at once")

        old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def progress(self) -> tqdm:
        """A bar on a terminal; elsewhere none, and plain lines."""
        done, steps = self.state["step"], self.config.train.steps
        return tqdm(initial=done, total=steps, unit="step", dynamic_ncols=True, disable=None)

    def say(self, line: str) -> None:
        """A line on the screen, above the bar. A reader that is gone ends the training, with a checkpoint."""
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.signal = signal.SIGPIPE
