"""The `lm` command. Loads no torch before a command needs it, so that --help and mistakes are quick."""

import importlib.metadata
import inspect
import itertools
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from .config import PRESETS, Config, nearest, preset_names
from .parts import import_here

RECIPES = [name for name in preset_names() if "[train]" in (PRESETS / f"{name}.toml").read_text("utf-8")]
PUBLISHED = [name for name in preset_names() if name not in RECIPES]
PRESET_HELP = (
    f"where the numbers start: {', '.join(RECIPES)}, or your own TOML file; "
    f"to be made smaller, models as published: {', '.join(PUBLISHED)}"
)
SHORT = {"--data": "--data.path", "--device": "--train.device", "--seed": "--train.seed"}  # of lm train
ENTRY_POINTS = "lm.commands"  # by which other packages add commands: name = package.module:function


@dataclass
class Train:
    """Train a model, show what it writes, and leave a run folder with a report.

    Options start from a preset (or from the run, with --resume), and each changes one number of it.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: Annotated[str, tyro.conf.arg(help=PRESET_HELP)] = "toy"
    out_dir: Path | None = None  # the run folder; by default runs/PRESET, or the next free runs/PRESET-2, ...
    resume: bool = False  # go on with the run in out_dir, by default the newest of the preset
    trust_code: bool = False  # with --resume: import the custom router or attention that the run names


@dataclass
class OfModel:
    """What the commands that open a model have in common."""

    run: tyro.conf.Positional[Path]  # a run folder, one that lm.save wrote, or a Hugging Face one
    device: str = "auto"
    trust_code: bool = False  # import the custom router or attention that the folder names


@dataclass
class Writing(OfModel):
    """What the commands that write text have in common."""

    temperature: float = 0.8  # 0: always the most likely token
    top_k: int | None = None  # choose among this many most likely tokens
    top_p: float = 1.0  # choose among the fewest most likely tokens with this probability together
    seed: int | None = None  # the same seed writes the same text
    compile: bool = False  # write by compiled code: made at the first token, in half a minute, then faster


@dataclass
class Generate(Writing):
    """Continue a prompt."""

    # the text to continue, by default a new line; FILE:PATH reads it from a file, - from standard input;
    # several prompts are continued together
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    max_new_tokens: int = 300
    num_samples: int = 1

    def start(self) -> int:
        from . import terminal

        return terminal.generate(self)


@dataclass
class Chat(Writing):
    """Take turns with a model in the terminal. An empty line ends it."""

    max_new_tokens: int = 200  # the longest answer

    def start(self) -> int:
        from . import terminal

        return terminal.chat(self)


@dataclass
class Serve(OfModel):
    """Answer programs by the OpenAI API, and people on a chat page."""

    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0: all of this machine's, for all who reach it
    port: int = 8000  # 0: any that is free
    max_batch: int = 64  # texts that are written together
    max_queue: int = 8  # requests that may wait for a place among them
    max_seconds: float = 300  # the longest that a request may take, waiting included
    compile: bool = False  # write by compiled code: made at the first token, in half a minute, then faster

    def start(self) -> int:
        try:
            from .serve import app
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "pydantic", "uvicorn"):
                raise
            raise ValueError(f"needs {error.name}: pip install -c constraints.txt -e '.[lm,serve]'") from None
        return app.serve(self)


@dataclass
class Eval(OfModel):
    """The loss on the whole held-out text, in nats a byte, bits a byte, and perplexity."""

    data: Path | None = None  # another text

    def start(self) -> int:
        from . import terminal

        return terminal.evaluate(self)


@dataclass
class Report:
    """Write a run's report.html and its pictures again."""

    run: tyro.conf.Positional[Path]  # a run folder
    trust_code: bool = False  # import the custom router or attention that the run names

    def start(self) -> int:
        from .report import run

        print(run.write(self.run, self.trust_code))
        return 0


