"""Reinforcement learning from rewards that a program computes: sample groups, score them, update."""

import copy
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm import checkpoint, files, history, machine
from lm.config import Config
from lm.hub import folder as door
from lm.inference.engine import Engine
from lm.model import Transformer
from lm.optim import build_optimizer
from lm.run import Run, open_run
from moe import balance

from . import objectives, tasks
from .config import OPTIONS, ReasonConfig
from .rollout import Judged, Rollout, Sample, Sampler, Sampling, collect, disagreement, judge
from .scaling import as_text, measure
from .tasks import Problem

BASE = "base"  # the model it started from, a folder in the run folder: the reference of the KL term
TRIES = 10  # rounds of dynamic sampling for one step


def policy_loss(config: ReasonConfig, judged: Judged, rollout: Rollout, rewards: Tensor) -> Tensor:
    """The objective of the config on some groups -> ()"""
    log_probs, old, mask = judged.log_probs, rollout.old, rollout.mask
    kind, (low, high) = config.objective, config.clips()
    if kind == "kimi":
        return objectives.kimi(log_probs, old, rewards, mask, config.tau)
    if kind == "rft":  # likelihood of the right completions alone: rejection sampling, then fine-tuning
        return objectives.mean(-log_probs, mask & (rewards > 0).view(-1, 1), "token")
    advantages = objectives.advantages(rewards, normalize=kind != "dr_grpo")
    if kind == "reinforce":
        return objectives.reinforce(log_probs, advantages, mask)
    if kind == "gspo":
        return objectives.gspo(log_probs, old, advantages, mask, low, high)
    how = {"grpo": "sequence", "dr_grpo": "constant", "dapo": "token"}[kind]
    return objectives.grpo(log_probs, old, advantages, mask, low, high, how, config.max_new_tokens)


