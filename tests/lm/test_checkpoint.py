import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lm import checkpoint, history
from lm.checkpoint import load, load_checkpoint, save, save_checkpoint
from lm.config import Config
from lm.history import newest_checkpoint
from lm.hub.hf import from_hf, to_hf
from lm.inference.generate import generate
from lm.optim import build_optimizer
from tests.helpers import content, refused
from tests.lm.runs import bits, state_of, stepped

KINDS = {
    "mla": {},
    "tied": {"model": {"tie_embeddings": True}},
    "gqa, softmax": {"attention": {"kind": "gqa"}, "moe": {"router": "softmax"}},
    "all dense": {"model": {"num_dense_layers": 3}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_a_saved_model_loads_bit_for_bit(tiny, make_model, tmp_path, changes, dtype):
    model = make_model(tiny(**changes).model, dtype)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.config == model.config
    assert bits(loaded) == bits(model)
    for router in loaded.routers():
        if router.bias is not None:
            assert router.bias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (loaded.head.weight is loaded.embedding.weight) == model.config.tie_embeddings
    tokens = torch.arange(10).unsqueeze(0)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def strides(model):
    return {name: tensor.stride() for name, tensor in model.state_dict().items()}


def test_generating_changes_neither_the_model_nor_what_is_saved(tiny, make_model, tmp_path):
    model = make_model(tiny().model)
    before, laid_out = bits(model), strides(model)
    generate(model, torch.tensor([[1, 2, 3]]), 2)
    assert bits(model) == before and strides(model) == laid_out
    save(model, tmp_path / "model")
    assert bits(load(tmp_path / "model")) == before
    to_hf(model, tmp_path / "theirs")
    assert bits(from_hf(tmp_path / "theirs")) == before
    (tmp_path / "run").mkdir()
    step = save_checkpoint(tmp_path / "run", model, build_optimizer(model, tiny().train), state_of(2), keep=1)
    assert bits(checkpoint.load_model(model.config, step / "model.safetensors")) == before


def test_a_tied_head_is_stored_once(tiny, make_model, tmp_path):
    save(make_model(tiny(model={"tie_embeddings": True}).model), tmp_path / "model")
    assert "head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_a_saved_model_is_a_toml_and_a_safetensors_file(tiny, make_model, tmp_path):
    model = make_model(tiny().model)
    save(model, tmp_path / "deep" / "down" / "model")
    assert sorted(p.name for p in (tmp_path / "deep" / "down").iterdir()) == ["model"]
    folder = tmp_path / "deep" / "down" / "model"
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "model.safetensors"]
    assert Config.load(folder / "config.toml").model == model.config
    stored = load_file(folder / "model.safetensors")
    assert {name: t.shape for name, t in stored.items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }


def test_loaded_weights_do_not_share_memory_with_the_file(tiny, make_model, tmp_path):
    model = make_model(tiny().model, torch.float32)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\xff" * size)
    assert bits(loaded) == bits(model)
    with open(path, "r+b") as file:
        file.truncate(0)
    assert bits(loaded) == bits(model)
    path.unlink()
    loaded(torch.zeros(1, 3, dtype=torch.int64))


def test_saving_into_a_folder_that_is_not_empty_is_rejected(tiny, make_model, tmp_path):
    model = make_model(tiny().model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = content(tmp_path)
    for name in ("full", "file"):
        refused(lambda name=name: save(model, tmp_path / name), f"{name}: is not an empty folder")
    assert content(tmp_path) == before
    save(model, tmp_path / "empty")
    assert bits(load(tmp_path / "empty")) == bits(model)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_a_checkpoint_holds_weights_biases_and_optimizer_bit_for_bit(tiny, run, changes):
    config = tiny(**changes)
    model, optimizer = stepped(config)
    folder = save_checkpoint(run, model, optimizer, state_of(2), keep=2)
    fresh, other = stepped(config, steps=0)
    state = load_checkpoint(folder, fresh, other)
    assert {key: state[key] for key in state_of(2)} == state_of(2)
    assert bits(fresh) == bits(model)
    for ours, theirs in zip(model.parameters(), fresh.parameters()):
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[ours][moment], other.state[theirs][moment])
    for held in (model, fresh):  # and both take the same next step
        held(torch.arange(8).unsqueeze(0)).logits.square().mean().backward()
    optimizer.step()
    other.step()
    assert bits(fresh) == bits(model)


def test_a_resumed_optimizer_does_not_share_memory_with_the_file(tiny, run):
    model, optimizer = stepped(tiny())
    folder = save_checkpoint(run, model, optimizer, state_of(2), keep=2)
    fresh, other = stepped(tiny(), steps=0)
    load_checkpoint(folder, fresh, other)
    for path in folder.glob("*.safetensors"):
        with open(path, "r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
    assert bits(fresh) == bits(model)
    for ours, theirs in zip(model.parameters(), fresh.parameters()):
        assert torch.equal(optimizer.state[ours]["exp_avg"], other.state[theirs]["exp_avg"])


def test_a_parameter_without_gradient_does_not_stop_the_saving(tiny, run):
    config = tiny()
    model, optimizer = stepped(config, steps=0)
    model.blocks[0].attention.requires_grad_(False)
    model(torch.arange(8).unsqueeze(0)).logits.square().mean().backward()
    optimizer.step()
    folder = save_checkpoint(run, model, optimizer, state_of(1), keep=2)
    fresh, other = stepped(config, steps=0)
    load_checkpoint(folder, fresh, other)
    assert bits(fresh) == bits(model)


def test_a_checkpoint_is_three_files_without_pickle(tiny, run):
    folder = save_checkpoint(run, *stepped(tiny()), state_of(2), keep=2)
    assert folder == run / "checkpoints" / "step-000002"
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    json.loads((folder / "state.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_last_are_kept(tiny, run, keep):
    model, optimizer = stepped(tiny())
    for step in range(1, 6):
        save_checkpoint(run, model, optimizer, state_of(step), keep)
        kept = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert kept == [f"step-{s:06d}" for s in range(max(1, step - keep + 1), step + 1)]


def test_the_millionth_step_sorts_after_the_one_before(tiny, run):
    model, optimizer = stepped(tiny())
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save_checkpoint(run, model, optimizer, state_of(step), keep=2)
        assert newest_checkpoint(run).name == f"step-{step:06d}"
    assert [path.name for path in history.checkpoints(run)] == ["step-1000000", "step-1000001"]


def test_the_next_save_removes_what_a_killed_one_left(tiny, run):
    model, optimizer = stepped(tiny())
    for name in (".step-000003.tmp", ".step-000007.tmp"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "model.safetensors").write_text("half")
    save_checkpoint(run, model, optimizer, state_of(3), keep=2)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000003"]
    assert bits(load(run)) == bits(model)


def two_checkpoints(run, config):
    models = []
    for step in (1, 2):
        model, optimizer = stepped(config, steps=step)
        save_checkpoint(run, model, optimizer, state_of(step), keep=2)
        models.append(bits(model))
    return models


def cut(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path):
    stored = bytearray(path.read_bytes())
    stored[-5] ^= 1
    path.write_bytes(stored)


def replaced_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def with_field(key, value):
    def damage(path):
        state = json.loads(path.read_text())
        state[key] = value
        path.write_text(json.dumps(state))

    return damage


DAMAGES = [
    *[
        (name, damage)
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
        for damage in (cut, Path.unlink, replaced_by_pipe)
    ],
    ("model.safetensors", flip),
    ("optimizer.safetensors", flip),
    ("state.json", lambda path: path.write_text("[" * 100_000)),
    ("state.json", lambda path: path.write_text("[1]")),
    ("state.json", lambda path: path.write_text("")),
    ("state.json", lambda path: path.write_bytes(b"\xff")),
    ("state.json", with_field("step", "2")),
    ("state.json", with_field("step", True)),
    ("state.json", with_field("step", 0)),
    ("state.json", with_field("step", -3)),
    ("state.json", with_field("tokens", None)),
    ("state.json", with_field("seconds", float("nan"))),
    ("state.json", with_field("dtype", "torch.load")),
    ("state.json", with_field("threads", [])),
    ("state.json", with_field("sha256", {})),
    ("state.json", with_field("sha256", [1])),
    ("state.json", with_field("sha256", {"../../../etc/passwd": "x"})),
]


@pytest.mark.parametrize("name, damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tiny, run, name, damage):
    models = two_checkpoints(run, tiny())
    assert bits(load(run)) == models[1]
    path = run / "checkpoints" / "step-000002" / name
    damage(path)
    with pytest.warns(UserWarning, match="damaged checkpoint skipped") as caught:
        loaded = load(run)
    assert bits(loaded) == models[0]
    assert len(caught) == 1 and str(path) in str(caught[0].message)


def test_when_all_checkpoints_are_damaged_the_error_is_one_line(tiny, run):
    two_checkpoints(run, tiny())
    for path in (run / "checkpoints").iterdir():
        cut(path / "model.safetensors")
    with (
        pytest.warns(UserWarning, match="damaged checkpoint skipped") as caught,
        pytest.raises(ValueError, match="run: every checkpoint is damaged"),
    ):
        load(run)
    assert len(caught) == 2


def test_a_run_without_checkpoints_says_so(run):
    refused(lambda: load(run), "run: no checkpoint yet")


def test_names_that_are_not_checkpoints_are_ignored(tiny, run):
    models = two_checkpoints(run, tiny())
    (run / "checkpoints" / "step-9").write_text("a file")
    (run / "checkpoints" / "step-zzz").mkdir()
    (run / "checkpoints" / ".step-000003.tmp").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bits(load(run)) == models[1]
