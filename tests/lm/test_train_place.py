"""A resumed run continues where it stopped in its text, whatever its batch size, and only in that text."""

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from lm import data, history, loss, train
from lm.config import Config
from tests.helpers import ROOT, content, refused
from tests.lm.command import one_line
from tests.lm.runs import stored

pytestmark = pytest.mark.usefixtures("short_samples")

CONTEXT = 16
EPOCH = 64  # windows


@pytest.fixture
def texts(tmp_path):
    """A random text with an epoch of 64 windows of 16 tokens, all different, and a held-out text."""
    draw = random.Random(0)
    paths = {"path": tmp_path / "train.txt", "validation": tmp_path / "held-out.txt"}
    for path, size in zip(paths.values(), ((EPOCH + 1) * CONTEXT + 9, 200)):
        path.write_bytes(bytes(draw.choices(range(256), k=size)))
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def seen(monkeypatch):
    """The windows that training steps have used, in order."""
    used, losses = [], loss.training_losses

    def recorded(model, inputs, *given, **options):
        if torch.is_grad_enabled():
            used.extend(map(tuple, inputs.tolist()))
        return losses(model, inputs, *given, **options)

    monkeypatch.setattr(loss, "training_losses", recorded)
    return used


def train_in_parts(tiny, run, texts, parts, **changes):
    """Train with (batch_size, accumulation, steps, more options) in turn, resuming each time."""
    done = 0
    for batch_size, accumulation, steps, *more in parts:
        done += steps
        sizes = {"batch_size": batch_size, "accumulation": accumulation, "steps": done, "warmup": 1}
        options = {**sizes, **changes, **(more[0] if more else {})}
        assert train.train(tiny(data=texts, train=options), run, resume=run.exists()) == 0


@pytest.mark.parametrize(
    "parts",
    [
        [(4, 1, 8), (8, 1, 4)],
        [(8, 1, 4), (4, 1, 8)],
        [(4, 1, 4), (4, 3, 4)],
        [(5, 1, 3), (7, 1, 7)],
        [(16, 1, 1), (1, 16, 1), (2, 8, 1), (8, 2, 1)],
        [(4, 1, 8), (8, 1, 4, {"seed": 5})],
        [(4, 1, 8, {"seed": 5}), (2, 2, 8, {"seed": 6})],
    ],
    ids=str,
)
def test_every_window_is_used_once_an_epoch_however_the_batch_changes(tiny, tmp_path, texts, seen, parts):
    train_in_parts(tiny, tmp_path / "run", texts, parts)
    assert len(seen) == len(set(seen)) == EPOCH
    seed = parts[0][3]["seed"] if len(parts[0]) > 3 else 0
    windows = data.Windows(data.open_text(Path(texts["path"])), CONTEXT, seed)
    assert seen == [tuple(windows.train(index)[:-1].tolist()) for index in range(EPOCH)]
    assert history.read_state(history.newest_checkpoint(tmp_path / "run"))["windows"] == EPOCH


def test_random_changes_keep_the_order_of_an_uninterrupted_run(tiny, tmp_path, texts, seen):
    draw = random.Random(3)
    for number in range(2):
        parts = [(draw.randint(1, 6), draw.randint(1, 3), draw.randint(1, 3)) for _ in range(5)]
        train_in_parts(tiny, tmp_path / str(number), texts, parts)
        windows = data.Windows(data.open_text(Path(texts["path"])), CONTEXT)
        total = sum(size * accumulation * steps for size, accumulation, steps in parts)
        assert seen == [tuple(windows.train(index)[:-1].tolist()) for index in range(total)]
        for _, epoch in itertools.groupby(enumerate(seen), lambda pair: pair[0] // EPOCH):
            used = [window for _, window in epoch]
            assert len(set(used)) == len(used)
        seen.clear()


def without(run, *keys):
    """Make the newest state one of an earlier version."""
    path = history.newest_checkpoint(run) / "state.json"
    state = {key: value for key, value in json.loads(path.read_text()).items() if key not in keys}
    path.write_text(json.dumps(state))


ADDED = ("format", "windows", "context", "seed", "text", "first_loss", "diverged")


def test_a_state_of_an_earlier_version_goes_on_at_its_window(tiny, tmp_path, texts, seen):
    run = tmp_path / "run"
    train_in_parts(tiny, run, texts, [(4, 2, 4)], seed=9)
    without(run, *ADDED)
    options = {"batch_size": 8, "accumulation": 1, "steps": 8, "warmup": 1, "seed": 1}
    assert train.train(tiny(data=texts, train=options), run, resume=True) == 0
    assert len(seen) == len(set(seen)) == EPOCH
    state = history.read_state(history.newest_checkpoint(run))
    assert (state["windows"], state["seed"], state["context"]) == (EPOCH, 9, CONTEXT)


@pytest.mark.parametrize("earlier", [(), ADDED], ids=["now", "earlier version"])
@pytest.mark.parametrize("context", [8, 32])
def test_another_context_is_refused_since_its_windows_are_others(tiny, tmp_path, texts, context, earlier):
    run = tmp_path / "run"
    train_in_parts(tiny, run, texts, [(4, 1, 2)])
    without(run, *earlier)
    before = content(run)
    config = tiny(data=texts, train={"context": context})
    said = f"train.context is 16 in the run and {context} now; it must not change"
    refused(lambda: train.train(config, run, resume=True), said)
    assert content(run) == before


def append(path):
    with open(path, "ab") as file:
        file.write(b"a line\n")


def edit(path):
    with open(path, "r+b") as file:
        file.seek(500 if "train" in path else 50)
        found = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([found[0] ^ 1]))


