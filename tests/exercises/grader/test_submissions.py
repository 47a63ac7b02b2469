"""Every file that a student hands in is matched to an exercise or named."""

import io
import os
import zipfile
from pathlib import Path

import pytest

from exercises.grader import exercise
from exercises.grader.submissions import find, match, unzip
from tests.helpers import ROOT, refused

EXERCISES = list(exercise.load_all(ROOT / "exercises").values())


@pytest.mark.parametrize(
    "name, wanted",
    [
        *((about.file, about.name) for about in EXERCISES),
        *((f"{about.file[:-3]} (1).py", about.name) for about in EXERCISES),
        *((f"Ann_Smith_12345_{about.file}", about.name) for about in EXERCISES),
        *((about.name.title().replace("-", "") + ".py", about.name) for about in EXERCISES),
        ("my router (1).py", "router"),
        ("Router.py", "router"),
        ("ROUTER.PY", "router"),
        ("MyRouter.py", "router"),
        ("router copy.py", "router"),
        ("router-final-v2.py", "router"),
        ("03_router.py", "router"),
        ("RMSNorm.py", "rms-norm"),
        ("rmsnorm.py", "rms-norm"),
        ("rms norm.py", "rms-norm"),
        ("router.py.txt", "router"),
        ("routers.py", None),
        ("router_and_rope.py", "router"),
        ("cache_yarn.py", "cache"),
        ("rope_yarn.py", None),  # two names of the same length
        ("notes.py", None),
        ("router.ipynb", None),
        (".py", None),
    ],
)
def test_a_file_is_matched_by_its_name(name, wanted):
    found = match(Path(name), EXERCISES)
    assert (found.name if found else None) == wanted


def names(found):
    return {name: {about: path.name for about, path in one.files.items()} for name, one in found.items()}


