import json
import os

import pytest

from lm.run import open_run, read_metrics, same_model

ROW = {"step": 1, "tokens": 64, "seconds": 0.5, "loss": 2.0, "max_violations": [0.5]}


def write_rows(folder, rows, end=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_the_rows_are_those_that_were_written(tmp_path):
    assert read_metrics(tmp_path) == []
    rows = [{**ROW, "step": step, "val_loss": 1.5} for step in (1, 2, 3)]
    write_rows(tmp_path, rows)
    assert read_metrics(tmp_path) == rows


@pytest.mark.parametrize("end", ['{"ste', '{"step": 4, "loss": 1.', "{", "\0\0\0\0", "[" * 10**5])
def test_a_row_that_a_crash_cut_short_is_left_out(tmp_path, end):
    write_rows(tmp_path, [ROW], end)
    assert read_metrics(tmp_path) == [ROW]


@pytest.mark.parametrize(
    "row", [1, [], None, {}, {**ROW, "loss": "x"}, {**ROW, "step": None}, {**ROW, "max_violations": 1}]
)
def test_a_row_that_is_something_else_names_the_file_and_the_line(tmp_path, row):
    write_rows(tmp_path, [ROW, row])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is no row of a log"):
        read_metrics(tmp_path)


def test_a_run_is_held_by_one_alone_and_free_again_afterwards(tmp_path):
    run = tmp_path / "deep" / "run"
    with open_run(run, resume=False):
        (run / "config.toml").touch()
        with (
            pytest.raises(ValueError, match=f"run: in use by process {os.getpid()}$"),
            open_run(run, resume=True),
        ):
            raise AssertionError("held twice")
    with open_run(run, resume=True), pytest.raises(ValueError, match="in use"), open_run(run, resume=True):
        raise AssertionError("held twice")


def test_a_run_is_free_again_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError, match="failed"), open_run(tmp_path, resume=False):
        raise RuntimeError("failed")
    with open_run(tmp_path, resume=False):
        pass


def test_equal_models_and_data_can_go_on_with_any_training(tiny):
    same_model(tiny(), tiny(train={"steps": 99, "learning_rate": 0.5, "seed": 3}))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model": {"dim": 32}}, "model.dim is 16 in the run and 32 now; it must stay"),
        (
            {"attention": {"kind": "gqa"}},
            "model.attention.kind is 'mla' in the run and 'gqa' now; it must stay",
        ),
        ({"rope": {"theta": 5.0}}, "model.rope.theta is 10000.0 in the run and 5.0 now; it must stay"),
        ({"data": {"path": "x"}}, "now; it must stay"),
        (
            {"moe": {"arguments": {"depth": 2}}},
            "model.moe.arguments.depth is None in the run and 2 now; it must stay",
        ),
    ],
)
def test_what_differs_is_named_with_both_values(tiny, changes, said):
    with pytest.raises(ValueError) as caught:
        same_model(tiny(), tiny(**changes))
    assert said in str(caught.value)
    with pytest.raises(ValueError):
        same_model(tiny(**changes), tiny())
