import ast
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lm import checkpoint, cli, count, data, train
from lm.config import Config, preset_names
from lm.inference import generate as decode
from lm.run import read_metrics
from tests.helpers import ROOT, content

SCRIPT = "import sys; from lm.cli import main; sys.exit(main())"  # as the installed `lm` script


def lm(*arguments, **how):
    """`lm` as a process from scratch."""
    how = {
        "capture_output": True,
        **how,
        "env": {**os.environ, "PYTHONPATH": str(ROOT), **how.get("env", {})},
    }
    return subprocess.run([sys.executable, "-P", "-c", SCRIPT, *arguments], **how)


def one_line(ended, name, code=2):
    """The process ended with that status and one line -> the line"""
    assert ended.code == code, ended.err
    assert ended.err.startswith(f"lm {name}: ") and ended.err.endswith("\n") and ended.err.count("\n") == 1, (
        ended.err
    )
    return ended.err


# --- help, and options that are wrong


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_loads_no_torch(name):
    check = (
        "import sys\nfrom lm.cli import main\n"
        f"try:\n    main([{name!r}, '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", check],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
    assert f"usage: lm {name}" in ended.stdout and ended.stderr == ""


def test_the_overview_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr()
    assert all(f"  lm {name}" in shown.out for name in cli.COMMANDS) and shown.err == ""
    assert cli.main([]) == 2


