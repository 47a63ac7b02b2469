"""What `lm generate`, `lm chat` and `lm eval` do in the terminal."""

import io
import math
import sys
from pathlib import Path
from typing import Any

from mla.paged import PAGE, pages_for

from . import data, machine
from .evaluate import evaluate as mean_loss
from .hub import template
from .hub.folder import Tokenizer, open_folder
from .inference.engine import Engine, Request
from .inference.sampling import check_options

AT_ONCE = 64  # texts that lm generate makes together


def generate(options: Any) -> int:
    """`lm generate`: each sample to standard output, as it is made."""
    prompts = [read_prompt(prompt) for prompt in options.prompt or ["\n"]]
    if options.num_samples < 1:
        raise ValueError(f"num_samples={options.num_samples} must be at least 1")
    check_options(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p, None, options.seed
    )
    model, config, tokenizer = open_folder(options.run, options.trust_code, options.device)
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
    model, config, tokenizer = open_folder(options.run, options.trust_code, options.device)
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


def evaluate(options: Any) -> int:
    """`lm eval`: the loss on a whole text, by a token where tokens are not bytes, and by a byte."""
    model, config, tokenizer = open_folder(options.run, options.trust_code, options.device)
    if options.data is None:
        _, text = data.load(config.data, config.model.vocab_size)
    else:
        text = data.open_text(options.data)
    tokens = tokenizer.encode_array(text)
    windows = data.Windows(tokens, min(config.model.max_length or config.train.context, 1024))
    dtype = machine.pick_dtype(config.train.dtype, machine.pick_device(options.device))
    loss = mean_loss(model, windows, None, dtype, config.train.batch_size)
    if len(tokens) != len(text):
        print(f"loss {loss:.4f} nats a token, {len(tokens):,} tokens")
        loss *= len(tokens) / len(text)
    print(f"loss {loss:.4f} nats a byte on a text of {len(text):,} bytes")
    print(f"{loss / math.log(2):.4f} bits a byte, perplexity {math.exp(loss):.3f}")
    return 0
