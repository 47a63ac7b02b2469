"""The statistics of experiments on known curves and samples, and cached trainings."""

import argparse
import concurrent.futures
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from lm import checkpoint
from lm.evaluate import evaluate
from tests.helpers import ROOT


@pytest.fixture
def given(experiments, tmp_path):
    arguments = ["--quick", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--jobs", "2"]
    return experiments("command").options("some", "text", 100, arguments)


def test_a_level_is_reached_where_the_curve_crosses_it(experiment):
    reach = experiment.reach
    xs = [10, 20, 80, 160]
    losses = [4 - math.log2(x) / 2 for x in xs]  # linear in log x
    for x in (10, 15, 33, 80, 150, 160):
        assert reach(xs, losses, 4 - math.log2(x) / 2) == pytest.approx(x)
    assert reach(xs, losses, losses[0] + 0.1) is None  # it starts below
    assert reach(xs, losses, losses[-1] - 0.1) is None
    assert reach(xs, [3, 2, 2.5, 1], 2.2) == pytest.approx(10 * 2**0.8)  # the first time


def test_the_interval_is_students(experiment):
    mean, error = experiment.mean_and_error([1.0, 2.0, 6.0])
    assert (mean, error) == pytest.approx((3, math.sqrt(7 / 3)))
    assert experiment.interval([1.0, 2.0, 6.0]) == pytest.approx((3 - 4.303 * error, 3 + 4.303 * error))
    low, high = experiment.interval([1.0, 3.0])
    assert (low, high) == pytest.approx((2 - 12.706, 2 + 12.706))
    assert experiment.shown([1.0, 2.0, 6.0], 2) == "3.00 ± 1.53"


def test_differences_are_taken_seed_by_seed(experiment):
    rows = [
        {"model": name, "seed": seed, "steps": 8, "held_out_loss": loss}
        for name, seed, loss in (("a", 1, 2.5), ("b", 0, 1.0), ("a", 0, 1.25), ("b", 1, 2.0), ("c", 0, 9.0))
    ]
    rows.append({"model": "a", "seed": 0, "steps": 4, "held_out_loss": 7.0})
    assert experiment.paired(rows[:-1], "a", "b") == [0.25, 0.5]
    assert experiment.paired(rows[:-1], "b", "a") == [-0.25, -0.5]
    assert experiment.last(rows) == {"a": [2.5, 1.25], "b": [1.0, 2.0], "c": [9.0]}
    assert experiment.by_model(rows)["a"] == {8: [2.5, 1.25], 4: [7.0]}


def test_changed_replaces_only_the_given_fields(experiment, mini):
    tables = {"model": {"num_layers": 3}, "moe": {"top_k": 2}, "rope": {"theta": 5.0}}
    made = experiment.changed(mini, **tables, train={"seed": 7}, data={"path": "x"})
    assert (made.model.num_layers, made.model.moe.top_k, made.model.rope.theta) == (3, 2, 5.0)
    assert (made.train.seed, made.data.path, made.model.dim) == (7, "x", mini.model.dim)
    assert experiment.changed(mini) == mini
    with pytest.raises(ValueError, match=r"top_k"):
        experiment.changed(mini, moe={"top_k": 99})


def test_a_short_training_has_a_shorter_warmup(experiment, mini):
    made = experiment.with_steps(mini, 40, 3)
    assert (made.train.steps, made.train.seed, made.train.warmup) == (40, 3, 10)
    assert experiment.with_steps(mini, 1200, 0).train.warmup == mini.train.warmup


def test_each_budget_and_seed_is_trained_once_and_reused(experiment, experiments, given, capsys):
    measure = experiments("balance").load  # worker processes must be able to import it
    base = experiment.base(given)
    configs = {"a": base, "b": experiment.changed(base, moe={"top_k": 1}), "a again": base}
    rows = experiment.train_all(configs, given, {"a": (1 / 4, 1)}, measure=measure)
    names = [(row["model"], row["steps"], row["seed"]) for row in rows]
    assert names == [
        (*one, seed) for seed in (0, 1) for one in (("a", 2), ("a", 8), ("b", 8), ("a again", 8))
    ]
    assert rows[1]["held_out_loss"] == rows[3]["held_out_loss"] != rows[5]["held_out_loss"]
    assert all(row["load_entropy"] > 0.5 for row in rows)
    assert len(list(given.runs.glob("*/config.toml"))) == 6  # one config under two names is trained once
    for row in rows:
        assert row["flops"] > 0 and len(row["batch_max_violation"]) == 2
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"6 trainings in {given.runs}" and not any("kept since" in line for line in lines)
    assert [line.split()[0] for line in lines] == [f"[{number}/6]" for number in range(1, 7)]
    assert {line.partition("] ")[2].partition(":")[0] for line in lines} == {
        f"{name}, {steps} steps, seed {seed}"
        for seed in (0, 1)
        for name, steps in (("a", 2), ("a", 8), ("b", 8))
    }
    before = {path: path.stat().st_mtime_ns for path in given.runs.glob("*/checkpoints/*/model.safetensors")}
    assert experiment.train_all(configs, given, {"a": (1 / 4, 1)}, measure=measure) == rows
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert capsys.readouterr().out.count("(kept since 2") == 6
    experiment.write("some", given, "yes", ["It is so."], [["head"], ["cell"]], rows, configs, more=1)
    found = json.loads((given.out / "some.json").read_text())
    assert found["differ_from_mini"]["b"]["model.moe.top_k"] == 1
    assert found["differ_from_mini"]["a"]["data.path"] == "short.txt"
    assert found["trainings"] == rows and found["answer"] == ["It is so."] and found["more"] == 1
    assert (found["steps"], found["seeds"]) == (8, 2) and found["machine"]["cores"]


def test_a_line_is_printed_as_each_call_ends_and_results_keep_their_order(experiment, capsys):
    slow, fast = concurrent.futures.Future(), concurrent.futures.Future()
    fast.set_result(2)
    seen = []

    def said(name, value):
        if name == "fast":
            seen.append(slow.done())
            slow.set_result(1)
        return f"{name} {value}"

    assert list(experiment.wait({"slow": slow, "fast": fast}, said).items()) == [("slow", 1), ("fast", 2)]
    assert seen == [False] and capsys.readouterr().out == "[1/2] fast 2\n[2/2] slow 1\n"


def test_a_failed_call_ends_the_wait(experiment):
    running, failed = concurrent.futures.Future(), concurrent.futures.Future()
    failed.set_exception(ValueError("it failed"))
    with pytest.raises(ValueError, match="it failed"):
        experiment.wait({"running": running, "failed": failed}, lambda name, value: name)


def test_the_loss_of_a_row_is_that_of_the_saved_model(experiment, given):
    config = experiment.with_steps(experiment.base(given), 2, 0)
    row = experiment.trained(config, given.runs, None)
    model = checkpoint.load(given.runs / experiment.key(config))
    windows = experiment.validation(config)
    loss = evaluate(model, windows, None, torch.float32, config.train.batch_size)
    assert row["held_out_loss"] == pytest.approx(loss, abs=1e-5)


def test_a_folder_with_a_different_training_or_a_truncated_log_is_refused(experiment, given):
    config = experiment.with_steps(experiment.base(given), 2, 0)
    experiment.trained(config, given.runs, None)
    run = given.runs / experiment.key(config)
    log = (run / "metrics.jsonl").read_text()
    for text in ("", log[: log.rindex("{")]):
        (run / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"metrics.jsonl: has no row of step 2 with val_loss; remove "):
            experiment.trained(config, given.runs, None)
    (run / "metrics.jsonl").write_text(log)
    other = experiment.with_steps(config, 2, 1)
    (run / "config.toml").write_text(other.to_toml())
    with pytest.raises(ValueError, match="holds a different training than its name says; remove it"):
        experiment.trained(config, given.runs, None)


def test_a_claim_holds_if_it_holds_for_every_seed(experiment):
    assert experiment.as_claimed([0.1, 0.2, 1], [3, 1, 2]) == "yes"
    assert experiment.as_claimed([0.1, 0.2, 1], [-3, 1, 1]) == "seeds differ"
    assert experiment.as_claimed([0.1, -0.2, 1], [-3, -1, -1]) == "no"
    assert experiment.as_claimed([0.0, 0.0, 0.0]) == "no"


@pytest.mark.parametrize("claims", [[], [[]], [[1.0, 2.0]], [[1.0, 2.0, 3.0], []], [[1.0] * 3, [-1.0] * 2]])
def test_a_claim_measured_with_fewer_than_three_seeds_has_no_verdict(experiment, claims):
    assert experiment.as_claimed(*claims) is None


@pytest.mark.parametrize(
    "arguments, claimed, verdict, said",
    [
        ([], "yes", "yes", "As claimed: yes.\nIt is so.\n"),
        (["--seeds", "4", "--steps", "101"], "seeds differ", "seeds differ", "As claimed: seeds differ.\n"),
        ([], None, None, "No verdict: too few seeds reach the losses compared.\nIt is so.\n"),
        (["--quick"], "yes", None, "No verdict: --quick only tests that the experiment runs.\nhead\n"),
        (["--quick", "--steps", "100", "--seeds", "3"], "no", None, "No verdict: --quick only tests "),
        (
            ["--steps", "99"],
            "yes",
            None,
            "No verdict: 99 steps and 3 seeds; at least 100 and 3 are needed.\n",
        ),
        (
            ["--seeds", "2"],
            "yes",
            None,
            "No verdict: 100 steps and 2 seeds; at least 100 and 3 are needed.\n",
        ),
    ],
)
def test_only_a_run_as_long_as_its_claim_needs_prints_and_writes_a_verdict(
    experiment, experiments, arguments, claimed, verdict, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(experiments("command"), "RESULTS", tmp_path / "results")
    given = experiments("command").options("some", "text", 100, [*arguments, "--runs", str(tmp_path)])
    experiment.write("some", given, claimed, ["It is so."], [["head"], ["cell"]], [], {})
    found = json.loads((given.out / "some.json").read_text())
    assert found["as_claimed"] == verdict and bool(found.get("no_verdict")) == (verdict is None)
    printed = capsys.readouterr().out
    assert printed.startswith(said) and printed.endswith(f"\nResult: {given.out / 'some.json'}\n")
    assert ("It is so." in printed) == (not given.no_verdict)
    assert (given.out == tmp_path / "results") == (not given.no_verdict)


def test_seconds_are_those_of_the_fastest_step_after_the_first(experiment, monkeypatch):
    clock = iter([0, 9, 10, 11, 20, 23, 30, 32, 40, 45, 50, 51.5])  # a: 9, 3, 5; b: 1, 2, 1.5
    monkeypatch.setattr(experiment.time, "perf_counter", lambda: next(clock))

    class Trainer:
        config = argparse.Namespace(train=argparse.Namespace(steps=2))

        def step(self, step):
            assert step <= 2

    monkeypatch.setattr(experiment, "new_trainer", lambda config, folder: Trainer())
    assert experiment.step_seconds({"a": None, "b": None}, 2) == {"a": 3, "b": 1.5}


def test_peak_memory_grows_with_the_batch(experiment, given):
    base = experiment.base(given)
    small, large = (experiment.changed(base, train={"batch_size": size}) for size in (2, 512))
    with experiment.processes(1, calls=1) as pool:
        first, second = pool.map(experiment.peak_bytes, (small, large))
    assert 0 < first < second / 2 and second > 512 * 64 * 4 * 256  # at least the logits


def test_the_module_is_imported_and_a_pool_works_without_what_windows_lacks(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\nsys.modules['resource'] = None\ndel signal.SIGHUP, os.setpgrp\n"
    )
    (tmp_path / "main.py").write_text(
        "from experiments import common\n"
        "if __name__ == '__main__':\n"
        "    with common.processes(1) as pool:\n"
        "        print(pool.submit(abs, -3).result())\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(tmp_path / "main.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "3\n", done.stderr