def lay_out(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x = 1\n")


def look(folder, tmp_path):
    place = tmp_path / "unpacked"
    place.mkdir(exist_ok=True)
    return find(folder, EXERCISES, place)


@pytest.mark.parametrize(
    "files, wanted, remark",
    [
        (["router.py"], {"router": "router.py"}, ""),
        (
            ["homework/router.py", "router.py"],
            {"router": "router.py"},
            "router: homework/router.py is graded",
        ),
        (["Router.py"], {"router": "Router.py"}, ""),
        (["deep/down/my router (1).py"], {"router": "my router (1).py"}, ""),
        (["router.py", "router (1).py"], {"router": "router.py"}, "is graded, not router (1).py"),
        (
            ["router.py", "thoughts.py"],
            {"router": "router.py"},
            "not graded, the names fit no exercise: thoughts",
        ),
        (["router.ipynb"], {}, "fit no exercise: router.ipynb"),
        (["answers.tar.gz", "answers.rar"], {}, "fit no exercise: answers.rar, answers.tar.gz"),
        (["a/Router.py", "b/Router.py"], {}, None),
        ([".router.py", "._router.py", "rope.py"], {"rope": "rope.py"}, "not graded, hidden: .router.py"),
        (["router.bak1", "README.md", "__pycache__/router.pyc", ".git/router.py"], {}, ""),
        (
            ["clone/homework/rope.py", "clone/exercises/03_router.py", "clone/tests/test_router.py"],
            {"rope": "rope.py"},
            "",
        ),
    ],
)
def test_a_students_files_are_found_or_named(files, wanted, remark, tmp_path):
    folder = tmp_path / "class"
    lay_out(folder / "ann", *files)
    lay_out(folder / "bob", "rope.py")
    found, loose = look(folder, tmp_path)
    assert names(found) == {"ann": wanted, "bob": {"rope": "rope.py"}} and loose == []
    remarks = found["ann"].remarks
    if remark is None:
        assert found["ann"].problems == {"router": "2 files could be it: a/Router.py, b/Router.py; keep one"}
    assert (len(remarks) == 1 and remark in remarks[0]) if remark else remarks == []


def test_two_files_that_could_be_the_same_exercise_are_named_and_neither_is_graded(tmp_path):
    lay_out(tmp_path / "class" / "ann", "my router.py", "Router.py")
    found, _ = look(tmp_path / "class", tmp_path)
    assert found["ann"].files == {}
    assert found["ann"].problems == {"router": "2 files could be it: Router.py, my router.py; keep one"}


def test_archives_are_unpacked_beside_folders_and_inside_them(tmp_path):
    folder = tmp_path / "class"
    lay_out(folder / "bob", "rope.py")
    lay_out(folder, "someone_router.py", "notes.txt")
    for path, inside in ((folder / "ann.zip", "ann/Router.py"), (folder / "bob" / "more.zip", "yarn.py")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(inside, "x = 1\n")
            archive.writestr("__MACOSX/._router.py", "x")
            archive.writestr("homework/.progress.json", '{"yarn": {"hints": 2}}')
    (folder / "cyd.zip").write_bytes(b"not an archive")
    found, loose = look(folder, tmp_path)
    assert names(found) == {
        "ann": {"router": "Router.py"}, "bob": {"rope": "rope.py", "yarn": "yarn.py"}, "cyd": {},
    }  # fmt: skip
    assert found["ann"].notes.read_text() == '{"yarn": {"hints": 2}}'
    assert found["cyd"].remarks == ["cyd.zip: cannot be unpacked: File is not a zip file"]
    assert loose == ["notes.txt", "someone_router.py"]


def test_an_archive_cannot_leave_its_folder_or_fill_the_disk(tmp_path):
    path, where = tmp_path / "a.zip", tmp_path / "out"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../router.py", "x = 1\n")
        archive.writestr("/etc/rope.py", "x = 1\n")
    assert unzip(path, where) == ""
    assert sorted(one.relative_to(tmp_path) for one in tmp_path.rglob("*.py")) == [
        Path("out/etc/rope.py"), Path("out/router.py"),
    ]  # fmt: skip
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(30):
            archive.writestr(f"{number}.py", bytes(1 << 24))
    assert unzip(path, tmp_path / "big") == "a.zip: unpacks to more than 20 MB"
    assert sum(one.stat().st_size for one in (tmp_path / "big").iterdir()) <= 21 << 20


def archive_of(*entries):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in entries:
            archive.writestr(name, text)
    return content.getvalue()


def test_archives_within_an_archive_share_one_limit(tmp_path):
    inner = archive_of(*((f"{number}.py", bytes(1 << 20)) for number in range(15)))
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "ann.zip").write_bytes(
        archive_of(("a.zip", inner), ("b.zip", inner), ("rope.py", ""))
    )
    found, _ = look(tmp_path / "class", tmp_path)
    assert names(found) == {"ann": {"rope": "rope.py"}}
    assert "b.zip: unpacks to more than 20 MB" in found["ann"].remarks
    assert sum(one.stat().st_size for one in (tmp_path / "unpacked").rglob("*.py")) <= 21 << 20


@pytest.mark.parametrize(
    "entries, wanted, remark",
    [
        ([("d" * 300 + "/yarn.py", ""), ("rope.py", "")], ["rope"], "not unpacked: ddd"),
        ([("rope.py", ""), ("rope.py/yarn.py", "")], ["rope"], "not unpacked: rope.py/yarn.py"),
        (
            [*((f"{i}.txt", "") for i in range(600)), ("rope.py", "")],
            ["rope"],
            "holds 601 files; only 500 are",
        ),
        ([("C:\\work\\rope.py", "")], ["rope"], ""),
    ],
)
def test_one_odd_entry_of_an_archive_does_not_cost_the_others(entries, wanted, remark, tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "ann.zip").write_bytes(archive_of(*entries))
    found, _ = look(tmp_path / "class", tmp_path)
    assert list(found["ann"].files) == wanted
    assert any(remark in one for one in found["ann"].remarks) == bool(remark)


def test_an_encrypted_or_spoilt_archive_is_named(tmp_path):
    encrypted = bytearray(archive_of(("rope.py", "x = 1\n" * 99)))
    encrypted[6] |= 1
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(encrypted)
    assert unzip(tmp_path / "a.zip", tmp_path / "out") == "a.zip: cannot be unpacked: it is encrypted"
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("rope.py", "x = 1\n" * 99)
    spoilt = bytearray((tmp_path / "b.zip").read_bytes())
    spoilt[45:60] = bytes(15)
    (tmp_path / "b.zip").write_bytes(spoilt)
    assert unzip(tmp_path / "b.zip", tmp_path / "out").startswith("b.zip: cannot be unpacked: ")


def test_a_name_that_is_not_utf8_can_be_written(tmp_path):
    lay_out(tmp_path / "class" / "bob", "rope.py")
    odd = os.fsencode(tmp_path / "class") + b"/\xffnn"
    os.mkdir(odd)
    with open(odd + b"/\xff.py", "w") as file:
        file.write("x = 1\n")
    found, _ = look(tmp_path / "class", tmp_path)
    assert "".join([*found, *(remark for one in found.values() for remark in one.remarks)]).encode()


def test_files_beyond_the_limit_are_counted_and_answers_come_first(tmp_path):
    lay_out(tmp_path / "class" / "ann", *(f"{number}.txt" for number in range(600)), "rope.py")
    lay_out(tmp_path / "class" / "bob", "rope.py")
    found, _ = look(tmp_path / "class", tmp_path)
    assert (
        list(found["ann"].files) == ["rope"] and "601 files; only 500 are looked at" in found["ann"].remarks
    )


def test_a_single_submission_is_the_folder_itself_also_under_another_name(tmp_path):
    for number, files in enumerate((["router.py"], ["Router (2).py"], ["homework/router.py"])):
        folder = tmp_path / f"hers{number}"
        lay_out(folder, *files)
        found, loose = look(folder, tmp_path)
        assert list(found) == [folder.name] and list(found[folder.name].files) == ["router"] and not loose


def test_a_folder_without_submissions_is_refused_and_its_files_named(tmp_path):
    refused(lambda: look(tmp_path / "none", tmp_path), "none: no such folder")
    (tmp_path / "class").mkdir()
    refused(lambda: look(tmp_path / "class", tmp_path), "no submissions found; expected one folder or zip")
    lay_out(tmp_path / "class", "essay.txt")
    refused(lambda: look(tmp_path / "class", tmp_path), "essay.txt fit no exercise")


def test_links_and_odd_names_are_not_followed_but_named(tmp_path):
    folder = tmp_path / "class"
    lay_out(folder / "bob", "rope.py")
    lay_out(folder / "e\x1b[2Jve", "x\x1by.py")
    (folder / "ann").mkdir()
    (folder / "ann" / "router.py").symlink_to("/dev/zero")
    (folder / "ann" / "homework").symlink_to("/")
    (folder / "everything").symlink_to("/")
    os.mkfifo(folder / "ann" / "rope.py")
    found, loose = look(folder, tmp_path)
    assert set(found) == {"ann", "bob", "e\\x1b[2Jve"} and loose == ["everything"]
    assert set(found["ann"].files) == {"router", "rope"}  # refused by name when read
    assert "fit no exercise: homework" in found["ann"].remarks[0]
    assert "x\\x1by.py" in found["e\\x1b[2Jve"].remarks[0]
