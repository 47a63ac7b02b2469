"""`lm reason`: train by rewards, evaluate, ask."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from lm import budget
from lm.cli import parse, value_of
from lm.console import visible

from . import tasks
from .config import ReasonConfig, check_same

COUNTS = (1, 2, 4, 8, 16, 32, 64)  # votes


@dataclass
class Train:
    """Train a base model by rewards that a program computes, and write a run folder with a report."""

    base: tyro.conf.Positional[Path | None] = None  # the base model's folder; none with --resume
    config: Annotated[ReasonConfig, tyro.conf.arg(name="")] = field(default_factory=ReasonConfig)
    out_dir: Path = Path("runs/reason-rl")  # the run folder
    resume: bool = False  # resume the run in --out-dir

    def start(self) -> int:
        if (self.base is None) != self.resume:
            raise ValueError("expected the folder of a base model, or --resume without one")
        if self.resume:
            check_same(ReasonConfig.load(self.out_dir), self.config)
        from . import report, train

        status = train.train(self.config, self.base, self.out_dir, self.resume)
        if status == 0:
            print(f"report: {visible(report.write(self.out_dir))}")
        return status


@dataclass
class Eval:
    """Measure held-out problems: pass@1, a majority vote, any of k, and accuracy by length of thought."""

    run: tyro.conf.Positional[Path]  # a run folder, any other model folder, or "sums": the packaged model
    task: str = "sums"
    level: int | None = None  # number of terms; by default any of the task's
    problems: int = 256
    k: int = 1  # completions of each problem; a power of two
    budget: tuple[int, ...] = ()  # lengths of thought in bytes; each is measured
    seed: int = 0
    json: bool = False  # print one JSON object

    def start(self) -> int:
        if self.k not in COUNTS:
            raise ValueError(f"k={self.k}: one of {', '.join(map(str, COUNTS))}")
        if self.problems < 1:
            raise ValueError(f"problems={self.problems} must be at least 1")
        chosen = tasks.problems(self.task, 0, self.problems, self.level, held_out=True)
        from lm.hub.folder import open_folder
        from lm.inference.engine import Engine

        from . import scaling
        from .pack import find
        from .rollout import Sampling

        model = open_folder(find(self.run), device="cpu").model
        engine = Engine(model, max_batch=256)
        found: dict[str, Any] = scaling.measure(engine, chosen, Sampling(1), self.seed)
        if not self.json:
            print(scaling.as_text(found))
        if self.k > 1:
            counts = [count for count in COUNTS if count <= self.k]
            found |= {"k": counts, **scaling.votes(engine, chosen, counts, self.seed)}
            if not self.json:
                print_table("completions", counts, {name: found[name] for name in ("majority", "any")})
        if self.budget:
            found |= {"budget": list(self.budget)}
            found["accuracy"] = scaling.budget_curve(model, chosen, self.budget, self.seed)
            if not self.json:
                print_table("bytes of thought", self.budget, {"accuracy": found["accuracy"]})
        if self.json:
            print(json.dumps(found, indent=1))
        return 0


@dataclass
class Ask:
    """Put a problem to a model and show its thinking, then its answer."""

    run: tyro.conf.Positional[Path]  # a run folder, any other model folder, or "sums": the packaged model
    problem: tyro.conf.Positional[str]  # such as "7-6+3+5="
    temperature: float = 0.0  # 0: greedy
    seed: int = 0

    def start(self) -> int:
        text = self.problem.strip().rstrip("=").replace(" ", "")
        if not 1 <= len(text.encode()) < tasks.WIDTH:
            raise ValueError(f"problem {self.problem!r:.80}: expected 1 to {tasks.WIDTH - 1} bytes and =")
        from lm.hub.folder import open_folder
        from lm.inference.engine import Engine

        from .pack import find
        from .rollout import Sampling, sample

        problem = tasks.Problem(f"{text:<{tasks.WIDTH - 1}}=", "")
        engine = Engine(open_folder(find(self.run), device="cpu").model, max_batch=1)
        completion = sample(engine, [problem], self.seed, Sampling(1, 64, self.temperature)).completions[0]
        thought, closed, answer = completion.partition(tasks.CLOSE)
        if closed:
            print(f"thinking: {visible(thought.removeprefix(tasks.OPEN))}")
            completion = answer
        print(visible(completion.partition(tasks.END)[0]))
        return 0


COMMANDS = {"train": Train, "eval": Eval, "ask": Ask}


def main(arguments: list[str]) -> int:
    """Train a small model to reason by rewards, as DeepSeek-R1 was: train, eval, ask."""
    name, rest = (arguments or ["--help"])[0], arguments[1:]
    if name in ("-h", "--help"):
        print("usage: lm reason COMMAND ... (lm reason COMMAND --help lists its options)\n")
        for command, kind in COMMANDS.items():
            print(f"  {command:6} {(kind.__doc__ or '').partition(chr(10))[0]}")
        return 0 if arguments else 2
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
    default = None
    if name == "train" and "--resume" in rest and not {"-h", "--help"} & set(rest):
        run = Path(value_of(rest, "--out-dir") or Train.out_dir)
        default = Train(config=ReasonConfig.load(run), out_dir=run)
    options = parse(COMMANDS[name], f"reason {name}", rest, default)
    budget.check_address_space()
    return options.start()


def print_table(title: str, columns: Sequence[int], rows: dict[str, list[float]]) -> None:
    """Print one line of numbers for each row."""
    width = max(map(len, [title, *rows]))
    print(f"{title:{width}}", *(f"{column:>6}" for column in columns))
    for name, values in rows.items():
        print(f"{name:{width}}", *(f"{value:6.3f}" for value in values))
