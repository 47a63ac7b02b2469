"""The projects that are trained, and the errors for those that cannot be."""

import argparse
import shutil
import sys

import pytest

from tests.helpers import ROOT, refused

GIVEN = argparse.Namespace(quick=False)


@pytest.fixture
def projects(experiment, tmp_path, monkeypatch):
    """A folder with the worked projects' configs."""
    for path in (ROOT / "exercises" / "projects").glob("*.toml"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(experiment, "PROJECTS", tmp_path)
    return tmp_path


def test_each_project_is_trained_with_its_config_but_on_the_same_batches(experiment, projects, mini):
    text = (projects / "cosine.toml").read_text()
    assert "batch_size = 32" in text
    (projects / "own.toml").write_text(
        text.replace("batch_size = 32", "batch_size = 5").replace("16e-3", "2e-3")
        + '[data]\npath = "other.txt"\n'
    )
    found = experiment.projects(GIVEN)
    assert list(found) == ["annealed", "cosine", "own", "sliding_window"]
    own = found["own"]
    assert (own.train.batch_size, own.data, own.train.learning_rate) == (32, mini.data, 2e-3)
    assert found["cosine"].model.moe.router == "exercises.projects.cosine:CosineRouter"


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("DeepSeek-V3", ("", ""), "the name of a built-in row of the table; choose another"),
        ("own", ("CosineRouter", "Nothing"), "'Nothing' in exercises.projects.cosine is not an nn.Module"),
        ("own", ("top_k = 3", "top_k = 64"), "top_k 64 is more than the 63 experts"),
        ("own", ("[train]", "[train"), "not a readable TOML file"),
    ],
)
def test_a_project_that_cannot_be_built_is_named_before_anything_trains(
    experiment, projects, name, change, said
):
    path = projects / f"{name}.toml"
    path.write_text((projects / "cosine.toml").read_text().replace(*change))
    refused(lambda: experiment.projects(GIVEN), path, said)


def test_a_folder_without_projects_is_an_error(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "PROJECTS", tmp_path)
    with pytest.raises(ValueError, match="no project; lm new router NAME creates one"):
        experiment.projects(GIVEN)


def test_a_changed_custom_part_is_a_new_training(experiments, tmp_path, monkeypatch, mini):
    common = experiments("common")
    keys = []
    for number, text in enumerate(("", "", "# changed\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "my_part.py").write_text(
            "from moe import SwitchRouter as Base\n\n\nclass Mine(Base):\n    pass\n" + text
        )
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            patch.delitem(sys.modules, "my_part", raising=False)
            keys.append(common.key(common.changed(mini, moe={"router": "my_part:Mine"})))
    assert keys[0] == keys[1] != keys[2]
