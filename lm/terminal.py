"""`lm generate`, `lm chat` and `lm eval`, which write to the terminal."""

import codecs
import math
import sys
from pathlib import Path
from typing import Any

from mla.paged import PAGE, pages_for

from . import data, machine
from .console import visible
from .evaluate import coverage
from .evaluate import evaluate as mean_loss
from .hub.folder import Tokenizer, open_folder
from .hub.thinking import Splitter, splitter_for
from .hub.tokenizer import Plain, encode_chat
from .inference.engine import Engine
from .inference.generate import warn_unread
from .inference.request import Request
from .inference.sampling import check_options

AT_ONCE = 64  # sequences that lm generate decodes together
LONGEST_PROMPT = 2**24  # bytes
FAINT, NORMAL = b"\x1b[2m", b"\x1b[22m"


class Output:
    """Writes text, given as bytes, to standard output: unchanged to a pipe or file, visible on a terminal.

    A terminal shows control characters escaped, such as ESC as \\x1b, and U+FFFD for invalid UTF-8.
    """

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace") if sys.stdout.isatty() else None

    def write(self, text: bytes, last: bool = False, faint: bool = False) -> bytes:
        """Write and flush -> the text itself

        Args:
            last: no more bytes of an incomplete character follow.
            faint: on a terminal, in faint type.
        """
        shown = text
        if self.decoder is not None:
            safe = visible(self.decoder.decode(text, final=last), keep="\n\t")
            shown = safe.encode(sys.stdout.encoding or "utf-8", "replace")
            if faint and shown:
                shown = FAINT + shown + NORMAL  # at once, so that no interruption leaves the terminal faint
        sys.stdout.buffer.write(shown)
        sys.stdout.buffer.flush()
        return text


class ThinkingOutput:
    """Writes a model's answer to standard output, its thought apart from the rest.

    A terminal shows the thought faint; a pipe or file gets it between the lines "thinking:" and "answer:".

    Attributes:
        answer: the text written so far, without the thought.
    """

    def __init__(self, output: Output, splitter: Splitter):
        self.output, self.splitter, self.answer = output, splitter, b""
        self.thinking = False  # the newest text is of the thought

    def write(self, text: bytes, last: bool = False) -> bytes:
        """Write and flush what is certain -> the text itself; `last`: no more text follows."""
        # Latin-1 has a character for each byte, so that any bytes survive
        parts = self.splitter.add(text.decode("latin-1"), last)
        thought, answer = (part.encode("latin-1") for part in parts)
        plain = self.output.decoder is None
        if thought:
            if plain and not self.thinking:
                self.output.write(b"thinking:\n")
            self.thinking = True
            self.output.write(thought, faint=True)
        if self.thinking and (answer or last):
            self.thinking = False
            self.output.write(b"", last=True, faint=True)
            if answer:
                self.output.write(b"\nanswer:\n" if plain else b"\n")
        self.output.write(answer, last)
        self.answer += answer
        return text


def generate(options: Any) -> int:
    """`lm generate`: stream each sample to standard output."""
    prompts = [read_prompt(prompt) for prompt in options.prompt or ["\n"]]
    if options.num_samples < 1:
        raise ValueError(f"num_samples={options.num_samples} must be at least 1")
    sampling = (options.temperature, options.top_k, options.top_p)
    check_options(options.max_new_tokens, *sampling, None, options.seed, options.min_p)
    model, config, tokenizer = open_folder(options.run, options.trust_code, options.device)
    texts = [(prompt, tokenizer.encode(prompt)) for prompt in prompts for _ in range(options.num_samples)]
    if not all(tokens for _, tokens in texts):
        raise ValueError("the prompt is empty; expected at least one byte")
    window = config.model.max_length or config.train.context
    longest = min(window, max(len(tokens) for _, tokens in texts) + options.max_new_tokens)
    at_once = min(AT_ONCE, len(texts))
    engine = Engine(model, at_once, at_once * pages_for(longest) * PAGE, compile=options.compile)
    seeds = [None if options.seed is None else options.seed + number for number in range(len(texts))]
    requests = [submit(engine, tokens, options, s, tokenizer, window) for (_, tokens), s in zip(texts, seeds)]
    for request in requests:
        warn_unread(request)
    output = Output()
    for number, ((prompt, tokens), request) in enumerate(zip(texts, requests), 1):
        if len(texts) > 1:
            output.write(f"--- {number}\n".encode())
        output.write(prompt if isinstance(prompt, bytes) else prompt.encode("utf-8", "surrogateescape"))
        stream_text(engine, request, tokenizer, tokens, output)
        output.write(b"\n")
    return 0


