"""The `lm` command. Imports torch only where a command needs it, so that --help and errors are fast."""

import errno
import importlib
import importlib.metadata
import inspect
import itertools
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from . import __version__, console
from .console import reason, visible

try:
    import tyro

    from . import budget
    from .config import PRESETS, Config, nearest, preset_names
    from .parts import import_here
except ModuleNotFoundError as error:
    raise SystemExit(f"lm: {reason(error)}") from None

RECIPES = [name for name in preset_names() if "[train]" in (PRESETS / f"{name}.toml").read_text("utf-8")]
PUBLISHED = [name for name in preset_names() if name not in RECIPES]
PRESET_HELP = (
    f"the configuration to start from: {', '.join(RECIPES)}, or your own TOML file; "
    f"or a published model, to be scaled down by options: {', '.join(PUBLISHED)}"
)
SHORT = {"--data": "--data.path", "--device": "--train.device", "--seed": "--train.seed"}  # for lm train
ENTRY_POINTS = "lm.commands"  # where other packages register commands: name = package.module:function


@dataclass
class Train:
    """Train a model and write a run folder with checkpoints, samples and a report.

    The configuration starts from a preset, or with --resume from the run; each option changes one value.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: Annotated[str, tyro.conf.arg(help=PRESET_HELP)] = "toy"
    out_dir: Path | None = None  # the run folder; by default runs/PRESET, then runs/PRESET-2, ...
    resume: bool = False  # resume the run in --out-dir, by default the preset's newest run
    trust_code: bool = False  # with --resume: import the custom router or attention named in the run


@dataclass
class OfModel:
    """Options of every command that opens a model."""

    run: tyro.conf.Positional[Path]  # a run folder, a folder written by lm.save, or a Hugging Face folder
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ... or mps
    trust_code: bool = False  # import the custom router or attention that the folder names


@dataclass
class Writing(OfModel):
    """Options of every command that generates text."""

    temperature: float = 0.8  # 0: greedy, always the most likely token
    top_k: int | None = None  # sample from the K most likely tokens
    top_p: float = 1.0  # sample from the smallest set of likely tokens with at least this total probability
    min_p: float = 0.0  # sample from the tokens at least this fraction as likely as the most likely one
    seed: int | None = None  # the same seed gives the same text; by default a new one each time
    compile: bool = False  # compile the decode step: half a minute at the first token, then faster


@dataclass
class Generate(Writing):
    """Continue one or more prompts."""

    # the text to continue, by default a newline; FILE:PATH reads it from a file, - from standard input
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    max_new_tokens: int = 300  # tokens per sample
    num_samples: int = 1  # samples per prompt

    def start(self) -> int:
        budget.check_output(max(1, len(self.prompt)) * self.num_samples, self.max_new_tokens)
        from . import terminal

        return terminal.generate(self)


@dataclass
class Chat(Writing):
    """Chat with a model in the terminal; an empty line ends the chat."""

    max_new_tokens: int = 200  # tokens per answer, at most

    def start(self) -> int:
        budget.check_output(1, self.max_new_tokens)
        from . import terminal

        return terminal.chat(self)


@dataclass
class Serve(OfModel):
    """Serve a model through an OpenAI-compatible API and a chat page.

    Needs the extra "serve": pip install -c constraints.txt -e '.[lm,serve]'
    """

    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0: every interface, reachable from the network
    port: int = 8000  # 0: any free port
    max_batch: int = 64  # sequences that are decoded together
    max_queue: int = 8  # requests that may wait for a place in the batch; more are rejected
    max_seconds: float = 300  # time limit for one request, including its wait
    compile: bool = False  # compile the decode step: half a minute at the first token, then faster

    def start(self) -> int:
        from .serve import app

        return app.serve(self)


@dataclass
class Eval(OfModel):
    """Compute the loss on the held-out text: nats and bits per byte, perplexity."""

    data: Path | None = None  # a text file to use instead of the held-out text

    def start(self) -> int:
        from . import terminal

        return terminal.evaluate(self)


@dataclass
class Report:
    """Write a run's report.html and its figures again."""

    run: tyro.conf.Positional[Path]  # a run folder
    trust_code: bool = False  # import the custom router or attention named in the run

    def start(self) -> int:
        from .report import run

        print(visible(run.write(self.run, self.trust_code)))
        return 0


