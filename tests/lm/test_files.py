import itertools
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lm import checkpoint, files
from lm.checkpoint import save, save_checkpoint
from lm.history import newest_checkpoint
from tests.helpers import ROOT, content
from tests.lm.hub.folders import UNUSUAL, within
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
    assert events.pop(0) == ("fsync", "run")  # which has a new folder for the checkpoints
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
    ("files", "sha256", 1),
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
    owned = {"os": os, "checkpoint": checkpoint, "files": files, "Path": Path}[owner]
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


# --- modes


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027, 0o077], ids=oct)
def test_new_files_obey_the_umask(tiny, run, make_model, tmp_path, umask):
    model, optimizer = stepped(tiny())
    before = os.umask(umask)
    try:
        saved = save_checkpoint(run, model, optimizer, state_of(1), keep=1)
        save(make_model(tiny().model), tmp_path / "model")
        files.write_file(tmp_path / "text", "x")
    finally:
        os.umask(before)
    found = [*saved.iterdir(), *(tmp_path / "model").iterdir(), tmp_path / "text"]
    assert len(found) == 6
    assert {path.stat().st_mode & 0o777 for path in found} == {0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in (saved, tmp_path / "model")} == {0o777 & ~umask}


# --- files that are not regular


@pytest.fixture
def five_seconds():
    with within(5):
        yield


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
@pytest.mark.parametrize("read", [files.read_json, files.read_header], ids=["JSON", "safetensors"])
def test_a_file_that_is_not_regular_is_a_one_line_error(tmp_path, five_seconds, make, read):
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_the_checksum_of_a_file_that_is_not_regular_is_empty(tmp_path, five_seconds, make):
    make(tmp_path / "x.safetensors")
    assert files.sha256(tmp_path / "x.safetensors") == ""


def test_weights_grown_to_a_terabyte_are_not_hashed(tiny, make_model, tmp_path, five_seconds):
    save(make_model(tiny().model), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    assert len(files.sha256(path)) == 64
    os.truncate(path, 10**12)
    assert files.sha256(path) == ""


# --- two writers


def test_a_second_writer_is_told_and_the_first_one_is_whole(tmp_path):
    def outer(into):
        (into / "a").write_text("first")
        for _ in range(2):
            with pytest.raises(ValueError, match="out: another process is writing it"):
                files.commit(tmp_path / "out", inner)
        (into / "b").write_text("first")

    def inner(into):
        raise AssertionError("must not write")

    files.commit(tmp_path / "out", outer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content(tmp_path / "out") == {"a": b"first", "b": b"first"}


def test_a_folder_created_meanwhile_is_kept(tmp_path):
    def write(into):
        (into / "a").write_text("second")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("first")

    with pytest.raises(ValueError, match="out: was created by another process meanwhile"):
        files.commit(tmp_path / "out", write)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content(tmp_path / "out") == {"mine": b"first"}


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".out.tmp" / "deep").mkdir(parents=True)
    (tmp_path / ".out.tmp" / "half").write_text("left")
    (tmp_path / "out").mkdir()
    files.commit(tmp_path / "out", lambda into: (into / "a").write_text("new") and None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content(tmp_path / "out") == {"a": b"new"}


RACE = """
import sys, multiprocessing
from pathlib import Path
from lm import files
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(2)

def work(name):
    for number in range(rounds):
        barrier.wait(60)
        def write(into):
            for part in "abc":
                (into / part).write_text(name * 1000)
        try:
            files.check_new(folder / str(number))
            files.commit(folder / str(number), write)
            (folder / f"won-{number}-{name}").touch()
        except ValueError as error:
            assert "another process" in str(error) or "not an empty folder" in str(error), error
        files.write_file(folder / "page.html", name * 100_000)
        assert (folder / "page.html").read_text() in ("0" * 100_000, "1" * 100_000)

both = [fork.Process(target=work, args=(name,)) for name in "01"]
for process in both: process.start()
for process in both: process.join()
sys.exit(max(process.exitcode for process in both))
"""


def test_of_two_writers_one_wins_whole(tmp_path):
    rounds = 150
    ran = subprocess.run(
        [sys.executable, "-c", RACE, str(tmp_path), str(rounds)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr
    for number in range(rounds):
        (winner,) = tmp_path.glob(f"won-{number}-*")
        text = winner.name[-1].encode() * 1000
        assert content(tmp_path / str(number)) == {"a": text, "b": text, "c": text}
    assert not list(tmp_path.glob(".*"))


# --- a full disk


def test_a_file_that_outgrows_its_limit_is_an_os_error_and_leaves_nothing(tiny, make_model, tmp_path):
    model, before = make_model(tiny().model), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            save(model, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path / "model") in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["out", "a/../out", "link/out", "deep/er/out", "."])
def test_a_target_inside_its_source_is_rejected(tmp_path, place):
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    (source / "link").symlink_to(source / "a")
    with pytest.raises(ValueError, match=r"is inside \S*source, the source"):
        files.check_new(source / place, source)
    files.check_new(tmp_path / "source-2", source)
    files.check_new(tmp_path / "source" / ".." / "out", source)
