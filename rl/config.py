"""The options of reinforcement learning."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import tomli_w

from lm import files
from lm.config import Section, build, choice, number

from . import tasks

OPTIONS = "reason.toml"  # in the run folder
CLIPS = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}  # low and high of the papers; others: 0.2
MAY_CHANGE = ("steps", "processes", "save_every", "keep", "eval_every")  # on resuming


@dataclass(frozen=True)
class ReasonConfig(Section):
    """Reinforcement learning. A step samples `prompts` x `size` completions and makes `updates` updates."""

    name: ClassVar[str] = "reason"
    task: str = choice("sums", *[name for name in tasks.TASKS if name != "sums"])
    level: int = number(0)  # number of terms; 0: any of the task's
    objective: str = choice("grpo", "dr_grpo", "dapo", "gspo", "kimi", "reinforce", "rft")
    reward: str = choice("exact", "random")  # random: a control from which nothing can be learned
    format_reward: float = number(0.0)  # added where the completion has the form <think>...</think>N
    length_reward: float = number(0.0)  # weight of Kimi 1.5's length reward
    length_after: float = number(0.5, 0, 1)  # share of the steps before it begins: at first it is too easy
    kl: float = number(0.0)  # weight of the KL divergence from the base model (k3)
    steps: int = number(60, 1)
    prompts: int = number(16, 1)  # problems in a step
    size: int = number(8, 2)  # completions of a problem: the group
    updates: int = number(2, 1)  # of the weights in a step, each on its share of the groups
    max_new_tokens: int = number(64, 1)
    temperature: float = number(1.0, 1e-3)
    learning_rate: float = number(8e-4)  # the peak
    decay: float = number(0.5, 0, 1)  # final share of the steps with linear decay to a tenth
    grad_clip: float = number(1.0)  # maximum gradient norm; 0: no clipping
    low: float = number(0.0)  # the ratio is clipped to 1 - low .. 1 + high; 0: as in the objective's paper
    high: float = number(0.0)
    tau: float = number(0.02, 1e-9)  # kimi: strength of the pull to the old policy
    dynamic: bool = False  # sample again until `prompts` groups have rewards that differ (DAPO)
    curriculum: str = choice("none", "easy_first", "prioritized")  # which levels the problems come from
    replay: bool = False  # use the experts chosen while sampling again in the update
    processes: int = number(1, 1, 64)  # that sample at the same time
    seed: int = number(0, 0, 2**31 - 1)
    eval_every: int = number(10, 1)
    eval_problems: int = number(256, 1)  # held-out problems, one completion each
    save_every: int = number(20, 1)
    keep: int = number(2, 1)

    def __post_init__(self):
        super().__post_init__()
        if self.prompts % self.updates:
            raise ValueError(f"reason.prompts {self.prompts} is not a multiple of updates {self.updates}")
        task = tasks.find(self.task)
        if self.level and not 2 <= self.level <= task.most:
            raise ValueError(
                f"reason.level {self.level} must lie in 2..{task.most}, the terms of {self.task}"
            )
        if self.level and self.curriculum != "none":
            raise ValueError("reason.curriculum: one level leaves nothing to choose; set reason.level 0")

    def rate(self, step: int) -> float:
        """The learning rate of step 1..steps."""
        if not self.decay:
            return self.learning_rate
        left = (self.steps - step) / (self.decay * self.steps)
        return self.learning_rate * (0.1 + 0.9 * min(1.0, left))

    def clips(self) -> tuple[float, float]:
        """low and high, by default the paper's."""
        low, high = CLIPS.get(self.objective, (0.2, 0.2))
        return self.low or low, self.high or high

    @classmethod
    def load(cls, run: Path) -> Self:
        """Read a run's reason.toml.

        Raises:
            ValueError: there is none, or it is not one.
        """
        path = run / OPTIONS
        if not path.is_file():
            raise ValueError(f"{run}: holds no {OPTIONS}; expected a run of lm reason train")
        try:
            return build(cls, tomllib.loads(files.read_text(path)))
        except (tomllib.TOMLDecodeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_toml(self) -> str:
        return tomli_w.dumps(dataclasses.asdict(self))


def check_same(old: ReasonConfig, new: ReasonConfig) -> None:
    """Raise ValueError unless a run with the options `old` can go on with `new`."""
    for item in dataclasses.fields(ReasonConfig):
        before, after = getattr(old, item.name), getattr(new, item.name)
        if before != after and item.name not in MAY_CHANGE:
            raise ValueError(f"{item.name} is {before!r} in the run and {after!r} now; it must not change")
