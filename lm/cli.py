"""The `lm` command. Loads no torch before a command needs it, so that --help and mistakes are quick."""

import itertools
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import experiments
from .config import PRESETS, Config, preset_names

RECIPES = [name for name in preset_names() if "[train]" in (PRESETS / f"{name}.toml").read_text("utf-8")]
PUBLISHED = [name for name in preset_names() if name not in RECIPES]
PRESET_HELP = (
    f"where the numbers start: {', '.join(RECIPES)}, or a TOML file of your own; "
    f"to make smaller, models as they were published: {', '.join(PUBLISHED)}"
)
SHORT = {"--data": "--data.path", "--device": "--train.device", "--seed": "--train.seed"}  # of lm train


@dataclass
class Train:
    """Train a model, show what it writes, and leave a run folder with a report.

    Options start from a preset (or from the run, with --resume), and each changes one number of it.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: Annotated[str, tyro.conf.arg(help=PRESET_HELP)] = "toy"
    out_dir: Path | None = None  # the run folder; by default runs/PRESET, or the next free runs/PRESET-2, ...
    resume: bool = False  # go on with the run in out_dir, by default the newest of the preset
    trust_code: bool = False  # with --resume: import the router or attention of your own that the run names


@dataclass
class Generate:
    """Write on from a prompt."""

    run: tyro.conf.Positional[Path]  # a run folder, one that lm.save wrote, or a Hugging Face one
    # the text to go on from, by default a new line; FILE:PATH reads it from a file, - from standard input;
    # given several times, all are gone on from together
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    max_new_tokens: int = 300
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int | None = None  # choose among this many most likely tokens
    top_p: float = 1.0  # choose among the fewest most likely tokens with this probability together
    seed: int | None = None  # the same seed writes the same text
    num_samples: int = 1
    compile: bool = False  # write by compiled code: made at the first token, in half a minute, then faster
    device: str = "auto"
    trust_code: bool = False  # import the router or attention of your own that the run names


@dataclass
class Chat:
    """Take turns with a model in the terminal: it goes on from all that was said. An empty line ends it."""

    run: tyro.conf.Positional[Path]  # a run folder, one that lm.save wrote, or a Hugging Face one
    max_new_tokens: int = 200  # the longest answer
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    compile: bool = False  # write by compiled code: made at the first token, in half a minute, then faster
    device: str = "auto"
    trust_code: bool = False  # import the router or attention of your own that the run names


@dataclass
class Serve:
    """Answer programs by the OpenAI API, and people on a chat page."""

    run: tyro.conf.Positional[Path]  # a run folder, one that lm.save wrote, or a Hugging Face one
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0: all of this machine's, for all who reach it
    port: int = 8000  # 0: any that is free
    max_batch: int = 64  # texts that are made together
    max_queue: int = 8  # requests that may wait for a place among them
    max_seconds: float = 300  # the longest that a request may take, waiting included
    compile: bool = False  # write by compiled code: made at the first token, in half a minute, then faster
    device: str = "auto"
    trust_code: bool = False  # import the router or attention of your own that the run names


@dataclass
class Eval:
    """The loss on the whole held-out text, in nats a byte, bits a byte, and perplexity."""

    run: tyro.conf.Positional[Path]  # a run folder, one that lm.save wrote, or a Hugging Face one
    data: Path | None = None  # another text
    device: str = "auto"
    trust_code: bool = False  # import the router or attention of your own that the run names


@dataclass
class Report:
    """Make report.html and its pictures anew."""

    run: tyro.conf.Positional[Path]  # a run folder
    trust_code: bool = False  # import the router or attention of your own that the run names


@dataclass
class Explore:
    """Write explore.html, where a run's router chooses again: other biases, another top_k, earlier steps."""

    run: tyro.conf.Positional[Path]  # a run folder
    trust_code: bool = False  # import the router or attention of your own that the run names


@dataclass
class Info:
    """Parameters, FLOPs and cache of a model, counted without making it."""

    model: tyro.conf.Positional[str]  # a preset, a run folder, or a Hugging Face one
    context: int = 4096  # tokens, for the size of the cache and the FLOPs of attention
    dtype: str = "bf16"  # of the cache: bf16, fp16, fp32 or fp8
    json: bool = False  # as one JSON object
    plot: Path | None = None  # a PNG file to draw the parameters of each part to


@dataclass
class Import:
    """Read a Hugging Face folder (DeepSeek, Kimi, Llama, Qwen, ...) and write one of ours."""

    folder: tyro.conf.Positional[Path]  # with config.json and safetensors
    out: tyro.conf.Positional[Path]  # a new folder


@dataclass
class Export:
    """Write a model as a Hugging Face folder, which transformers reads."""

    run: tyro.conf.Positional[Path]  # a run folder, or one that lm.save wrote
    out: tyro.conf.Positional[Path]  # a new folder


@dataclass
class Experiment:
    """Measure a claim of the papers: train what it needs, compare, draw. Without a name, list them."""


@dataclass
class New:
    """Begin a router or an attention of your own: its module, a test, a config that trains it."""

    kind: tyro.conf.Positional[Literal["router", "attention"]]
    name: tyro.conf.Positional[str]  # of the module, as my_router


@dataclass
class Exercise:
    """Write a function of the package yourself, and have it checked. On a terminal, watch the next one."""