@dataclass
class Explore:
    """Write explore.html, which replays a model's routing with other biases, top_k or steps."""

    run: tyro.conf.Positional[Path]  # a run folder, a folder written by lm.save, or a Hugging Face folder
    trust_code: bool = False  # import the custom router or attention that the folder names

    def start(self) -> int:
        from .report import explore

        print(visible(explore.write(self.run, self.trust_code)))
        return 0


@dataclass
class Info:
    """Count a model's parameters, FLOPs and cache size without building it."""

    model: tyro.conf.Positional[str]  # a preset, a run folder, or a Hugging Face folder
    context: int = 4096  # context length in tokens, for the cache and the attention FLOPs
    dtype: str = "bf16"  # dtype of the cache: bf16, fp16, fp32 or fp8
    json: bool = False  # print one JSON object
    plot: Path | None = None  # a PNG file for a chart of the parameters by part

    def start(self) -> int:
        import json

        from .report import info

        if not 1 <= self.context < 2**31:
            raise ValueError(f"context={self.context} must be at least 1 and less than 2^31")
        facts = info.summary(info.find_config(self.model), self.context, self.dtype)
        if self.plot is not None:
            info.draw(facts["parameters"], f"Parameters of {self.model}", self.plot)
        print(json.dumps(facts, indent=1) if self.json else info.as_text(facts))
        return 0


@dataclass
class Import:
    """Convert a Hugging Face folder (DeepSeek, Kimi, Llama, Qwen, ...) to a model folder."""

    folder: tyro.conf.Positional[Path]  # a Hugging Face folder: config.json and safetensors
    out: tyro.conf.Positional[Path]  # a new folder

    def start(self) -> int:
        from .hub import folder, hf

        folder.need(self.folder, folder.HUB)
        aside = hf.import_folder(self.folder, self.out)
        print(f"{visible(self.out)}: written; open it with lm generate, chat, serve, eval or info")
        if aside:
            print(f"{len(aside)} multi-token prediction tensors are kept in mtp.safetensors")
        return 0


@dataclass
class Export:
    """Convert a model to a Hugging Face folder, which transformers can load."""

    run: tyro.conf.Positional[Path]  # a run folder, or a folder written by lm.save
    out: tyro.conf.Positional[Path]  # a new folder

    def start(self) -> int:
        from .hub import folder, hf

        folder.need(self.run, folder.RUN, folder.SAVED)
        config = folder.read_config(self.run, trust_code=True)  # reading the config imports nothing
        for path in config.model.own_parts().values():
            raise ValueError(f"{self.run}: {path} is custom code, which Hugging Face's format lacks")
        hf.to_hf(folder.load(self.run), self.out, tokenizer_from=self.run)
        print(f"{visible(self.out)}: written; transformers can load it")
        return 0


@dataclass
class InClone:
    """A command whose code is not in the package but in a clone of the project."""

    about: str
    program: str  # package.module:function

    def start(self, arguments: list[str]) -> int:
        module, _, function = self.program.partition(":")
        folder = Path(*module.split(".")[:-1])
        if not folder.is_dir():
            raise ValueError(f"{folder.absolute()}: no such folder; run this in a clone of the project")
        return getattr(import_here(module), function)(arguments)