def shorten(path):
    with open(path, "r+b") as file:
        file.truncate(180 if "held" in path else 1000)


@pytest.mark.parametrize("change", [append, edit, shorten])
@pytest.mark.parametrize("text, name", [("path", "training"), ("validation", "held-out")])
def test_another_text_is_refused_and_nothing_is_written(tiny, tmp_path, texts, command, change, text, name):
    run = tmp_path / "run"
    train_in_parts(tiny, run, texts, [(4, 1, 4)])
    before = content(run)
    change(texts[text])
    ended = command("train", "--resume", "--out-dir", run, "--train.steps", 6)
    line = one_line(ended, "train", code=2)
    assert f"the {name} text is not the one that " in line and "(its sha256 differs)" in line
    assert content(run) | {".owner": b""} == before | {".owner": b""}


def test_an_appended_line_moves_the_tenth_that_is_held_out_and_is_refused(tiny, tmp_path, texts):
    run, texts = tmp_path / "run", {"path": texts["path"]}
    train_in_parts(tiny, run, texts, [(4, 1, 4)])
    append(texts["path"])
    refused(lambda: train.train(tiny(data=texts), run, resume=True), "the training text is not the one that")


def test_the_same_text_goes_on_after_it_was_copied_touched_or_replaced(tiny, tmp_path, texts):
    run = tmp_path / "run"
    train_in_parts(tiny, run, texts, [(4, 1, 2)])
    shutil.copy(texts["path"], tmp_path / "copy")
    (tmp_path / "copy").rename(texts["path"])
    assert train.train(tiny(data=texts, train={"steps": 3, "warmup": 1}), run, resume=True) == 0


def test_a_state_without_a_hash_goes_on_and_stores_one(tiny, tmp_path, texts):
    run = tmp_path / "run"
    train_in_parts(tiny, run, texts, [(4, 1, 2)])
    without(run, "text")
    append(texts["path"])
    assert train.train(tiny(data=texts, train={"steps": 3, "warmup": 1}), run, resume=True) == 0
    append(texts["path"])
    config = tiny(data=texts, train={"steps": 4, "warmup": 1})
    refused(lambda: train.train(config, run, resume=True), "the training text is not the one that")


def test_a_run_of_an_earlier_version_stores_its_place_and_text(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "lm" / "old", tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    shutil.rmtree("run/checkpoints/step-000008")
    config = Config.load("run/config.toml")
    assert train.train(config, tmp_path / "old" / "run", resume=True) == 0
    state = history.read_state(history.newest_checkpoint(tmp_path / "old" / "run"))
    assert state["windows"] * config.train.context == state["tokens"]
    assert state["text"]["training"] == data.fingerprint(data.load(config.data, 256)[0])


@pytest.mark.long
def test_a_huge_text_is_hashed_in_part(monkeypatch):
    tokens = data.np.zeros(3 * 2**20 + 5, dtype=data.np.uint8)
    whole = data.fingerprint(tokens)
    monkeypatch.setattr(data, "HASHED", 2**20)
    found = data.fingerprint(tokens)
    assert found != whole and found == data.fingerprint(tokens.copy())
    for index in (0, -1, 2**20):
        other = tokens.copy()
        other[index] = 1
        assert data.fingerprint(other) != found
    assert data.fingerprint(tokens[:-1]) != found


def test_a_batch_of_the_same_size_keeps_the_bits(tiny, tmp_path, texts):
    train_in_parts(tiny, tmp_path / "whole", texts, [(4, 1, 9)], decay=0.0)
    train_in_parts(tiny, tmp_path / "parts", texts, [(4, 1, 2), (4, 1, 4), (4, 1, 3)], decay=0.0)
    assert stored(tmp_path / "whole") == stored(tmp_path / "parts")