@dataclass
class Explore:
    """Write explore.html, where a model's router chooses again: other biases, top_k or step."""

    run: tyro.conf.Positional[Path]  # a run folder, one that lm.save wrote, or a Hugging Face one
    trust_code: bool = False  # import the custom router or attention that the folder names

    def start(self) -> int:
        from .report import explore

        print(explore.write(self.run, self.trust_code))
        return 0


@dataclass
class Info:
    """Parameters, FLOPs and cache of a model, counted without building it."""

    model: tyro.conf.Positional[str]  # a preset, a run folder, or a Hugging Face one
    context: int = 4096  # tokens, for the size of the cache and the FLOPs of attention
    dtype: str = "bf16"  # of the cache: bf16, fp16, fp32 or fp8
    json: bool = False  # as one JSON object
    plot: Path | None = None  # a PNG file to draw the parameters of each part to

    def start(self) -> int:
        import json

        from .report import info

        if self.context < 1:
            raise ValueError(f"context={self.context} must be at least 1")
        facts = info.summary(info.find_config(self.model), self.context, self.dtype)
        if self.plot is not None:
            info.draw(facts["parameters"], f"Parameters of {self.model}", self.plot)
        print(json.dumps(facts, indent=1) if self.json else info.as_text(facts))
        return 0


@dataclass
class Import:
    """Read a Hugging Face folder (DeepSeek, Kimi, Llama, Qwen, ...) and write one of ours."""

    folder: tyro.conf.Positional[Path]  # with config.json and safetensors
    out: tyro.conf.Positional[Path]  # a new folder

    def start(self) -> int:
        from .hub import folder, hf

        folder.need(self.folder, folder.HUB)
        aside = hf.import_folder(self.folder, self.out)
        print(f"{self.out}: written; lm generate, chat, eval and info take it")
        if aside:
            print(f"{len(aside)} tensors of multi-token prediction are kept beside it, in mtp.safetensors")
        return 0


@dataclass
class Export:
    """Write a model as a Hugging Face folder, which transformers reads."""

    run: tyro.conf.Positional[Path]  # a run folder, or one that lm.save wrote
    out: tyro.conf.Positional[Path]  # a new folder

    def start(self) -> int:
        from .hub import folder, hf

        folder.need(self.run, folder.RUN, folder.SAVED)
        config = folder.read_config(self.run, trust_code=True)  # which imports nothing
        for path in config.model.own_parts().values():
            raise ValueError(f"{self.run}: {path} is your own; Hugging Face's format has no name for it")
        hf.to_hf(folder.load(self.run), self.out, tokenizer_from=self.run)
        print(f"{self.out}: written; transformers reads it")
        return 0


@dataclass
class InClone:
    """A command whose program stands beside the package, in a clone of the project."""

    about: str
    program: str  # package.module:function

    def start(self, arguments: list[str]) -> int:
        module, _, function = self.program.partition(":")
        folder = Path(*module.split(".")[:-1])
        if not folder.is_dir():
            raise ValueError(f"{folder.absolute()}: not here; run this in a clone of the project")
        return getattr(import_here(module), function)(arguments)


