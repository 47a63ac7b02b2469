"""The statistics of experiments on known curves and samples, and cached trainings."""

import argparse
import json
import math

import pytest
import torch

from lm import checkpoint
from lm.evaluate import evaluate


@pytest.fixture
def given(experiment, tmp_path):
    arguments = ["--quick", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--jobs", "2"]
    return experiment.options("text", 100, arguments)


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
    assert capsys.readouterr().out.count("kept since") == 0
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
    assert found["as_claimed"] == "yes"
    assert capsys.readouterr().out == "As claimed: yes.\nIt is so.\n"


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
    assert experiment.as_claimed([0.1, 0.2], [3, 1]) == "yes"
    assert experiment.as_claimed([0.1, 0.2], [-3, 1]) == "seeds differ"
    assert experiment.as_claimed([0.1, -0.2], [-3, -1]) == "no"
    assert experiment.as_claimed([0.0, 0.0]) == "no"


def test_a_quick_run_does_not_overwrite_a_result(experiment, tmp_path):
    given = experiment.options("text", 100, ["--quick", "--runs", str(tmp_path)])
    assert given.out == tmp_path / "quick" and given.out.is_dir()
    assert experiment.options("text", 100, ["--runs", str(tmp_path)]).out == experiment.RESULTS


@pytest.mark.parametrize("wrong", [["--steps", "7"], ["--seeds", "1"], ["--seeds", "11"], ["--jobs", "0"]])
def test_numbers_out_of_range_are_refused_in_one_line(experiment, wrong, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        experiment.options("text", 100, [*wrong, "--out", str(tmp_path), "--runs", str(tmp_path)])
    assert stopped.value.code == 2
    assert " ".join(wrong) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("option", ["--out", "--runs"])
def test_a_folder_that_cannot_be_created_is_refused_in_one_line(experiment, option, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    given = {
        "--out": str(tmp_path / "out"),
        "--runs": str(tmp_path / "runs"),
        option: str(tmp_path / "file" / "a"),
    }
    with pytest.raises(SystemExit) as stopped:
        experiment.options("text", 100, [word for pair in given.items() for word in pair])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"lm experiment: error: {option} {given[option]}: cannot be written to: ")


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
