"""Every experiment that trains runs end to end with --quick, started as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT

WITH_PICTURE = (
    *("faster", "cache", "balance", "shared_expert", "fineness", "convert"),
    *("architectures", "specialization", "expert_choice", "rope", "rivals", "projects"),
    *("r1_zero", "what_rl_adds", "objectives", "thinking", "distillation", "replay"),
)
COMMAND = [sys.executable, "-c", "import sys; from lm.cli import main; sys.exit(main())", "experiment"]


@pytest.mark.long
@pytest.mark.parametrize("name", WITH_PICTURE)
def test_the_experiment_runs_with_quick(name, tmp_path):
    options = ["--quick", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    done = subprocess.run([*COMMAND, name, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert "No verdict: --quick only tests " in done.stdout and "As claimed" not in done.stdout
    assert found["as_claimed"] is None and not any(line in done.stdout for line in found["answer"])
    assert re.search(r"^\[1/(\d+)\] .*\n(.*\n)*\[\1/\1\] ", done.stdout, re.M)  # a line for each training
    said = f"\nResult: {tmp_path / 'out' / name}.json\nPicture: {tmp_path / 'out' / name}.png\n"
    assert done.stdout.endswith(said)
    head, *cells = found["table"]
    assert cells and all(len(row) == len(head) for row in cells)
    rows = found["trainings"]
    assert {row["seed"] for row in rows} == {0, 1} and max(row["steps"] for row in rows) == 8
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 3000


def test_every_experiment_takes_quick(experiments, capsys):
    names = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {
        "common",
        "cli",
        "command",
        "reasoning",
    }
    assert names == {*WITH_PICTURE, "gate_scale", "training"}
    for name in names:
        with pytest.raises(SystemExit):
            experiments(name).main(["--help"])
        assert f"usage: lm experiment {name} [-h] [--quick] [--out OUT]" in capsys.readouterr().out


def test_a_saved_result_has_at_least_three_seeds():
    for path in (ROOT / "experiments" / "results").glob("*.json"):
        kept = json.loads(path.read_text())
        if "trainings" in kept:
            models = {row["model"] for row in kept["trainings"]}
            seeds = {(row["model"], row["seed"]) for row in kept["trainings"]}
            assert len(seeds) == len(models) * kept["seeds"] and kept["seeds"] >= 3
            assert kept["as_claimed"] in ("yes", "no", "seeds differ") or kept["no_verdict"]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes_and_saves_their_trainings(number, tmp_path):
    options = ["--out", str(tmp_path), "--runs", str(tmp_path / "runs"), "--seeds", "2", "--jobs", "2"]
    command = [*COMMAND, "shared_expert", *options, "--steps", "2000"]
    begun = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "runs").glob("*/metrics.jsonl"))) < 2:  # both are training
        assert begun.poll() is None and time.monotonic() < deadline, begun.communicate()[0]
        time.sleep(0.1)
    time.sleep(1)
    children = Path(f"/proc/{begun.pid}/task/{begun.pid}/children").read_text().split()
    workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.killpg(begun.pid, number)  # as a terminal does with Ctrl-C
    assert begun.wait(60) == 128 + number
    assert len(workers) == 2 and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert len(list((tmp_path / "runs").glob("*/checkpoints/*/model.safetensors"))) == 2
    assert not list(tmp_path.glob("*.json"))
