"""Writing and chatting in the terminal: what `lm generate` and `lm chat` do."""

import io
import sys
from pathlib import Path
from typing import Any

import torch

from mla.pages import PAGE, pages_for

from . import checkpoint, hf, machine, template
from .config import Config
from .engine import Engine, Request
from .model import Transformer
from .sampling import check_options
from .tokenizer import ByteTokenizer, FileTokenizer, open_tokenizer

AT_ONCE = 64  # texts that lm generate makes together
Tokenizer = ByteTokenizer | FileTokenizer


def open_model(path: Path, trust_code: bool, device: str) -> tuple[Transformer, Config, Tokenizer]:
    """The model of a run, of a folder that lm.save wrote or of a Hugging Face one, with what it speaks by.

    Raises:
        ValueError: it is none of these, or something in it is missing, damaged or does not fit.
    """
    place = machine.pick_device(device)
    if (path / "config.json").is_file() and not (path / "config.toml").exists():
        model = hf.from_hf(path)
        config = Config(model=model.config)
    else:
        model = checkpoint.load(path, trust_code)
        config = checkpoint.read_config(path, trust_code)
    tokenizer = open_tokenizer(path, config.model.vocab_size)
    if model.embedding.weight.dtype.itemsize == 2 and machine.pick_dtype("auto", place) == torch.float32:
        model = model.float()  # this machine would emulate it, a hundred times slower
    return model.to(place), config, tokenizer


def generate(options: Any) -> int:
    """`lm generate`: each sample to standard output, as it is made."""
    prompts = [read_prompt(prompt) for prompt in options.prompt or ["\n"]]
    if options.num_samples < 1:
        raise ValueError(f"num_samples={options.num_samples} must be at least 1")
    check_options(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p, None, options.seed
    )
    model, config, tokenizer = open_model(options.run, options.trust_code, options.device)
    texts = [(prompt, tokenizer.encode(prompt)) for prompt in prompts for _ in range(options.num_samples)]
    if not all(tokens for _, tokens in texts):
        raise ValueError("the prompt is empty; it needs at least one byte")
    window = config.model.max_length or config.train.context
    longest = min(window, max(len(tokens) for _, tokens in texts) + options.max_new_tokens)
    at_once = min(AT_ONCE, len(texts))
    engine = Engine(model, at_once, at_once * pages_for(longest) * PAGE, compile=options.compile)
    seeds = [None if options.seed is None else options.seed + number for number in range(len(texts))]
    requests = [submit(engine, tokens, options, s, tokenizer, window) for (_, tokens), s in zip(texts, seeds)]
    for number, ((prompt, _), request) in enumerate(zip(texts, requests), 1):
        if len(texts) > 1:
            write(f"--- {number}\n".encode())
        write(prompt if isinstance(prompt, bytes) else prompt.encode("utf-8", "surrogateescape"))
        say_on(engine, request, tokenizer)
        write(b"\n")
    return 0


def submit(
    engine: Engine, tokens: list[int], options: Any, seed: int | None, tokenizer: Tokenizer, window: int
) -> Request:
    """A request by the options of a command."""
    sampling = (options.max_new_tokens, options.temperature, options.top_k, options.top_p, seed)
    return engine.submit(tokens, *sampling, tokenizer.ends, window)


def say_on(engine: Engine, request: Request, tokenizer: Tokenizer) -> list[int]:
    """Write a request's text to standard output as it is made -> its tokens; others are made meanwhile."""
    text_of, said = tokenizer.writer(), 0
    while True:
        for token in request.tokens[said:]:
            write(text_of(token))
        said = len(request.tokens)
        if request.finished:
            return request.tokens
        engine.step()


def write(text: bytes) -> None:
    """Bytes to standard output at once, whatever the terminal's encoding."""
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def read_prompt(prompt: str) -> str | bytes:
    """The prompt itself, or what FILE:PATH or - stand for."""
    if prompt == "-":
        return sys.stdin.buffer.read()
    if prompt.startswith("FILE:"):
        path = Path(prompt.removeprefix("FILE:"))
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"prompt: {path}: cannot be read: {error.strerror}") from None
    return prompt


def chat(options: Any) -> int:
    """`lm chat`: turns on standard input and output; by the model's chat template, if it has one."""
    check_options(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p, None, options.seed
    )
    model, config, tokenizer = open_model(options.run, options.trust_code, options.device)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # any bytes may be said
    print("Say something; the model goes on from all that was said. An empty line ends it.")
    window = config.model.max_length or config.train.context
    # what was said stays in its cache for the next turn
    engine = Engine(model, 1, window, compile=options.compile)
    history: list[int] = []
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            line = ""
        if not line:
            return 0
        if tokenizer.chat_template is not None:
            messages.append({"role": "user", "content": line})
            said = template.render(tokenizer.chat_template, messages, tokenizer.special)
            prompt = tokenizer.encode(said, special=False)  # the template has put them in
            request = submit(engine, prompt, options, options.seed, tokenizer, window)
            answer = say_on(engine, request, tokenizer)
            messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
            write(b"\n")
            continue
        history += tokenizer.encode(line + "\n")
        request = submit(engine, history, options, options.seed, tokenizer, window)
        history += say_on(engine, request, tokenizer)
        write(b"\n")
        history += tokenizer.encode("\n")