def test_help_of_train_names_the_presets_and_every_section(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(name in shown for name in preset_names())
    for option in (
        "--out-dir",
        "--resume",
        "--model.moe.top-k",
        "--model.attention.kind",
        "--train.steps",
        "--data.path",
    ):
        assert option in shown


def test_a_command_that_is_none_is_one_line(capsys):
    assert cli.main(["tran"]) == 2
    assert capsys.readouterr().err.startswith("lm: no command 'tran'; there are train, generate")


def test_experiments_are_listed_with_their_questions(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["experiment"]) == 0
    listed = capsys.readouterr().out
    for path in (ROOT / "experiments").glob("*.py"):
        if path.stem != "common":
            question = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
            assert f"  {path.stem} " in listed and question in listed
    assert cli.main(["experiment", "balanse"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lm experiment: no experiment 'balanse' (did you mean 'balance'?)")
    assert cli.main(["experiment", "common"]) == 2
    with pytest.raises(SystemExit) as stopped:
        cli.main(["experiment", "balance", "--seeds", "1"])
    assert stopped.value.code == 2 and "--seeds 1" in capsys.readouterr().err.splitlines()[-1]


GOOD = b'"""Is it?"""\n\n\ndef main(arguments):\n    print(arguments)\n'


def test_an_experiment_of_ones_own_that_is_not_done_leaves_the_others_alone(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / "experiments").mkdir()
    for name, text in {"bare": b"x = 1", "broken": b"x = (", "odd": b"\xff", "good": GOOD}.items():
        (tmp_path / "experiments" / f"{name}.py").write_bytes(text)
    assert cli.main(["experiment"]) == 0
    said = capsys.readouterr().out
    assert "  bare" in said and "  good            Is it?" in said
    assert "  broken          (cannot be read" in said
    assert cli.main(["experiment", "good", "--more"]) == 0
    assert capsys.readouterr().out == "['--more']\n"
    for name, reason in {"bare": "has no main", "broken": "'(' was never closed", "odd": ""}.items():
        assert cli.main(["experiment", name]) == 2
        assert capsys.readouterr().err.startswith(f"lm experiment: experiments/{name}.py: {reason}")
    assert cli.main(["experiment", "--quick"]) == 2
    assert "the experiment's name comes first" in capsys.readouterr().err


def test_experiments_are_not_looked_for_elsewhere(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["experiment", "balance"]) == 2
    assert capsys.readouterr().err.strip().endswith("no experiments here; run this in the project's folder")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--train.steps", "1e3"], "train.steps"),
        (["--train.steps", "true"], "train.steps"),
        (["--train.steps", "5.5"], "train.steps"),
        (["--train.steps"], "train.steps"),
        (["--model", "3"], "--model"),
        (["--train.learning-rat", "1"], "--train.learning-rate"),
        (["--train.batch-size", "0"], "train.batch_size: a whole number >= 1, got 0"),
        (["--train.save-every", "0"], "train.save_every: a whole number >= 1, got 0"),
        (["--train.learning-rate", "inf"], "train.learning_rate: a finite number >= 0, got inf"),
        (["--train.learning-rate", "-0.001"], "train.learning_rate: a finite number >= 0, got -0.001"),
        (["--train.seed", "-1"], "train.seed: a whole number 0..9223372036854775807, got -1"),
        (["--seed", str(2**64)], f"train.seed: a whole number 0..9223372036854775807, got {2**64}"),
        (
            ["--model.moe.num-experts", "6", "--model.moe.num-groups", "4"],
            "num_experts 6 is not a multiple of num_groups 4",
        ),
        (["--model.moe.top-k", "99"], "model.moe.top_k 99 is more than"),
        (["--model.attention.v-head-dim", "0"], "model.attention.v_head_dim: a whole number >= 1, got 0"),
        (["--train.dtype", "fp16"], "train.dtype: one of auto, float32, bfloat16, got 'fp16'"),
        (["extra"], "extra"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_options_of_train_are_the_parsers_to_tell(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--preset", "nano", *arguments])
    assert ended.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in shown and "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--preset", "nan"], "no preset 'nan' (did you mean 'nano'?)"),
        (["--preset", "absent.toml"], "absent.toml: not a readable TOML file"),
        (["--preset", "bad.toml"], "bad.toml: unknown key 'train.step' (did you mean 'steps'?)"),
        (["--resume"], "runs/toy: no run to resume"),
        (["--resume", "--out-dir", "absent"], "absent: no run to resume"),
        (["--resume", "--out-dir", "other"], "other: no run to resume"),
        (["--out-dir", "other"], "other: is not empty and no run"),
        (["--out-dir", "text.txt"], "text.txt: is a file; a run needs a folder"),
        (["--out-dir", "text.txt/run"], "text.txt/run: cannot be written: Not a directory"),
        (["--device", "cuda:77"], "device 'cuda:77' was not found; here there is: "),
        (["--data", "other"], "other: cannot be read: Is a directory"),
        (["--data", "absent"], "absent: cannot be read: No such file or directory"),
        (["--data=absent"], "absent: cannot be read: No such file or directory"),
        (["--data", "empty"], "empty: the file is empty"),
        (["--data", "short"], "the text has 2 tokens; context=64 needs at least 65"),  # and one is held out
        (["--data.validation", "short"], "the text has 3 tokens; context=64 needs at least 65"),
        (["--model.vocab-size", "100", "--data", "text.txt"], "token 104; vocab_size=100"),
        (
            ["--model.moe.router", "nocolon"],
            "model.moe.router 'nocolon': expected a built-in name or \"module:Class\"",
        ),
        (
            ["--model.moe.router", "no_module:X"],
            "model.moe.router 'no_module:X': no_module cannot be imported",
        ),
        (
            ["--model.moe.router", "os:getcwd"],
            "model.moe.router 'os:getcwd': 'getcwd' in os is not an nn.Module class",
        ),
        (
            ["--model.attention.kind", "os:getcwd"],
            "model.attention.kind 'os:getcwd': 'getcwd' in os is not an nn.Module class",
        ),
        (["--model.moe.num-groups", "8", "--model.moe.top-k", "1"], "this router needs 2 a group"),
        (["--model.attention.qk-rope-head-dim", "5"], "dim=5 must be even"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_of_train_is_one_line_and_nothing_is_written(
    command, text_file, tmp_path, arguments, said
):
    shutil.copy(text_file, tmp_path / "text.txt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("abc")
    (tmp_path / "bad.toml").write_text("[train]\nstep = 3\n")
    before = content(tmp_path)
    preset = [] if "--preset" in arguments or "--resume" in arguments else ["--preset", "nano"]
    if not any(argument.startswith("--data") for argument in arguments):
        arguments = [*arguments, "--data", "text.txt"]
    ended = command("train", *preset, *arguments, cwd=tmp_path)
    assert said in one_line(ended, "train")
    assert content(tmp_path) == before and not (tmp_path / "runs").exists()


# --- train


def test_runs_get_folders_of_their_own_and_resume_finds_the_last(tiny, options, command, quick, tmp_path):
    arguments = options(tiny(train={"steps": 2}))
    for name in ("nano", "nano-2"):
        ended = command("train", *arguments, cwd=tmp_path, before=quick)
        assert ended.code == 0 and f"report: runs/{name}/report.html" in ended.out.decode()
    more = ["--resume", "--train.steps", "4"]
    ended = command("train", "--preset", "nano", *more, cwd=tmp_path, before=quick)
    assert ended.code == 0
    assert b"going on from runs/nano-2/checkpoints/step-000002 (2 of 4 steps)" in ended.out
    assert [len(read_metrics(tmp_path / "runs" / name)) for name in ("nano", "nano-2")] == [2, 4]


def test_training_ends_with_a_report(tiny, options, command, tmp_path):
    ended = command("train", *options(tiny(train={"steps": 1})), "--out-dir", tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    assert f"report: {tmp_path / 'run' / 'report.html'}" in ended.out.decode()
    assert (tmp_path / "run" / "report.html").stat().st_size > 50_000


def test_options_change_single_numbers_of_the_preset(command, quick, text_file, tmp_path):
    numbers = {"steps": 1, "context": 16, "eval_tokens": 16}
    given = "--train.steps=1 --train.context 16 --train.eval_tokens 16 --train.dtype float32 "
    given += "--seed 7 --device=cpu --model.moe.top_k 1 --model.tie-embeddings --data"
    run = tmp_path / "deep" / "run"
    assert (
        command("train", "--preset", "nano", "--out-dir", run, *given.split(), text_file, before=quick).code
        == 0
    )
    nano = Config.preset("nano")
    model = replace(nano.model, tie_embeddings=True, moe=replace(nano.model.moe, top_k=1))
    training = replace(nano.train, **numbers, dtype="float32", seed=7, device="cpu")
    want = Config(model, training, replace(nano.data, path=str(text_file)))
    assert Config.load(run / "config.toml") == want


def test_a_toml_file_of_ones_own_is_a_preset(tiny, command, quick, tmp_path):
    (tmp_path / "mine.toml").write_text(tiny(train={"steps": 2}).to_toml())
    assert command("train", "--preset", "mine.toml", cwd=tmp_path, before=quick).code == 0
    assert Config.load(tmp_path / "runs" / "mine" / "config.toml") == tiny(train={"steps": 2})


OWN_ROUTER = """
from moe import SigmoidRouter
class Mine(SigmoidRouter):
    pass
"""


def test_a_router_in_the_working_folder_trains_and_later_needs_trust(tiny, options, command, quick, tmp_path):
    (tmp_path / "my_router.py").write_text(OWN_ROUTER)
    arguments = options(tiny(moe={"router": "my_router:Mine"}, train={"steps": 2}))
    ended = command("train", *arguments, "--out-dir", "run", cwd=tmp_path, before=quick)
    assert ended.code == 0, ended.err
    for name, more in (("generate", ["--max-new-tokens", "3"]), ("eval", []), ("report", [])):
        assert "--trust-code" in one_line(command(name, "run", *more, cwd=tmp_path), name)
        assert command(name, "run", *more, "--trust-code", cwd=tmp_path).code == 0
    assert "--trust-code" in one_line(command("train", "--resume", "--out-dir", "run", cwd=tmp_path), "train")
    more = ["--trust-code", "--train.steps", "3"]
    assert command("train", "--resume", "--out-dir", "run", *more, cwd=tmp_path, before=quick).code == 0
    assert "only built-in" in one_line(command("info", "run", cwd=tmp_path), "info")


def test_a_finished_run_is_done_and_fewer_steps_are_refused(trained, command):
    ended = command("train", "--resume", "--out-dir", trained, "--train.steps", "7")
    assert one_line(ended, "train").endswith("train.steps 7 is less than the 12 steps already done\n")


def test_damage_is_told_in_one_line(trained, command):
    path = trained / "checkpoints" / "step-000012" / "model.safetensors"
    path.write_bytes(b"")
    ended = command("generate", trained, "--max-new-tokens", "2")
    assert ended.code == 0
    assert (
        ended.err
        == f"lm: warning: checkpoint passed over: {path}: is not what was written (its sha256 differs)\n"
    )
    (trained / "checkpoints" / "step-000010" / "state.json").unlink()
    ended = command("generate", trained, "--max-new-tokens", "2")
    assert (
        ended.code == 2
        and ended.err.splitlines()[-1] == f"lm generate: {trained}: every checkpoint is damaged"
    )
    assert ended.err.count("\n") == 3 and "Traceback" not in ended.err


# --- generate


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--temperature", "inf"], "temperature=inf must be finite and at least 0"),
        (["--temperature", "-1"], "temperature=-1.0 must be finite and at least 0"),
        (["--temperature", "nan"], "temperature=nan must be finite"),
        (["--top-k", "-1"], "top_k=-1 must be at least 1"),
        (["--top-k", "0"], "top_k=0 must be at least 1"),
        (["--top-p", "1.5"], "top_p=1.5 must lie above 0 and at most at 1"),
        (["--max-new-tokens", "-1"], "max_new_tokens=-1 must be at least 0"),
        (["--seed", "-1"], "seed=-1 must lie in 0.."),
        (["--seed", str(2**70)], "must lie in 0.."),
        (["--num-samples", "0"], "num_samples=0 must be at least 1"),
        (["--device", "cuda:77"], "device 'cuda:77' was not found"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "FILE:missing"], "missing: cannot be read: No such file or directory"),
        (["--prompt", "FILE:."], "cannot be read: Is a directory"),
        (["--prompt", "FILE:"], "cannot be read: Is a directory"),
        (["--prompt", "FILE:empty"], "the prompt is empty"),
        (["--prompt", "-"], "the prompt is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_of_generate_is_one_line(trained_once, command, tmp_path, arguments, said):
    (tmp_path / "empty").touch()
    ended = command("generate", trained_once, *arguments, cwd=tmp_path)
    assert said in one_line(ended, "generate") and ended.out == b""


@pytest.mark.parametrize("name", ["generate", "chat", "eval", "report"])
def test_what_is_no_run_is_one_line(command, tmp_path, trained, name):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    shutil.rmtree(trained / "checkpoints")
    for folder, said in (
        ("absent", "is not a folder"),
        ("file", "is not a folder"),
        ("empty", "holds no config.toml"),
        (trained, "no checkpoint yet"),
    ):
        assert said in one_line(command(name, folder, cwd=tmp_path), name)


@pytest.mark.parametrize("name", ["generate", "chat", "eval", "report", "info"])
def test_a_missing_argument_is_the_parsers_to_tell(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name])
    assert ended.value.code == 2 and "Traceback" not in capsys.readouterr().err


def expected(run, prompt, new, **options):
    """What the library writes, as bytes up to the end of the text."""
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
    arguments = [
        "generate",
        trained_once,
        "--max-new-tokens",
        20,
        "--seed",
        5,
        "--top-k",
        50,
        "--top-p",
        0.9,
        "--temperature",
        1.5,
    ]
    ended = command(*arguments, "--num-samples", 2)
    options = {"temperature": 1.5, "top_k": 50, "top_p": 0.9}
    first, second = (expected(trained_once, b"\n", 20, seed=seed, **options) for seed in (5, 6))
    assert ended.out == b"--- 1\n" + first + b"--- 2\n" + second
    assert command(*arguments).out == first
    unseeded = [command("generate", trained_once, "--max-new-tokens", 50).out for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_prompts_come_from_files_and_standard_input_too(trained_once, command, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xff\x00\xfe abc\n")
    greedy = ["generate", trained_once, "--max-new-tokens", 5, "--temperature", 0]
    want = expected(trained_once, b"\xff\x00\xfe abc\n", 5, temperature=0)
    assert command(*greedy, "--prompt", "FILE:prompt", cwd=tmp_path).out == want
    assert command(*greedy, "--prompt", "-", stdin=tmp_path / "prompt").out == want


def test_several_prompts_are_gone_on_from_as_each_alone(trained_once, command):
    options = ["--max-new-tokens", "20", "--temperature", "0"]
    prompts = ["abc", "to be or not", "x"]
    ended = command("generate", trained_once, *options, *(a for p in prompts for a in ("--prompt", p)))
    alone = [command("generate", trained_once, *options, "--prompt", prompt).out for prompt in prompts]
    assert ended.out == b"".join(b"--- %d\n" % number + text for number, text in enumerate(alone, 1))
    assert len(set(alone)) == 3


def test_a_prompt_longer_than_the_context_is_taken(trained_once, command, tmp_path):
    prompt = b"abcdefgh " * 100
    (tmp_path / "prompt").write_bytes(prompt)
    ended = command(
        "generate",
        trained_once,
        "--prompt",
        f"FILE:{tmp_path / 'prompt'}",
        "--max-new-tokens",
        5,
        "--temperature",
        0,
    )
    assert ended.out == expected(trained_once, prompt, 5, temperature=0)


def test_bytes_are_bytes_whatever_the_locale(trained_once):
    prompt = b"\xff\xfe \xc3\xa9 "
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = lm("generate", str(trained_once), "--prompt", prompt, "--max-new-tokens", "0", env=ascii_only)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, prompt + b"\n", b"")


def test_a_reader_that_goes_away_ends_generate_without_a_traceback(trained_once):
    command = ["bash", "-c", '"$@" | head -1; exit "${PIPESTATUS[0]}"', "bash", sys.executable, "-c", SCRIPT]
    arguments = ["generate", str(trained_once), "--max-new-tokens", "100000"]
    ended = subprocess.run(
        [*command, *arguments], capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert ended.returncode == 141 and ended.stderr == b""


def test_ctrl_c_ends_generate_without_a_traceback(trained_once, command):
    # the likeliest token each time: one drawn may be the end of the text at once
    pid = command.start("generate", trained_once, "--max-new-tokens", 10**6, "--temperature", 0)
    command.wait_for(
        lambda: (command.folder / "stdout").exists() and (command.folder / "stdout").stat().st_size > 20
    )
    os.kill(pid, signal.SIGINT)
    ended = command.wait()
    assert (ended.code, ended.err) == (130, "")


# --- chat


def test_chat_goes_on_from_all_that_was_said(trained_once, command, tmp_path):
    (tmp_path / "said").write_text("abc\nde fé\n\nnever read\n")
    ended = command("chat", trained_once, "--max-new-tokens", 8, "--temperature", 0, stdin=tmp_path / "said")
    assert (ended.code, ended.err) == (0, "")
    first = expected(trained_once, b"abc\n", 8, temperature=0)
    history = first + "de fé\n".encode()
    second = expected(trained_once, history, 8, temperature=0)
    answers = ended.out.split(b"> ")[1:]
    assert b"> ".join(answers) == first.removeprefix(b"abc\n") + b"> " + second.removeprefix(history) + b"> "


def test_chat_ends_with_its_input_and_refuses_wrong_options(trained_once, command):
    ended = command("chat", trained_once)
    assert ended.code == 0 and ended.out.startswith(b"Say something")
    assert "temperature=inf" in one_line(command("chat", trained_once, "--temperature", "inf"), "chat")
    assert "top_k=0" in one_line(command("chat", trained_once, "--top-k", 0), "chat")


def test_chat_takes_bytes_that_are_no_text(trained_once, command, tmp_path):
    (tmp_path / "said").write_bytes(b"\xff\xfe\n")
    ended = command("chat", trained_once, "--max-new-tokens", 4, "--temperature", 0, stdin=tmp_path / "said")
    assert (ended.code, ended.err) == (0, "")
    assert expected(trained_once, b"\xff\xfe\n", 4, temperature=0).removeprefix(b"\xff\xfe\n") in ended.out


# --- eval, report, info


def test_eval_tells_the_loss_of_the_whole_held_out_text(trained_once, command):
    ended = command("eval", trained_once)
    assert (ended.code, ended.err) == (0, "")
    loss = read_metrics(trained_once)[-1]["val_loss"]
    config = Config.load(trained_once / "config.toml")
    length = len(data.load(config.data, 256)[1])
    assert f"loss {loss:.4f} nats a byte on a text of {length:,} bytes" in ended.out.decode()
    assert f"{loss / math.log(2):.4f} bits a byte, perplexity {math.exp(loss):.3f}" in ended.out.decode()


def test_eval_takes_another_text(trained_once, command, tmp_path):
    (tmp_path / "text").write_bytes(b"abc de fgh " * 30)
    ended = command("eval", trained_once, "--data", tmp_path / "text")
    model = checkpoint.load(trained_once)
    windows = data.Windows(data.open_text(tmp_path / "text"), 16)
    assert (
        f"loss {train.evaluate(model, windows, None, torch.float32, 4):.4f} nats a byte on a text of 330 "
        in ended.out.decode()
    )


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


def test_report_is_made_anew(trained, command):
    before = content(trained)
    (trained / "report.html").unlink()
    (trained / "loss.png").unlink()
    ended = command("report", trained)
    assert (ended.code, ended.err, ended.out.decode()) == (0, "", f"{trained / 'report.html'}\n")
    assert content(trained) == before


@pytest.mark.parametrize(
    "row", [b"[1]", b"7", b'{"step": 1}', b'{"step": "1", "loss": null}', b"\xff\xfe", b"[" * 10**5]
)
def test_report_of_a_strange_log_is_one_line(trained, command, row):
    (trained / "metrics.jsonl").write_bytes(row + b"\n")
    assert "metrics.jsonl" in one_line(command("report", trained), "report")


def test_info_counts_presets_and_runs(trained_once, capsys):
    assert cli.main(["info", "nano"]) == 0
    assert f"{count.total_parameters(Config.preset('nano').model):,}" in capsys.readouterr().out
    assert cli.main(["info", str(trained_once), "--context", "1000", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = checkpoint.load(trained_once)
    assert facts["parameters"]["total"] == sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    assert facts["context"] == 1000
    caches = model.new_caches(1, 10)
    assert facts["cache_elements_per_token"] == sum(cache.entries.numel() for cache in caches) // 10


def test_info_tells_the_cache_in_another_dtype_and_draws(tmp_path, capsys):
    picture = tmp_path / "parameters.png"
    assert cli.main(["info", "deepseek-v3", "--dtype", "fp8", "--plot", str(picture)]) == 0
    shown = capsys.readouterr()
    assert f"{61 * 656:,}" in shown.out and shown.err == ""
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["info", "nano", "--json", "--plot", str(picture)]) == 0
    assert json.loads(capsys.readouterr().out)["cache_dtype"] == "bf16"


def test_info_of_what_is_neither_is_one_line(trained, command):
    assert "no preset 'nan' (did you mean 'nano'?); there are " in one_line(command("info", "nan"), "info")
    assert "context=0 must be at least 1" in one_line(command("info", "nano", "--context", "0"), "info")
    assert "dtype 'x'; there are bf16, fp16" in one_line(command("info", "nano", "--dtype", "x"), "info")
    for path in ("a.jpg", "absent/a.png"):
        assert f"plot={path}: " in one_line(command("info", "nano", "--plot", path), "info")
    (trained / "config.toml").write_text("[model]\ndim = 0\n")
    assert "config.toml: model.dim: a whole number >= 1, got 0" in one_line(command("info", trained), "info")


def test_info_needs_no_torch():
    check = (
        "import sys; from lm.cli import main; main(['info', 'nano'])\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", check],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