GROUPS: dict[str, dict[str, Any]] = {
    "a model of your own": {"train": Train, "eval": Eval, "report": Report, "explore": Explore, "info": Info},
    "its text": {"generate": Generate, "chat": Chat, "serve": Serve},
    "published models": {"import": Import, "export": Export},
    "in a clone of the project": {
        "exercise": InClone(
            "Write a function of the package yourself, and have it checked.", "exercises.grader.course:main"
        ),
        "new": InClone(
            "Begin a custom router or attention: module, test, config.", "exercises.grader.new:main"
        ),
        "experiment": InClone("Measure a claim of the papers: train, compare, draw.", "experiments.cli:main"),
    },
}
COMMANDS: dict[str, Any] = {name: kind for group in GROUPS.values() for name, kind in group.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run a command -> its exit status: 0, 1: it failed, 2: wrong input, 128 + a signal that stopped it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = lambda message, *_, **__: print(f"lm: warning: {message}", file=sys.stderr)
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(overview(), flush=True)
        return 0 if arguments else 2
    try:
        return command_of(name)(rest)
    except ValueError as error:
        known = name in COMMANDS or name in added()
        print(f"{f'lm {name}' if known else 'lm'}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # nobody reads on: what Python flushes at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, MemoryError, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        print(f"lm {name}: {reason.splitlines()[0]}", file=sys.stderr)
        return 1


def command_of(name: str) -> Callable[[list[str]], int]:
    """The function that runs a command with its arguments.

    Raises:
        ValueError: there is no such command.
    """
    kind = COMMANDS.get(name)
    if name == "train":
        return run_train
    if isinstance(kind, InClone):
        return kind.start
    if kind is not None:
        return lambda rest: parse(kind, name, rest).start()
    more = added()
    if name in more:
        return more[name].load()
    known = [*COMMANDS, *more]
    raise ValueError(f"no command {name!r}{nearest(name, known)}; there are {', '.join(known)}")


def added() -> dict[str, importlib.metadata.EntryPoint]:
    """The commands that other installed packages add; a built-in name stays ours."""
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {entry.name: entry for entry in found if entry.name not in COMMANDS}


def overview() -> str:
    """The commands in their groups, a line each."""
    groups = {title: {name: summary(kind) for name, kind in group.items()} for title, group in GROUPS.items()}
    if more := added():
        groups["from other packages"] = {name: summary(entry) for name, entry in more.items()}
    width = max(len(name) for group in groups.values() for name in group)
    lines = ["usage: lm COMMAND ... (lm COMMAND --help shows its options)"]
    for title, group in groups.items():
        lines += ["", title, *(f"  {name:{width}}  {text}" for name, text in group.items())]
    return "\n".join(lines)


def summary(kind: Any) -> str:
    """A command in a line."""
    if isinstance(kind, InClone):
        return kind.about
    if isinstance(kind, importlib.metadata.EntryPoint):
        try:
            kind = kind.load()
        except Exception as error:  # of another package: no reason to show none of ours
            return f"(cannot be loaded: {error})"
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def parse(kind: type, name: str, arguments: list[str], default: Any = None) -> Any:
    """The command's options; the parser's own words and exit status 2 where they are wrong."""
    given = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=f"lm {name}", args=arguments, **given)


def run_train(arguments: list[str]) -> int:
    """lm train"""
    split = (argument.partition("=") for argument in arguments)
    arguments = [f"{SHORT.get(word, word)}{sign}{value}" for word, sign, value in split]
    preset = value_of(arguments, "--preset") or "toy"
    out_dir = value_of(arguments, "--out-dir")
    resume = "--resume" in arguments
    if resume and not {"-h", "--help"} & set(arguments):
        run = Path(out_dir) if out_dir else run_folder(preset, max(1, first_free(preset) - 1))
        if not (run / "config.toml").exists():
            raise ValueError(f"{run}: no run to resume")
        base = Config.load(run / "config.toml")
    else:
        run = Path(out_dir) if out_dir else run_folder(preset, first_free(preset))
        base = Config.preset(preset)
    options = parse(Train, "train", arguments, Train(config=base))

    from . import checkpoint, train
    from .report import run as report
    from .run import same_model

    if resume:
        same_model(checkpoint.read_config(run, options.trust_code), options.config)
    status = train.train(options.config, run, resume)
    if status == 0:
        print(f"report: {report.write(run, trust_code=True)}")
    return status


def run_folder(preset: str, number: int) -> Path:
    """runs/PRESET, runs/PRESET-2, ..."""
    name = Path(preset).stem
    return Path("runs") / (name if number == 1 else f"{name}-{number}")


def first_free(preset: str) -> int:
    """The number of the first run folder of that preset that does not exist."""
    return next(number for number in itertools.count(1) if not run_folder(preset, number).exists())


def value_of(arguments: list[str], option: str) -> str | None:
    """What follows an option, before the parser proper has seen it."""
    for word, following in zip(arguments, [*arguments[1:], None]):
        word = word.replace("_", "-")
        if word == option:
            return following
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None
