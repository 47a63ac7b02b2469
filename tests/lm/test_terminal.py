"""`lm generate`, `lm chat` and `lm eval`, as processes."""

import io
import math
import os
import re
import signal
import sys

import pytest
import torch

from lm import checkpoint, data, terminal, train
from lm.config import Config
from lm.hub.thinking import Splitter
from lm.inference import generate as decode
from lm.run import read_metrics
from tests.lm.command import lm, lm_into_head, one_line


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--temperature", "inf"], "temperature=inf must be finite and at least 0"),
        (["--temperature", "-1"], "temperature=-1.0 must be finite and at least 0"),
        (["--temperature", "nan"], "temperature=nan must be finite"),
        (["--top-k", "-1"], "top_k=-1 must be at least 1"),
        (["--top-k", "0"], "top_k=0 must be at least 1"),
        (["--top-p", "1.5"], "top_p=1.5 must lie above 0 and at most at 1"),
        (["--min-p", "1.5"], "min_p=1.5 must lie in 0..1"),
        (["--min-p", "nan"], "min_p=nan must lie in 0..1"),
        (["--max-new-tokens", "-1"], "max_new_tokens=-1 must be at least 0"),
        (["--seed", "-1"], "seed=-1 must lie in 0.."),
        (["--seed", str(2**70)], "must lie in 0.."),
        (["--num-samples", "0"], "num_samples=0 must be at least 1"),
        (["--device", "cuda:77"], "device 'cuda:77' was not found"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "FILE:missing"], "missing: cannot be read: No such file or directory"),
        (["--prompt", "FILE:."], "cannot be read: Is a directory"),
        (["--prompt", "FILE:"], "cannot be read: Is a directory"),
        (["--prompt", "FILE:empty"], "empty: the file is empty"),
        (["--prompt", "FILE:/dev/zero"], "/dev/zero: cannot be read: not a regular file"),
        (["--prompt", "-"], "the prompt is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_invalid_input_of_generate_is_one_line(trained_once, command, tmp_path, arguments, said):
    (tmp_path / "empty").touch()
    ended = command("generate", trained_once, *arguments, cwd=tmp_path)
    assert said in one_line(ended, "generate") and ended.out == b""


def expected(run, prompt, new, **options):
    """What the library generates, as bytes up to the end of the text."""
    tokens = decode.stream(checkpoint.load(run), [list(prompt)], new, window=16, **options)
    made = [int(token) for token in tokens]
    return prompt + bytes(made[: made.index(3)] if 3 in made else made) + b"\n"


def test_generate_writes_prompt_and_continuation(trained_once, command):
    ended = command(
        "generate", trained_once, "--prompt", "abc de", "--max-new-tokens", "40", "--temperature", "0"
    )
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == expected(trained_once, b"abc de", 40, temperature=0)


def test_a_seed_repeats_and_each_sample_has_its_own(trained_once, command):
    sampling = "--max-new-tokens 20 --seed 5 --top-k 50 --top-p 0.9 --temperature 1.5"
    arguments = ["generate", trained_once, *sampling.split()]
    ended = command(*arguments, "--num-samples", 2)
    options = {"temperature": 1.5, "top_k": 50, "top_p": 0.9}
    first, second = (expected(trained_once, b"\n", 20, seed=seed, **options) for seed in (5, 6))
    assert ended.out == b"--- 1\n" + first + b"--- 2\n" + second
    assert command(*arguments).out == first
    unseeded = [command("generate", trained_once, "--max-new-tokens", 50).out for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_prompts_may_come_from_files_and_standard_input(trained_once, command, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xff\x00\xfe abc\n")
    greedy = ["generate", trained_once, "--max-new-tokens", 5, "--temperature", 0]
    want = expected(trained_once, b"\xff\x00\xfe abc\n", 5, temperature=0)
    assert command(*greedy, "--prompt", "FILE:prompt", cwd=tmp_path).out == want
    assert command(*greedy, "--prompt", "-", stdin=tmp_path / "prompt").out == want


def test_several_prompts_continue_as_each_does_alone(trained_once, command):
    options = ["--max-new-tokens", "20", "--temperature", "0"]
    prompts = ["abc", "to be or not", "x"]
    ended = command("generate", trained_once, *options, *(a for p in prompts for a in ("--prompt", p)))
    alone = [command("generate", trained_once, *options, "--prompt", prompt).out for prompt in prompts]
    assert ended.out == b"".join(b"--- %d\n" % number + text for number, text in enumerate(alone, 1))
    assert len(set(alone)) == 3


def test_a_prompt_longer_than_the_context_is_accepted(trained_once, command, tmp_path):
    prompt = b"abcdefgh " * 100
    (tmp_path / "prompt").write_bytes(prompt)
    greedy = ["generate", trained_once, "--max-new-tokens", 5, "--temperature", 0]
    ended = command(*greedy, "--prompt", f"FILE:{tmp_path / 'prompt'}", "--num-samples", 2)
    with pytest.warns(UserWarning, match="the first 892 of the prompt's 900 tokens are not read"):
        text = expected(trained_once, prompt, 5, temperature=0)
    assert ended.out == b"--- 1\n" + text + b"--- 2\n" + text
    said = "the prompt exceeds the window of 16 tokens"
    assert ended.err == f"lm: warning: the first 892 of the prompt's 900 tokens are not read: {said}\n"
    ended = command(*greedy, "--prompt", "a" * 16)
    assert ended.err == ""


@pytest.mark.parametrize("writing", ["generate", "chat"])
def test_min_p_of_1_is_greedy(trained_once, command, tmp_path, writing):
    (tmp_path / "lines").write_text("abc\n")
    options = ["--max-new-tokens", 9, *(["--prompt", "abc"] if writing == "generate" else [])]
    how = {"stdin": tmp_path / "lines"}
    greedy = command(writing, trained_once, *options, "--temperature", 0, **how).out
    drawn = [
        command(writing, trained_once, *options, "--temperature", 3, *more, **how).out
        for more in ([], ["--min-p", 1])
    ]
    assert drawn[0] != greedy == drawn[1]


def test_bytes_are_bytes_whatever_the_locale(trained_once):
    prompt = b"\xff\xfe \xc3\xa9 "
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = lm("generate", str(trained_once), "--prompt", prompt, "--max-new-tokens", "0", env=ascii_only)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, prompt + b"\n", b"")


def test_a_closed_pipe_ends_generate_without_a_traceback(trained_once):
    ended = lm_into_head("generate", trained_once, "--max-new-tokens", 100_000)
    assert ended.returncode == 141 and ended.stderr == ""


def test_ctrl_c_ends_generate_without_a_traceback(trained_once, command):
    # greedy: a drawn token might end the text at once
    pid = command.start("generate", trained_once, "--max-new-tokens", 10**6, "--temperature", 0)
    command.wait_for(
        lambda: (command.folder / "stdout").exists() and (command.folder / "stdout").stat().st_size > 20
    )
    os.kill(pid, signal.SIGINT)
    ended = command.wait()
    assert (ended.code, ended.err) == (130, "")


def test_chat_continues_the_whole_conversation(trained_once, command, tmp_path):
    (tmp_path / "said").write_text("abc\nde fé\n\nnever read\n")
    ended = command("chat", trained_once, "--max-new-tokens", 8, "--temperature", 0, stdin=tmp_path / "said")
    assert ended.code == 0 and ended.err.count("\n") == 1 and "tokens are not read" in ended.err  # once
    first = expected(trained_once, b"abc\n", 8, temperature=0)
    history = first + "de fé\n".encode()
    second = expected(trained_once, history, 8, temperature=0)
    answers = ended.out.split(b"> ")[1:]
    assert b"> ".join(answers) == first.removeprefix(b"abc\n") + b"> " + second.removeprefix(history) + b"> "


class Screen(io.TextIOWrapper):
    def isatty(self):
        return True


def written(monkeypatch, text, size, kind, state="start"):
    """What an answer that comes in pieces of `size` bytes looks like, and its text without the thought."""
    monkeypatch.setattr(sys, "stdout", kind(io.BytesIO(), "utf-8"))
    output = terminal.ThinkingOutput(terminal.Output(), Splitter(state))
    for start in range(0, len(text), size):
        assert output.write(text[start : start + size]) == text[start : start + size]
    output.write(b"", last=True)
    return sys.stdout.buffer.getvalue(), output.answer


THINKING = [
    # text, the bytes in a pipe, the thought and the answer on a terminal
    (
        b"<think>\nh\xff\nm\n</think>\n\n\xe2\x82",
        b"thinking:\nh\xff\nm\nanswer:\n\xe2\x82",
        "h\ufffd\nm",
        "\n\ufffd",
    ),
    ("<think>é\x1b[0m".encode(), "thinking:\né\x1b[0m".encode(), r"é\x1b[0m", ""),
    (b"<think>\xe2\x82</think>7", b"thinking:\n\xe2\x82\nanswer:\n7", "\ufffd", "\n7"),
    (b"<think></think>7", b"7", "", "7"),
    (b"\n7<think>", b"\n7<think>", "", "\n7<think>"),
    (b"", b"", "", ""),
]


@pytest.mark.parametrize("text, piped, thought, answer", THINKING, ids=lambda value: ascii(value)[:30])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_thought_is_faint_on_a_terminal_and_under_a_line_of_its_own_in_a_pipe(
    monkeypatch, text, piped, thought, answer, size
):
    assert written(monkeypatch, text, size, io.TextIOWrapper)[0] == piped
    shown = written(monkeypatch, text, size, Screen)[0].decode()
    pieces = re.split("\x1b\\[2m(.*?)\x1b\\[22m", shown, flags=re.S)  # plain, faint, plain, ...
    assert "".join(pieces[1::2]) == thought
    assert pieces[-1] == answer and set(pieces[:-1:2]) <= {""}
    rest = text.partition(b"</think>")[2].lstrip(b"\n") if b"</think>" in text else b""
    wanted = rest if text.startswith(b"<think>") else text
    assert written(monkeypatch, text, size, Screen)[1] == wanted


def test_chat_ends_with_its_input_and_rejects_invalid_options(trained_once, command):
    ended = command("chat", trained_once)
    assert ended.code == 0 and ended.out.startswith(b"Type a message")
    assert "temperature=inf" in one_line(command("chat", trained_once, "--temperature", "inf"), "chat")
    assert "top_k=0" in one_line(command("chat", trained_once, "--top-k", 0), "chat")


def test_chat_accepts_invalid_utf8(trained_once, command, tmp_path):
    (tmp_path / "said").write_bytes(b"\xff\xfe\n")
    ended = command("chat", trained_once, "--max-new-tokens", 4, "--temperature", 0, stdin=tmp_path / "said")
    assert (ended.code, ended.err) == (0, "")
    assert expected(trained_once, b"\xff\xfe\n", 4, temperature=0).removeprefix(b"\xff\xfe\n") in ended.out


def test_eval_prints_the_loss_of_the_whole_held_out_text(trained_once, command):
    ended = command("eval", trained_once)
    assert (ended.code, ended.err) == (0, "")
    loss = read_metrics(trained_once)[-1]["val_loss"]
    config = Config.load(trained_once / "config.toml")
    length = len(data.load(config.data, 256)[1])
    assert f"loss {loss:.4f} nats per byte on a text of {length:,} bytes" in ended.out.decode()
    assert f"{loss / math.log(2):.4f} bits per byte, perplexity {math.exp(loss):.3f}" in ended.out.decode()


def test_eval_accepts_another_text(trained_once, command, tmp_path):
    (tmp_path / "text").write_bytes(b"abc de fgh " * 30)
    ended = command("eval", trained_once, "--data", tmp_path / "text")
    model = checkpoint.load(trained_once)
    windows = data.Windows(data.open_text(tmp_path / "text"), 16)
    loss = train.evaluate(model, windows, None, torch.float32, 4)
    assert f"loss {loss:.4f} nats per byte on a text of 330 bytes" in ended.out.decode()


@pytest.mark.parametrize(
    "text, said",
    [
        (b"0123456789", "the text has 10 tokens; context=16 needs at least 17"),
        (b"", "the file is empty"),
        (None, "No such file"),
    ],
)
def test_eval_of_a_text_that_is_too_short_is_one_line(trained_once, command, tmp_path, text, said):
    if text is not None:
        (tmp_path / "text").write_bytes(text)
    assert said in one_line(command("eval", trained_once, "--data", tmp_path / "text"), "eval")