def submit(
    engine: Engine, tokens: list[int], options: Any, seed: int | None, tokenizer: Tokenizer, window: int
) -> Request:
    """Submit a request with a command's sampling options."""
    sampling = (options.max_new_tokens, options.temperature, options.top_k, options.top_p, seed)
    return engine.submit(tokens, *sampling, tokenizer.ends, window, options.min_p)


def stream_text(
    engine: Engine, request: Request, tokenizer: Tokenizer, prompt: list[int], output: Output | ThinkingOutput
) -> None:
    """Stream a request's text to standard output. Other requests advance in the same steps."""
    writer, said = tokenizer.writer(prompt), 0
    while True:
        for token in request.tokens[said:]:
            output.write(writer(token))
        said = len(request.tokens)
        if request.finished == "error":
            raise ValueError(request.error)
        if request.finished:
            output.write(writer.end(), last=True)
            return
        engine.step()


def read_prompt(prompt: str) -> str | bytes:
    """The prompt itself, or the contents of FILE:PATH or, for -, of standard input."""
    if prompt == "-":
        text = sys.stdin.buffer.read(LONGEST_PROMPT + 1)
    elif prompt.startswith("FILE:"):
        text = data.open_text(Path(prompt.removeprefix("FILE:")))[: LONGEST_PROMPT + 1].tobytes()
    else:
        return prompt
    if len(text) > LONGEST_PROMPT:
        raise ValueError(f"prompt: {prompt}: larger than {LONGEST_PROMPT} bytes")
    return text


def chat(options: Any) -> int:
    """`lm chat`: a conversation on standard input and output, by the model's chat template if it has one."""
    sampling = (options.temperature, options.top_k, options.top_p)
    check_options(options.max_new_tokens, *sampling, None, options.seed, options.min_p)
    model, config, tokenizer = open_folder(options.run, options.trust_code, options.device)
    print("Type a message; the model continues the whole conversation. An empty line ends it.")
    window = config.model.max_length or config.train.context
    # its cache keeps the conversation for the next turn
    engine = Engine(model, 1, window, compile=options.compile)
    history: list[int] = []
    messages: list[dict[str, str]] = []
    output, warned = Output(), False
    while True:
        try:
            line = input("> ")
        except EOFError:
            line = ""
        if not line:
            return 0
        if tokenizer.chat_template is not None:
            messages.append({"role": "user", "content": line})
            prompt = encode_chat(tokenizer, messages)
        else:
            plain = Plain(tokenizer, line)
            history += plain.encode(plain.mark(line + "\n"), special=not history)
            prompt = history
        request = submit(engine, prompt, options, options.seed, tokenizer, window)
        warned = warned or warn_unread(request)
        shown = ThinkingOutput(output, splitter_for(tokenizer, prompt))
        stream_text(engine, request, tokenizer, prompt, shown)
        output.write(b"\n")
        answer, said = shown.answer.decode("utf-8", "surrogateescape"), request.tokens
        messages.append({"role": "assistant", "content": answer})
        if shown.splitter.thinks:  # later turns do not see the thought
            plain = Plain(tokenizer, answer)
            said = plain.encode(plain.mark(answer, by_model=True), special=False)
        history += [*said, *tokenizer.encode("\n", special=False)]


def evaluate(options: Any) -> int:
    """`lm eval`: the loss on a whole text in nats per byte, and per token where tokens are not bytes."""
    model, config, tokenizer = open_folder(options.run, options.trust_code, options.device)
    if options.data is None:
        _, text = data.load(config.data, config.model.vocab_size, config.train.seed)
    else:
        text = data.open_text(options.data)
    tokens = tokenizer.encode_array(text)
    context = min(config.model.max_length or config.train.context, 1024)
    windows = data.Windows(tokens, context, **data.separators(config))
    dtype = machine.pick_dtype(config.train.dtype, model.embedding.weight.device)
    loss = mean_loss(model, windows, None, dtype, config.train.batch_size)
    if len(tokens) != len(text):
        print(f"loss {loss:.4f} nats per token, {len(tokens):,} tokens")
        loss *= len(tokens) / len(text)
    print(f"loss {loss:.4f} nats per byte on a text of {len(text):,} bytes")
    print(f"{loss / math.log(2):.4f} bits per byte, perplexity {math.exp(loss):.3f}")
    print(coverage(windows))
    return 0