GROUPS: dict[str, dict[str, Any]] = {
    "train and inspect": {"train": Train, "eval": Eval, "report": Report, "explore": Explore, "info": Info},
    "generate text": {"generate": Generate, "chat": Chat, "serve": Serve},
    "published models": {"import": Import, "export": Export},
    "in a clone of the project": {
        "exercise": InClone(
            "Implement functions of the package yourself and check them.", "exercises.grader.course:main"
        ),
        "new": InClone(
            "Start a custom router or attention: module, test and config.", "exercises.grader.new:main"
        ),
        "experiment": InClone("Test a claim of the papers: train, compare and plot.", "experiments.cli:main"),
    },
}
COMMANDS: dict[str, Any] = {name: kind for group in GROUPS.values() for name, kind in group.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run a command -> exit status: 0, 1 (failed), 2 (invalid input) or 128 + the signal that stopped it."""
    console.prepare()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = lambda message, *_, **__: console.complain(f"lm: warning: {message}")
    name, *rest = arguments or ["--help"]
    try:
        try:
            if name == "--version":
                print(f"moe-mla {__version__}")
                return 0
            if name in ("-h", "--help"):
                print(overview())
                return 0 if arguments else 2
            return command_of(name)(rest)
        finally:
            sys.stdout.flush()  # here, where an error can be reported, rather than at exit
    except (ValueError, ModuleNotFoundError) as error:
        known = name in COMMANDS or name in added()
        said = str(error) if isinstance(error, ValueError) else reason(error)
        if said.endswith("(--trust-code)"):  # and not yet the whole command
            said = f"{said}: {shlex.join(['lm', *arguments, '--trust-code'])}"
        console.complain(f"{f'lm {name}' if known else 'lm'}: {said}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader is gone
        return 141
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        if os.name == "nt" and getattr(error, "errno", None) == errno.EINVAL:  # how Windows says BrokenPipe
            return 141
        console.complain(f"lm {name}: {reason(error)}")
        return 1
    finally:
        console.discard(sys.stdout)


def command_of(name: str) -> Callable[[list[str]], int]:
    """The function that runs a command with its arguments.

    Raises:
        ValueError: unknown command, or one of another package that cannot be loaded.
    """
    kind = COMMANDS.get(name)
    if name == "train":
        return run_train
    if isinstance(kind, InClone):
        return kind.start
    if kind is not None:
        return lambda rest: run_command(parse(kind, name, rest))
    more = added()
    if name in more:
        try:
            return more[name].load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{more[name].value} cannot be loaded: {error}") from None
    known = [*COMMANDS, *more]
    raise ValueError(f"no command {name!r}{nearest(name, known)}; there are {', '.join(known)}")


def run_command(options: Any) -> int:
    """Run a command with its parsed options."""
    if not isinstance(options, Info):  # all others import torch
        budget.check_address_space()
    return options.start()


def added() -> dict[str, importlib.metadata.EntryPoint]:
    """Commands registered by other installed packages; they cannot replace a built-in command."""
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {entry.name: entry for entry in found if entry.name not in COMMANDS}


def overview() -> str:
    """The help text of `lm`: the commands by group, one line each."""
    groups = {title: {name: summary(kind) for name, kind in group.items()} for title, group in GROUPS.items()}
    for name, entry in added().items():
        ours = entry.dist is not None and entry.dist.name == "moe-mla"
        title = "built on lm" if ours else "from other packages"
        groups.setdefault(title, {})[name] = summary(entry)
    width = max(len(name) for group in groups.values() for name in group)
    lines = ["usage: lm COMMAND ... (lm COMMAND --help lists its options; lm --version)"]
    for title, group in groups.items():
        lines += ["", title, *(f"  {name:{width}}  {text}" for name, text in group.items())]
    return "\n".join(lines)


def summary(kind: Any) -> str:
    """A command's description in one line."""
    if isinstance(kind, InClone):
        return kind.about
    if isinstance(kind, importlib.metadata.EntryPoint):
        try:
            kind = kind.load()
        except Exception as error:  # a broken package must not hide the other commands
            return f"(cannot be loaded: {visible(error)})"
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def parse(kind: type, name: str, arguments: list[str], default: Any = None) -> Any:
    """Parse a command's options; invalid ones end the process with the parser's message and status 2."""
    given = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=f"lm {name}", args=arguments, **given)


def run_train(arguments: list[str]) -> int:
    """`lm train`: train, then write the report."""
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
    budget.check_address_space()
    if options.config.train.tensorboard:
        importlib.import_module("torch.utils.tensorboard")  # missing: an error before anything is written
    from . import checkpoint, train
    from .report import run as report
    from .run import same_model

    if resume:
        same_model(checkpoint.read_config(run, options.trust_code), options.config)
    status = train.train(options.config, run, resume)
    if status == 0:
        print(f"report: {visible(report.write(run, trust_code=True))}")
    return status


def run_folder(preset: str, number: int) -> Path:
    """runs/PRESET, runs/PRESET-2, ..."""
    name = Path(preset).stem
    return Path("runs") / (name if number == 1 else f"{name}-{number}")


def first_free(preset: str) -> int:
    """The number of the preset's first run folder that does not exist."""
    return next(number for number in itertools.count(1) if not run_folder(preset, number).exists())


def value_of(arguments: list[str], option: str) -> str | None:
    """The value of an option, read before the full parser runs."""
    for word, following in zip(arguments, [*arguments[1:], None]):
        word = word.replace("_", "-")
        if word == option:
            return following
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None
