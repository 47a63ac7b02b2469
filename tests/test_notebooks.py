"""Notebooks are what their sources say, ran from top to bottom without an error, and run again."""

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


def kept(source):
    return json.loads(source.with_suffix(".ipynb").read_text("utf-8"))


@each
def test_a_notebook_is_its_source(source):
    written = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in kept(source)["cells"]] == written


@each
def test_it_ran_from_top_to_bottom_without_an_error(source):
    cells = [cell for cell in kept(source)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert source.with_suffix(".ipynb").stat().st_size <= 300_000
    assert str(ROOT) not in source.with_suffix(".ipynb").read_text("utf-8")


@each
def test_it_asks_first_claims_nothing_unmeasured_and_leads_to_an_exercise(source):
    cells = jupytext.read(source).cells
    words = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert words.startswith("# ") and "?" in words.splitlines()[0] and "Predict" in words
    assert len(re.findall(r"^\s*assert ", code, re.M)) >= 4
    named = re.findall(r"lm exercise start ([\w-]+)", words)
    assert named and set(named) <= EXERCISES
    assert not re.search(r"^(class|def) (RMSNorm|MoE|Experts|\w+Router|\w+Attention)\b", code, re.M)
    for target in re.findall(r"\]\((?!\w+:|#)([^)#]+)", words):
        assert (source.parent / target).exists(), target


@pytest.mark.long
@each
def test_it_runs_in_little(source, tmp_path):
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
