"""Every notebook matches its source, was executed in order without errors, and still runs."""

import json
import os
import re
import subprocess
import sys

import jupytext
import pytest

from tests.helpers import ROOT

SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
EXERCISES = {path.stem.partition("_")[2].replace("_", "-") for path in (ROOT / "exercises").glob("[0-9]*.py")}
each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def stored(source):
    return json.loads(source.with_suffix(".ipynb").read_text("utf-8"))


def test_lessons_are_numbered_from_one_without_gaps():
    assert [int(source.stem[:2]) for source in SOURCES] == list(range(1, len(SOURCES) + 1))


@each
def test_notebook_matches_its_source(source):
    expected = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in stored(source)["cells"]] == expected


@each
def test_notebook_was_executed_in_order_without_errors(source):
    cells = [cell for cell in stored(source)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert source.with_suffix(".ipynb").stat().st_size <= 300_000
    assert str(ROOT) not in source.with_suffix(".ipynb").read_text("utf-8")


@each
def test_lesson_has_question_prediction_measurements_and_exercise(source):
    cells = jupytext.read(source).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert re.match(rf"# {source.stem[:2]} .*\?$", prose.splitlines()[0]) and "Predict" in prose
    numbers = {path.stem[:2] for path in SOURCES}
    assert set(re.findall(r"notebook\s+(\d+)", prose)) <= numbers
    assert len(re.findall(r"^\s*assert ", code, re.M)) >= 4
    exercises = re.findall(r"lm exercise start ([\w-]+)", prose)
    assert exercises and set(exercises) <= EXERCISES
    assert not re.search(r"^(class|def) (RMSNorm|MoE|Experts|\w+Router|\w+Attention)\b", code, re.M)
    for target in re.findall(r"\]\((?!\w+:|#)([^)#]+)", prose):
        assert (source.parent / target).exists(), target


@pytest.mark.long
@each
def test_source_runs_with_quick_settings(source, tmp_path):
    environment = {
        **os.environ,
        "QUICK": "1",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(source)], cwd=source.parent, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
