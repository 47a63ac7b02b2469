"""Any model folder, by Python and by `lm`: a run, a saved model or a Hugging Face folder."""

import shutil
import sys
from functools import partial

import pytest
import torch

import lm
from lm import checkpoint, cli, history
from lm.hub import folder
from lm.hub.families import FAMILIES
from tests.helpers import refused
from tests.lm.hub.folders import REFERENCE, bits


@pytest.fixture(scope="module")
def published(tiny, make_model, tmp_path_factory):
    """A Hugging Face folder without a tokenizer: its tokens are bytes."""
    path = tmp_path_factory.mktemp("published") / "model"
    lm.to_hf(make_model(tiny(model={"max_length": 64}).model, torch.float32), path)
    return path


@pytest.fixture(scope="module")
def folders(published, tiny, make_model, tmp_path_factory):
    """A folder of each kind; the run has a checkpoint, and no log or report."""
    root = tmp_path_factory.mktemp("folders")
    lm.save(lm.from_hf(published), root / "saved")
    (root / "run").mkdir()
    (root / "run" / "config.toml").write_text(tiny().to_toml())
    model = make_model(tiny().model, torch.float32)
    state = {key: kind(1) for key, kind in history.STATE.items() if kind is not dict}
    state["dtype"] = "torch.float32"
    checkpoint.save_checkpoint(root / "run", model, torch.optim.AdamW(model.parameters()), state, keep=1)
    return {folder.RUN: root / "run", folder.SAVED: root / "saved", folder.HUB: published}


def failed(result):
    """A command ended with status 2 and one line on stderr -> the line"""
    status, out, err = result
    assert status == 2 and out == "" and err.count("\n") == 1, result
    return err.removesuffix("\n")


@pytest.mark.parametrize("kind", FAMILIES)
def test_load_opens_a_hugging_face_folder_as_from_hf_does(kind):
    opened, wanted = lm.load(REFERENCE / kind), lm.from_hf(REFERENCE / kind)
    assert opened.config == wanted.config == folder.read_config(REFERENCE / kind).model
    assert bits(opened.state_dict()) == bits(wanted.state_dict()) and not opened.training


def test_load_opens_every_kind_of_folder(folders):
    for kind, path in folders.items():
        assert folder.kind_of(path) == kind
    ours, theirs = lm.load(str(folders[folder.SAVED])), lm.load(str(folders[folder.HUB]))
    assert ours.config == theirs.config and bits(ours.state_dict()) == bits(theirs.state_dict())
    trained = checkpoint.load(folders[folder.RUN])
    assert bits(lm.load(folders[folder.RUN]).state_dict()) == bits(trained.state_dict())


def test_open_folder_returns_the_model_its_config_and_its_tokenizer(published):
    model, config, tokenizer = folder.open_folder(published, device="cpu")
    assert config.model == model.config and tokenizer.decode(tokenizer.encode("é")) == "é"


# --- lm eval and lm generate


def test_generate_continues_a_hugging_face_folder_as_lm_generate_does(published, invoke):
    options = ("--prompt", "ab", "--max-new-tokens", "5", "--temperature", "0")
    status, text, _ = invoke("generate", published, *options)
    tokens = lm.generate(lm.from_hf(published), torch.tensor([list(b"ab")]), 5, temperature=0)
    written = bytes(tokens[0].tolist()).partition(b"\3")[0]
    assert status == 0 and text == written.decode("utf-8", "replace") + "\n"


def test_eval_of_a_hugging_face_folder_is_that_of_the_imported_one(published, invoke, text_file, tmp_path):
    status, out, _ = invoke("eval", published, "--data", text_file)
    assert status == 0 and float(out.split()[1]) > 5.5  # ln 256: untrained
    assert invoke("import", published, tmp_path / "ours")[0] == 0
    assert invoke("eval", tmp_path / "ours", "--data", text_file)[1] == out