class Reasoner:
    """A policy with its optimizer, its place in the problems and its training state."""

    def __init__(self, config: ReasonConfig, base: Config, folder: Path, model: Transformer):
        self.config = config
        self.base = base
        self.run = Run(folder, config.steps, config.keep)
        self.model = model
        self.reference = copy.deepcopy(model).eval() if config.kl else None
        self.sampling = Sampling(config.size, config.max_new_tokens, config.temperature, config.replay)
        self.sampler = Sampler(model, config.processes)
        self.optimizer = build_optimizer(model, base.train)
        self.state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "responses": 0}
        self.state |= {"success": {}, "informative": 0}  # by level; steps with groups that differ
        facts = machine.describe()
        self.state |= {key: facts[key] for key in ("cpu_capability", "threads", "torch")}
        self.state["dtype"] = str(torch.float32)

    def resume(self) -> None:
        """Restore model, optimizer and state from the newest whole checkpoint."""
        newest = history.newest_checkpoint(self.run.folder)
        self.state |= checkpoint.load_checkpoint(newest, self.model, self.optimizer, self.config.updates)
        for name in ("sha256", "format"):
            self.state.pop(name, None)  # of the file, written anew
        self.run.go_on(self.base, self.state["step"])
        self.run.say(f"resuming from {newest} ({self.state['step']} of {self.config.steps} steps)")

    def run_steps(self) -> int:
        """Run the remaining steps -> 0, or 128 + the number of the signal that stopped them."""
        config, run = self.config, self.run
        started = time.perf_counter() - self.state["seconds"]
        with self.sampler, run.at_work(self.state["step"]):
            if self.state["step"] == 0:
                first = self.evaluate()
                run.say("base: " + as_text(first))
                if first["in_form"] == 0:
                    run.say(
                        "no completion of the base has the form <think>...</think>N, which earns the reward"
                    )
            for step in range(self.state["step"] + 1, config.steps + 1):
                row = self.step(step)
                self.state["informative"] += row["flat"] < 1
                self.state["seconds"] = time.perf_counter() - started
                row["seconds"] = round(self.state["seconds"], 3)
                last = step == config.steps
                if step == 1:
                    row["base"] = first
                if step % config.eval_every == 0 or last:
                    row["held_out"] = self.evaluate()
                shown = {"reward": f"{row['reward']:.2f}", "length": f"{row['length']:.1f}"}
                shown |= {"flat": f"{row['flat']:.0%}", "entropy": f"{row['entropy']:.2f}"}
                run.log(row, shown)
                if "held_out" in row:
                    run.say(f"step {step}, held out: {as_text(row['held_out'])}")
                run.bar.update(1)
                if step % config.save_every == 0 or last or run.signal:
                    run.save(self.model, self.optimizer, self.state)
                if run.signal:
                    break
        if not self.state["informative"]:
            run.say(
                "all rewards of a group were equal in every step, so nothing was learned; try a lower level"
            )
        if run.signal:
            go_on = f"lm reason train --resume --out-dir {run.folder}"
            run.say(f"stopped after step {run.saved}, saved; resume with: {go_on}")
            return 128 + run.signal
        return 0

    def step(self, step: int) -> dict[str, Any]:
        """Sample, score and update once -> a log row"""
        config = self.config
        began = time.perf_counter()
        rollout = self.collect(step)
        sampled = time.perf_counter()
        rewards = self.rewards(rollout, step)
        self.model.train()
        share, rate = config.prompts // config.updates, config.rate(step)
        kinds: dict[str, list[float]] = {name: [] for name in ("loss", "kl", "grad_norm", "moved")}
        counts: list[Tensor] = []
        entropy = 0.0
        for start in range(0, config.prompts, share):
            part = rollout.groups(start, start + share)
            judged = judge(self.model, part, config.temperature, config.replay)
            loss = policy_loss(config, judged, part, rewards[start : start + share])
            kl = torch.zeros(())
            if self.reference is not None:
                with torch.no_grad():
                    reference = judge(self.reference, part, config.temperature).log_probs
                kl = objectives.mean(objectives.k3(judged.log_probs, reference), part.mask)
            (loss + config.kl * kl).backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
            self.run.check_finite(
                step, of_weights=start == 0, loss=float(loss.detach()), gradient_norm=float(norm)
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer.zero_grad()
            moved = float(objectives.mean((judged.log_probs.detach() - part.old).abs(), part.mask, "token"))
            for name, value in zip(kinds, (float(loss.detach()), float(kl.detach()), float(norm), moved)):
                kinds[name].append(value)
            entropy += float(objectives.mean(judged.entropy, part.mask, "token")) / config.updates
            counts = [balance.tokens_per_expert(routing, part.mask) for routing in judged.routings]
        self.note(rollout)
        self.state.update(step=step, tokens=self.state["tokens"] + int(rollout.mask.sum()))
        lengths, right = rollout.lengths.float(), rollout.rewards > 0
        violations = [float(balance.max_violation(load)) for load in counts]
        row = {
            "step": step,
            "tokens": self.state["tokens"],
            "responses": self.state["responses"],
            "groups": torch.bincount((rollout.rewards > 0).sum(-1), minlength=config.size + 1).tolist(),
            **{name: sum(values) / len(values) for name, values in kinds.items()},
            "reward": float(rollout.rewards.mean()),
            "right": float(rollout.right.float().mean()),
            "in_form": float(rollout.in_form.float().mean()),
            "length": float(lengths.mean()),
            "length_right": mean_or_none(lengths[right]),
            "length_wrong": mean_or_none(lengths[~right]),
            "flat": float((~objectives.informative(rewards)).float().mean()),
            "entropy": entropy,
            "learning_rate": rate,
            "max_violation": sum(violations) / max(1, len(violations)),
            "max_violations": violations,
            "seconds_sampling": round(sampled - began, 3),
        }
        if rollout.experts is not None:
            with torch.no_grad():
                row["experts_moved"] = disagreement(judge(self.model, rollout).routings, rollout)
        return row

    def collect(self, step: int) -> Rollout:
        """A step's groups; with `dynamic`, those whose rewards differ, as far as TRIES rounds find them."""
        config = self.config
        kept: list[tuple[list[Problem], list[Sample]]] = []
        spare: list[tuple[list[Problem], list[Sample]]] = []
        for attempt in range(TRIES if config.dynamic else 1):
            seed = (config.seed * 100_003 + step) * TRIES + attempt
            problems = self.problems(seed, step)
            samples = self.sampler.draw(problems, seed, self.sampling)
            self.state["responses"] += len(samples)
            differ = objectives.informative(collect(problems, samples).rewards)
            for at, problem in enumerate(problems):
                group = ([problem], samples[at * config.size : (at + 1) * config.size])
                (kept if differ[at] or not config.dynamic else spare).append(group)
            if len(kept) >= config.prompts:
                break
        groups = [*kept, *spare][: config.prompts]
        return collect(
            [problem for problems, _ in groups for problem in problems],
            [sample for _, samples in groups for sample in samples],
        )

    def problems(self, seed: int, step: int) -> list[Problem]:
        """The problems of one round."""
        config = self.config
        if config.curriculum == "none":
            return tasks.problems(config.task, seed, config.prompts, config.level or None)
        low, high = tasks.find(config.task).levels
        levels, rng = list(range(low, high + 1)), random.Random(seed)
        if config.curriculum == "easy_first":
            levels = levels[: max(1, math.ceil(2 * step / config.steps * len(levels)))]
            chosen = [rng.choice(levels) for _ in range(config.prompts)]
        else:  # Kimi 1.5 section 2.3.4: in proportion to 1 - success rate
            rates = [1 - self.state["success"].get(str(level), 0.0) + 0.05 for level in levels]
            chosen = rng.choices(levels, rates, k=config.prompts)
        return [
            tasks.problems(config.task, seed * config.prompts + at, 1, level)[0]
            for at, level in enumerate(chosen)
        ]

    def note(self, rollout: Rollout) -> None:
        """Keep a moving average of each level's success rate."""
        success = self.state["success"]
        for problem, reward in zip(rollout.problems, rollout.rewards.mean(-1).tolist()):
            before = success.get(str(problem.level), reward)
            success[str(problem.level)] = 0.9 * before + 0.1 * reward

    def rewards(self, rollout: Rollout, step: int) -> Tensor:
        """What the update is given for each completion, (problems, size)"""
        config = self.config
        if config.reward == "random":
            generator = torch.Generator().manual_seed(config.seed * 100_003 + step)
            return torch.rand(rollout.rewards.shape, generator=generator).round()
        rewards = rollout.rewards + config.format_reward * rollout.in_form
        if config.length_reward and step > config.length_after * config.steps:  # as Kimi 1.5 section 2.3.3
            rewards = rewards + config.length_reward * objectives.length_reward(
                rollout.lengths, rollout.rewards > 0
            )
        return rewards

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """One completion for each of the same held-out problems, at temperature 1."""
        config = self.config
        problems = tasks.problems(config.task, 0, config.eval_problems, config.level or None, held_out=True)
        return measure(Engine(self.model, 256), problems, Sampling(1, config.max_new_tokens))


def mean_or_none(values: Tensor) -> float | None:
    """The mean; None of no values."""
    return float(values.mean()) if values.numel() else None


def train(config: ReasonConfig, start: Path | None, run: Path, resume: bool = False) -> int:
    """Train a base model by rewards, writing a run folder like `lm.train.train`'s, with reason.toml.

    Args:
        start: the base model's folder; None with `resume`.

    Returns:
        0, or 128 + the number of the signal that stopped it (after saving a checkpoint).

    Raises:
        ValueError: the folder or the base model does not fit; nothing was written.
        RunFailed: training cannot continue.
    """
    torch.set_num_threads(1)  # bits then depend neither on the threads nor on `processes`
    source = run / BASE if resume else start
    assert source is not None
    opened = door.open_folder(source, device="cpu")
    check_base(opened.model, config)
    with open_run(run, resume):
        reasoner = Reasoner(config, Config(model=opened.config.model), run, opened.model.float())
        if resume and history.checkpoints(run):
            reasoner.resume()
        else:
            if not resume:
                checkpoint.save(opened.model, run / BASE)
                files.write_file(run / OPTIONS, config.to_toml())
            reasoner.run.start(reasoner.base)
        return reasoner.run_steps()


def check_base(model: Transformer, config: ReasonConfig) -> None:
    """Raise ValueError unless a model reads and writes the bytes of the task."""
    if model.config.vocab_size < 256:
        raise ValueError(
            f"the base model has vocab_size={model.config.vocab_size}; the tasks need all 256 bytes"
        )
    most = tasks.WIDTH + config.max_new_tokens
    if 0 < model.config.max_length < most:
        raise ValueError(f"the base model's max_length={model.config.max_length} is less than {most} tokens")
