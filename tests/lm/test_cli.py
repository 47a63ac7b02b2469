import ast
import json
import re
import shutil
import sys
from dataclasses import replace

import pytest

from lm import checkpoint, cli, count
from lm.config import Config, preset_names
from lm.run import read_metrics
from tests.helpers import ROOT, content
from tests.lm.command import one_line, run_python


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_loads_no_torch(name):
    check = (
        "import sys\nfrom lm.cli import main\n"
        f"try:\n    main([{name!r}, '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    ended = run_python(check)
    assert f"usage: lm {name}" in ended.stdout and ended.stderr == ""


def test_the_overview_lists_every_command_in_aligned_groups(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    usage, *groups = shown.out.rstrip("\n").split("\n\n")
    assert usage.startswith("usage: lm COMMAND") and len(groups) == len(cli.GROUPS) + 1
    listed, columns = [], set()
    for group in groups:
        title, *lines = group.splitlines()
        assert title in [*cli.GROUPS, "built on lm"] and lines
        for line in lines:
            name, gap, text = re.fullmatch(r"  (\S+)( {2,})(\S.*)", line).groups()
            assert len(line) <= 100 and text.endswith(".")
            listed.append(name)
            columns.add(len(name + gap))
    assert sorted(listed) == sorted([*cli.COMMANDS, "reason"]) and len(columns) == 1
    assert cli.main([]) == 2
    assert capsys.readouterr() == shown


def test_a_field_is_described_by_its_own_comment(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert shown.count("FILE:PATH") == 1
    assert "--max-new-tokens INT tokens per sample (default: 300)" in shown


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


@pytest.mark.parametrize("name, near", [("tran", "train"), ("infoo", "info"), ("xyz", None)])
def test_an_unknown_command_is_one_line_that_names_the_nearest(capsys, name, near):
    assert cli.main([name, "--help"]) == 2
    shown = capsys.readouterr()
    hint = f" (did you mean {near!r}?)" if near else ""
    assert shown.err == f"lm: no command {name!r}{hint}; there are {', '.join([*cli.COMMANDS, 'reason'])}\n"
    assert shown.out == ""


PLUGIN = '''
def main(arguments):
    """Count to ten."""
    if arguments == ["--bad"]:
        raise ValueError("--bad: expected a number")
    print(arguments)
    return 3
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An installed package with a working command, one that fails to load, and one named as a built-in."""
    (tmp_path / "ten_plugin.py").write_text(PLUGIN)
    (tmp_path / "ten-1.0.dist-info").mkdir()
    (tmp_path / "ten-1.0.dist-info" / "METADATA").write_text("Name: ten\nVersion: 1.0\n")
    entries = "ten = ten_plugin:main\nbroken = ten_absent:main\ntrain = ten_plugin:main\n"
    (tmp_path / "ten-1.0.dist-info" / "entry_points.txt").write_text(f"[lm.commands]\n{entries}")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("ten_plugin", None)


@pytest.mark.usefixtures("plugin")
def test_other_packages_add_commands_by_an_entry_point(capsys, monkeypatch, tmp_path):
    assert cli.main(["ten", "--more"]) == 3
    assert capsys.readouterr().out == "['--more']\n"
    assert cli.main(["ten", "--bad"]) == 2
    assert capsys.readouterr().err == "lm ten: --bad: expected a number\n"
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out.rstrip()
    group = next(part for part in shown.split("\n\n") if part.startswith("from other packages"))
    lines = group.splitlines()
    assert (
        "built on lm\n  reason " in shown
        and lines[0] == "from other packages"
        and "  ten         Count to ten." in lines
    )
    assert "  broken      (cannot be loaded: No module named 'ten_absent')" in lines and len(lines) == 3
    assert cli.main(["tenn"]) == 2
    assert capsys.readouterr().err.startswith("lm: no command 'tenn' (did you mean 'ten'?); there are ")
    assert cli.main(["broken"]) == 2
    said = "ten_absent:main cannot be loaded: No module named 'ten_absent'"
    assert capsys.readouterr().err == f"lm broken: {said}\n"
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--resume"]) == 2  # lm's own train
    assert capsys.readouterr().err == "lm train: runs/toy: no run to resume\n"


SHADOWS = ("statistics", "random", "types", "json", "queue")
SHADOWED = """
import sys
from lm.cli import main
for arguments in {commands!r}:
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    assert not status, (arguments, status)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "commands",
    [
        [["experiment", "balance", "--help"]],
        [["exercise", "list"], ["new", "router", "some_router"]],
        [
            ["train", "--resume", "--out-dir", "run", "--trust-code", "--train.steps", "13"],
            ["report", "run", "--trust-code"],
            ["generate", "run", "--trust-code", "--max-new-tokens", "0"],
            ["eval", "run", "--trust-code"],
            ["explore", "plain"],
        ],
    ],
    ids=lambda commands: commands[0][0],
)
def test_files_in_the_working_folder_do_not_replace_pythons_modules(trained, commands):
    folder = trained.parent
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working folder')\n")
    (folder / "my_router.py").write_text(OWN_ROUTER)
    shutil.copytree(trained, folder / "plain")
    config = folder / "run" / "config.toml"
    config.write_text(config.read_text().replace('router = "sigmoid"', 'router = "my_router:Mine"'))
    shutil.copytree(ROOT / "exercises", folder / "exercises")  # a copy: `lm new` writes there
    for name in ("experiments", "moe", "mla", "lm", "tests"):
        (folder / name).symlink_to(ROOT / name)
    run_python(SHADOWED.format(commands=commands), "-P", cwd=folder)


def test_experiments_are_listed_with_their_questions(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["experiment"]) == 0
    listed = capsys.readouterr().out
    for path in (ROOT / "experiments").glob("*.py"):
        if path.stem not in ("common", "cli", "command", "reasoning"):
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


def test_an_unfinished_experiment_does_not_affect_the_others(capsys, monkeypatch, tmp_path):
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


def test_experiments_need_a_clone_of_the_project(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["experiment", "balance"]) == 2
    said = f"lm experiment: {tmp_path}/experiments: no such folder; run this in a clone of the project\n"
    assert capsys.readouterr().err == said
    (tmp_path / "experiments").mkdir()
    assert cli.main(["experiment", "balance"]) == 2
    assert capsys.readouterr().err.startswith(f"lm experiment: {tmp_path}/experiments: no experiments here")


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
def test_invalid_options_of_train_are_reported_by_the_parser(tmp_path, monkeypatch, capsys, arguments, said):
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
        (["--out-dir", "other"], "other: neither empty nor a run"),
        (["--out-dir", "text.txt"], "text.txt: is a file; expected a folder"),
        (["--out-dir", "text.txt/run"], "text.txt/run: cannot be written: Not a directory"),
        (["--device", "cuda:77"], "device 'cuda:77' was not found; available: "),
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
def test_invalid_input_of_train_is_one_line_and_nothing_is_written(
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


@pytest.mark.parametrize("name", ["generate", "chat", "eval", "report"])
def test_what_is_not_a_run_is_one_line(command, tmp_path, trained, name):
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
def test_a_missing_argument_is_reported_by_the_parser(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name])
    assert ended.value.code == 2 and "Traceback" not in capsys.readouterr().err


# --- train


def test_each_run_gets_its_own_folder_and_resume_finds_the_last(tiny, options, command, tmp_path):
    arguments = options(tiny(train={"steps": 2}))
    for name in ("nano", "nano-2"):
        ended = command("train", *arguments, cwd=tmp_path, before=("quick",))
        assert ended.code == 0 and f"report: runs/{name}/report.html" in ended.out.decode()
    more = ["--resume", "--train.steps", "4"]
    ended = command("train", "--preset", "nano", *more, cwd=tmp_path, before=("quick",))
    assert ended.code == 0
    assert b"resuming from runs/nano-2/checkpoints/step-000002 (2 of 4 steps)" in ended.out
    assert [len(read_metrics(tmp_path / "runs" / name)) for name in ("nano", "nano-2")] == [2, 4]


def test_training_ends_with_a_report(tiny, options, command, tmp_path):
    ended = command("train", *options(tiny(train={"steps": 1})), "--out-dir", tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    assert f"report: {tmp_path / 'run' / 'report.html'}" in ended.out.decode()
    assert (tmp_path / "run" / "report.html").stat().st_size > 50_000


def test_options_change_single_values_of_the_preset(command, text_file, tmp_path):
    numbers = {"steps": 1, "context": 16, "eval_tokens": 16}
    given = "--train.steps=1 --train.context 16 --train.eval_tokens 16 --train.dtype float32 "
    given += "--seed 7 --device=cpu --model.moe.top_k 1 --model.tie-embeddings --data"
    run = tmp_path / "deep" / "run"
    arguments = ["--preset", "nano", "--out-dir", run, *given.split(), text_file]
    assert command("train", *arguments, before=("quick",)).code == 0
    nano = Config.preset("nano")
    model = replace(nano.model, tie_embeddings=True, moe=replace(nano.model.moe, top_k=1))
    training = replace(nano.train, **numbers, dtype="float32", seed=7, device="cpu")
    want = Config(model, training, replace(nano.data, path=str(text_file)))
    assert Config.load(run / "config.toml") == want


def test_your_own_toml_file_is_a_preset(tiny, command, tmp_path):
    (tmp_path / "mine.toml").write_text(tiny(train={"steps": 2}).to_toml())
    assert command("train", "--preset", "mine.toml", cwd=tmp_path, before=("quick",)).code == 0
    assert Config.load(tmp_path / "runs" / "mine" / "config.toml") == tiny(train={"steps": 2})


OWN_ROUTER = """
from moe import SigmoidRouter
class Mine(SigmoidRouter):
    pass
"""


def test_a_router_in_the_working_folder_trains_and_later_needs_trust(tiny, options, command, tmp_path):
    (tmp_path / "my_router.py").write_text(OWN_ROUTER)
    arguments = options(tiny(moe={"router": "my_router:Mine"}, train={"steps": 2}))
    ended = command("train", *arguments, "--out-dir", "run", cwd=tmp_path, before=("quick",))
    assert ended.code == 0, ended.err
    for name, more in (("generate", ["--max-new-tokens", "3"]), ("eval", []), ("report", [])):
        said = one_line(command(name, "run", *more, cwd=tmp_path), name)
        assert said.endswith(f"(--trust-code): lm {' '.join([name, 'run', *more])} --trust-code\n")
        assert command(name, "run", *more, "--trust-code", cwd=tmp_path).code == 0
    said = one_line(command("train", "--resume", "--out-dir", "run", cwd=tmp_path), "train")
    assert said.endswith(": lm train --resume --out-dir run --trust-code\n")
    more = ["--trust-code", "--train.steps", "3"]
    assert command("train", "--resume", "--out-dir", "run", *more, cwd=tmp_path, before=("quick",)).code == 0
    (tmp_path / "my_router.py").write_text("raise SystemExit('lm info runs no code')")
    ended = command("info", "run", cwd=tmp_path)
    assert ended.code == 0 and b"not counted: model.moe.router my_router:Mine is your own code" in ended.out


def test_resuming_with_fewer_steps_than_done_is_one_line(trained, command):
    ended = command("train", "--resume", "--out-dir", trained, "--train.steps", "7")
    assert one_line(ended, "train").endswith("train.steps 7 is less than the 12 steps already done\n")


def test_damage_is_reported_in_one_line(trained, command):
    path = trained / "checkpoints" / "step-000012" / "model.safetensors"
    path.write_bytes(b"")
    ended = command("generate", trained, "--max-new-tokens", "2")
    assert ended.code == 0
    said = f"damaged checkpoint skipped: {path}: is not what was written (its sha256 differs)"
    assert ended.err == f"lm: warning: {said}\n"
    (trained / "checkpoints" / "step-000010" / "state.json").unlink()
    ended = command("generate", trained, "--max-new-tokens", "2")
    assert ended.code == 2
    assert ended.err.splitlines()[-1] == f"lm generate: {trained}: every checkpoint is damaged"
    assert ended.err.count("\n") == 3 and "Traceback" not in ended.err


# --- report, info


def test_report_is_written_again(trained, command):
    before = content(trained)
    (trained / "report.html").unlink()
    (trained / "loss.png").unlink()
    ended = command("report", trained)
    assert (ended.code, ended.err, ended.out.decode()) == (0, "", f"{trained / 'report.html'}\n")
    assert content(trained) == before


@pytest.mark.parametrize(
    "row", [b"[1]", b"7", b'{"step": 1}', b'{"step": "1", "loss": null}', b"\xff\xfe", b"[" * 10**5]
)
def test_report_of_an_invalid_log_is_one_line(trained, command, row):
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


def test_info_counts_the_cache_in_fp8_and_draws_a_chart(tmp_path, capsys):
    picture = tmp_path / "parameters.png"
    assert cli.main(["info", "deepseek-v3", "--dtype", "fp8", "--plot", str(picture)]) == 0
    shown = capsys.readouterr()
    assert f"{61 * 656:,}" in shown.out and shown.err == ""
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["info", "nano", "--json", "--plot", str(picture)]) == 0
    assert json.loads(capsys.readouterr().out)["cache_dtype"] == "bf16"


def test_invalid_input_of_info_is_one_line(trained, command):
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
    run_python(check)