@pytest.mark.parametrize("command", ["generate", "eval", "chat"])
def test_a_missing_part_of_a_hugging_face_folder_is_named(published, invoke, monkeypatch, tmp_path, command):
    path = shutil.copytree(published, tmp_path / "model")
    (path / "model.safetensors").rename(path / "weights")
    line = failed(invoke(command, path))
    assert line == (f"lm {command}: {path}: holds no model.safetensors and no model.safetensors.index.json")
    (path / "weights").rename(path / "model.safetensors")
    (path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "-e '.[lm,hf]'" in failed(invoke(command, path))


@pytest.mark.parametrize("command", ["generate", "eval", "chat"])
def test_a_missing_tokenizer_is_named_where_tokens_are_not_bytes(tiny, invoke, tmp_path, command):
    lm.to_hf(lm.Transformer(tiny(model={"vocab_size": 600}).model), tmp_path / "model")
    line = failed(invoke(command, tmp_path / "model"))
    assert line.startswith(f"lm {command}: {tmp_path}/model: holds no tokenizer.json")


# --- the wrong kind of folder

WRONG = [  # a command, its folder's kind, the kind it expects, a command for this kind alone
    (["report"], folder.HUB, "a run", "import"),
    (["report"], folder.SAVED, "a run", "export"),
    (["export", "out"], folder.HUB, "a run or a saved model", "import"),
    (["import", "out"], folder.SAVED, "a Hugging Face folder", "export"),
    (["import", "out"], folder.RUN, "a Hugging Face folder", "report"),
]


@pytest.mark.parametrize("command, kind, expected, only", WRONG, ids=str)
def test_a_wrong_kind_of_folder_says_what_it_is_and_which_commands_open_it(
    folders, invoke, tmp_path, monkeypatch, command, kind, expected, only
):
    monkeypatch.chdir(tmp_path)
    name, *rest = command
    line = failed(invoke(name, folders[kind], *rest))
    said, _, openers = line.partition("; open it with lm ")
    assert said == f"lm {name}: {folders[kind]}: is {kind}, expected {expected}"
    named = openers.replace(" and ", ", ").split(", ")
    assert only in named and set(named) <= set(cli.COMMANDS)
    assert list(tmp_path.iterdir()) == []


OPTIONS = {
    "eval": ["--data", "text"],
    "generate": ["--max-new-tokens", "1"],
    "import": ["out"],
    "export": ["out"],
}


@pytest.mark.parametrize("kind", [folder.RUN, folder.SAVED, folder.HUB])
def test_the_commands_that_the_error_names_open_the_folder(
    folders, invoke, text_file, tmp_path, monkeypatch, kind
):
    """All but `serve` and `report`, which have their own tests."""
    path = shutil.copytree(folders[kind], tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    shutil.copy(text_file, "text")
    openers = refused(lambda: folder.need(path, "nothing")).partition("; open it with lm ")[2]
    for name in set(openers.replace(" and ", ", ").split(", ")) - {"serve", "report"}:
        status, _, err = invoke(name, path, *OPTIONS.get(name, []))
        assert status == 0, (name, err)


def test_from_hf_of_a_saved_model_names_lm_load(folders):
    saved = folders[folder.SAVED]
    refused(lambda: lm.from_hf(saved), saved, "holds no config.json", "lm.load")


@pytest.mark.parametrize("opener", [folder.kind_of, folder.load, folder.read_config, folder.open_folder])
def test_a_folder_of_no_kind_is_rejected(tmp_path, opener):
    (tmp_path / "file").write_text("{}")
    (tmp_path / "empty").mkdir()
    reasons = {"empty": "holds no config.toml and no config.json", "file": "is not a folder"}
    for name, reason in {**reasons, "absent": "is not a folder"}.items():
        path = tmp_path / name
        message = refused(partial(opener, path))
        assert message == f"{path}: {reason}; expected a run, a saved model or a Hugging Face folder"


def test_auto_takes_a_macs_gpu_only_if_the_model_runs_there(folders, monkeypatch):
    """There is none here."""
    want = bits(folder.open_folder(folders[folder.RUN], device="cpu").model.state_dict())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="using the CPU: a trial on mps fails: "):
        assert bits(folder.open_folder(folders[folder.RUN]).model.state_dict()) == want
    with pytest.raises(RuntimeError):
        folder.open_folder(folders[folder.RUN], device="mps")
