"""The options of experiments, and where their results go."""

import pytest


@pytest.mark.parametrize(
    "arguments, folder",
    [
        (["--quick"], "quick"),
        (["--quick", "--steps", "100", "--seeds", "3"], "quick"),
        (["--steps", "99"], "short"),
        (["--seeds", "2"], "short"),
    ],
)
def test_a_run_without_a_verdict_does_not_overwrite_a_result(
    experiment, arguments, folder, tmp_path, capsys, monkeypatch
):
    given = experiment.options("some", "text", 100, [*arguments, "--runs", str(tmp_path)])
    assert given.out == tmp_path / folder and given.out.is_dir()
    (tmp_path / "link").symlink_to(experiment.RESULTS)
    monkeypatch.chdir(experiment.RESULTS.parent)
    for out in (experiment.RESULTS, experiment.RESULTS / "deeper", "results", tmp_path / "link"):
        with pytest.raises(SystemExit) as stopped:
            experiment.options("some", "text", 100, [*arguments, "--runs", str(tmp_path), "--out", str(out)])
        assert stopped.value.code == 2
        assert f"--out {out}: only for runs with a verdict" in capsys.readouterr().err.splitlines()[-1]
    assert not (experiment.RESULTS / "deeper").exists()


def test_a_full_run_writes_to_the_results_by_default(experiment, tmp_path):
    given = experiment.options("some", "text", 100, ["--runs", str(tmp_path)])
    assert (given.out, given.steps, given.seeds, given.no_verdict) == (experiment.RESULTS, 100, 3, "")
    longer = ["--steps", "200", "--seeds", "5", "--runs", str(tmp_path)]
    assert experiment.options("some", "text", 100, longer).out == experiment.RESULTS


def test_a_quick_run_takes_its_own_steps_and_seeds_unless_told(experiment, tmp_path):
    quick = ["--quick", "--runs", str(tmp_path)]
    given = experiment.options("some", "text", 100, quick)
    assert (given.steps, given.seeds) == (8, 2)
    given = experiment.options("some", "text", 100, [*quick, "--steps", "12", "--seeds", "3"])
    assert (given.steps, given.seeds) == (12, 3)


@pytest.mark.parametrize("wrong", [["--steps", "7"], ["--seeds", "1"], ["--seeds", "11"], ["--jobs", "0"]])
def test_numbers_out_of_range_are_refused_in_one_line(experiment, wrong, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        experiment.options("some", "text", 100, [*wrong, "--out", str(tmp_path), "--runs", str(tmp_path)])
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
        experiment.options("some", "text", 100, [word for pair in given.items() for word in pair])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"lm experiment some: error: {option} {given[option]}: cannot be written to: ")