COMMANDS: dict[str, type] = {
    "train": Train,
    "generate": Generate,
    "chat": Chat,
    "serve": Serve,
    "eval": Eval,
    "report": Report,
    "explore": Explore,
    "info": Info,
    "import": Import,
    "export": Export,
    "experiment": Experiment,
    "new": New,
    "exercise": Exercise,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command -> its exit status: 0, 1: it failed, 2: wrong input, 128 + a signal that stopped it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = lambda message, *_, **__: print(f"lm: warning: {message}", file=sys.stderr)
    name, *rest = arguments or ["--help"]
    if name not in (*COMMANDS, "-h", "--help"):
        print(f"lm: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        if name in ("-h", "--help"):
            print(overview(), flush=True)
            return 0 if arguments else 2
        if name in ("train", "experiment"):
            return run_train(rest) if name == "train" else experiments.run(rest)
        if name == "exercise":
            from . import course

            return course.main(rest)
        return RUN[name](parse(COMMANDS[name], name, rest))
    except ValueError as error:
        print(f"lm {name}: {error}", file=sys.stderr)
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


def overview() -> str:
    """The commands, a line each."""
    lines = [f"  lm {name:10}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in COMMANDS.items()]
    return "\n".join(["usage: lm COMMAND ... (lm COMMAND --help tells its options)", "", *lines])


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

    from . import checkpoint, report, runs, train

    if resume:
        runs.same_model(checkpoint.read_config(run, options.trust_code), options.config)
    status = train.train(options.config, run, resume)
    if status == 0:
        page = report.write(run, trust_code=True)
        print(f"report: {page}")
    return status


def value_of(arguments: list[str], option: str) -> str | None:
    """What follows an option, before the parser proper has seen it."""
    for word, following in zip(arguments, [*arguments[1:], None]):
        word = word.replace("_", "-")
        if word == option:
            return following
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None


def run_folder(preset: str, number: int) -> Path:
    """runs/PRESET, runs/PRESET-2, ..."""
    name = Path(preset).stem
    return Path("runs") / (name if number == 1 else f"{name}-{number}")


def first_free(preset: str) -> int:
    """The number of the first run folder of that preset that does not exist."""
    return next(number for number in itertools.count(1) if not run_folder(preset, number).exists())


def run_generate(options: Generate) -> int:
    """lm generate"""
    from . import talk

    return talk.generate(options)


def run_chat(options: Chat) -> int:
    """lm chat"""
    from . import talk

    return talk.chat(options)


def run_serve(options: Serve) -> int:
    """lm serve"""
    try:
        from . import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "pydantic", "uvicorn"):
            raise
        raise ValueError(f"needs {error.name}: pip install -c constraints.txt -e '.[lm,serve]'") from None
    return serve.serve(options)


def run_eval(options: Eval) -> int:
    """lm eval"""
    import math

    from . import data, evaluate, machine, talk

    model, config, tokenizer = talk.open_model(options.run, options.trust_code, options.device)
    if options.data is None:
        _, text = data.load(config.data, config.model.vocab_size)
    else:
        text = data.open_text(options.data)
    tokens = tokenizer.encode_array(text)
    windows = data.Windows(tokens, min(config.model.max_length or config.train.context, 1024))
    device = machine.pick_device(options.device)
    dtype = machine.pick_dtype(config.train.dtype, device)
    loss = evaluate.evaluate(model, windows, None, dtype, config.train.batch_size)
    if len(tokens) != len(text):
        print(f"loss {loss:.4f} nats a token, {len(tokens):,} tokens")
        loss *= len(tokens) / len(text)
    print(f"loss {loss:.4f} nats a byte on a text of {len(text):,} bytes")
    print(f"{loss / math.log(2):.4f} bits a byte, perplexity {math.exp(loss):.3f}")
    return 0


def run_report(options: Report) -> int:
    """lm report"""
    from . import report

    print(report.write(options.run, options.trust_code))
    return 0


def run_explore(options: Explore) -> int:
    """lm explore"""
    from . import explore

    print(explore.write(options.run, options.trust_code))
    return 0


def run_new(options: New) -> int:
    """lm new"""
    from . import new

    return new.begin(options.kind, options.name)


def run_info(options: Info) -> int:
    """lm info"""
    import json

    from . import info

    if options.context < 1:
        raise ValueError(f"context={options.context} must be at least 1")
    facts = info.summary(info.find_config(options.model), options.context, options.dtype)
    if options.plot is not None:
        info.draw(facts["parameters"], f"Parameters of {options.model}", options.plot)
    print(json.dumps(facts, indent=1) if options.json else info.as_text(facts))
    return 0


def run_import(options: Import) -> int:
    """lm import"""
    from . import hf

    aside = hf.import_folder(options.folder, options.out)
    print(f"{options.out}: written; lm generate, chat, eval and info take it")
    if aside:
        print(f"{len(aside)} tensors of multi-token prediction are kept beside it, in mtp.safetensors")
    return 0


def run_export(options: Export) -> int:
    """lm export"""
    from . import checkpoint, hf

    if (options.run / "config.toml").is_file():
        config = checkpoint.read_config(options.run, trust_code=True)  # which imports nothing
        for path in config.model.own_parts().values():
            raise ValueError(f"{options.run}: {path} is your own; Hugging Face's format has no name for it")
    hf.to_hf(checkpoint.load(options.run), options.out, tokenizer_from=options.run)
    print(f"{options.out}: written; transformers reads it")
    return 0


RUN: dict[str, Callable[[Any], int]] = {
    "generate": run_generate,
    "chat": run_chat,
    "serve": run_serve,
    "eval": run_eval,
    "report": run_report,
    "explore": run_explore,
    "info": run_info,
    "import": run_import,
    "export": run_export,
    "new": run_new,
}
