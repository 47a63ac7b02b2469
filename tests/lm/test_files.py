import itertools
import os
from pathlib import Path

import pytest

from lm import checkpoint, files
from lm.checkpoint import newest_checkpoint, save, save_checkpoint
from tests.helpers import content
from tests.lm.runs import state_of, stepped


def test_data_is_on_disk_before_its_name(tiny, run, monkeypatch):
    model, optimizer = stepped(tiny())
    events = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(handle):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def recorded_rename(self, target):
        events.append(("rename", self.name, Path(target).name))
        rename(self, target)
        return Path(target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("the names of open files are read from /proc")
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    save_checkpoint(run, model, optimizer, state_of(2), keep=2)
    temporary = ".step-000002.tmp"
    assert set(events[:3]) == {
        ("fsync", name) for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    }
    assert events[3:] == [
        ("fsync", temporary),
        ("rename", temporary, "step-000002"),
        ("fsync", "checkpoints"),
    ]
    events.clear()
    files.write_file(run / "config.toml", "x")
    assert events == [
        ("fsync", ".config.toml.tmp"),
        ("rename", ".config.toml.tmp", "config.toml"),
        ("fsync", "run"),
    ]


PLACES = [("os", "fsync", number) for number in range(5)] + [
    ("checkpoint", "save_file", 0),
    ("checkpoint", "save_file", 1),
    ("checkpoint", "sha256", 1),
    ("Path", "rename", 0),
    ("Path", "mkdir", 1),
    ("Path", "write_text", 0),
]


@pytest.mark.parametrize("owner, function, number", PLACES)
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("can't allocate memory"), KeyboardInterrupt()],
    ids=repr,
)
def test_a_failed_save_leaves_everything_intact(tiny, run, monkeypatch, owner, function, number, error):
    model, optimizer = stepped(tiny())
    first = save_checkpoint(run, model, optimizer, state_of(1), keep=1)
    before = content(run)
    owned = {"os": os, "checkpoint": checkpoint, "Path": Path}[owner]
    original, calls = getattr(owned, function), itertools.count()

    def failing(*arguments, **options):
        if next(calls) == number:
            raise error
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owned, function, failing)
        with pytest.raises(type(error)):
            save_checkpoint(run, model, optimizer, state_of(2), keep=1)
    if (owner, function, number) == ("os", "fsync", 4):  # the new one is in place, the old not yet removed
        assert {name: held for name, held in content(run).items() if "step-000002" not in name} == before
    else:
        assert content(run) == before
        assert newest_checkpoint(run) == first
    save_checkpoint(run, model, optimizer, state_of(2), keep=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]


def test_a_failed_write_leaves_nothing_behind(tiny, make_model, tmp_path, monkeypatch):
    model = make_model(tiny().model)

    def failing(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.raises(OSError, match="No space"):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(files, "sync", failing)
    (tmp_path / "config.toml").write_text("before")
    with pytest.raises(OSError, match="No space"):
        files.write_file(tmp_path / "config.toml", "after")
    assert content(tmp_path) == {"config.toml": b"before"}
