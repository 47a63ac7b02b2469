"""Folders of safetensors: round trips, and one-line errors that name the damaged or hostile file."""

import itertools
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lm import files
from lm.hub import shards
from tests import helpers

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c.weight": torch.full((3, 1, 2), -2.0, dtype=torch.float64),
    "d": torch.tensor(7.0, dtype=torch.float16),
    "e": torch.tensor([[1.5, 448.0]]).to(torch.float8_e4m3fn),
}


def written(folder, shard_bytes=10**9, tensors=TENSORS):
    folder.mkdir()
    parts = ((name, tensor.nbytes, tensor.clone) for name, tensor in tensors.items())
    shards.write(folder, parts, shard_bytes)
    return folder


def equal(found, wanted):
    return found.dtype == wanted.dtype and torch.equal(found.double(), wanted.double())


@pytest.mark.parametrize("shard_bytes, count", [(10**9, 1), (60, 2), (48, 3), (10, 4), (1, 5)])
def test_written_tensors_are_surveyed_and_read(tmp_path, shard_bytes, count):
    folder = written(tmp_path / "x", shard_bytes)
    found = shards.survey(folder)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert equal(files.read_tensor(name, found[name]), tensor)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if count == 1:
        assert names == ["model.safetensors"] and len(list(folder.iterdir())) == 1
    else:
        assert names == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": sum(t.nbytes for t in TENSORS.values())}
        assert index["weight_map"] == {n: f.name for f in folder.glob("*.safetensors") for n in load_file(f)}


def test_a_shard_exceeds_its_limit_only_for_a_single_tensor(tmp_path):
    folder = written(tmp_path / "x", 40, {str(i): torch.zeros(i) for i in range(1, 14)})
    sizes = [[t.nbytes for t in load_file(path).values()] for path in sorted(folder.glob("*.safetensors"))]
    assert sum(map(len, sizes)) == 13
    assert all(sum(size) <= 40 or len(size) == 1 for size in sizes)
    for before, after in itertools.pairwise(sizes):
        assert sum(before) + after[0] > 40  # no shard is started early


def test_tensors_are_made_when_their_shard_is_written(tmp_path, monkeypatch):
    made, most = [], []
    save = shards.save_file
    monkeypatch.setattr(
        shards, "save_file", lambda found, *rest, **more: (most.append(len(made)), save(found, *rest, **more))
    )

    def make(number):
        made.append(number)
        return torch.zeros(4)

    shards.write(tmp_path, ((str(i), 16, lambda i=i: make(i)) for i in range(6)), 32)
    assert most == [2, 4, 6]


def test_files_carry_the_pytorch_format(tmp_path):
    from safetensors import safe_open

    for path in written(tmp_path / "x", 60).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}  # required by transformers


# --- hostile folders


def refused(folder, *said):
    """Reading every tensor in a folder is a one-line error that names the folder."""

    def read():
        for name, stored in shards.survey(folder).items():
            files.read_tensor(name, stored)

    helpers.refused(read, folder, *said)


@pytest.fixture
def sharded(tmp_path):
    """Two tensors in one.safetensors, three in two.safetensors, and their index."""
    folder = tmp_path / "x"
    folder.mkdir()
    names = list(TENSORS)
    for file, held in {"one": names[:2], "two": names[2:]}.items():
        save_file({name: TENSORS[name] for name in held}, folder / f"{file}.safetensors")
    placed = {name: "one.safetensors" if name in names[:2] else "two.safetensors" for name in names}
    (folder / shards.INDEX).write_text(json.dumps({"weight_map": placed}))
    return folder


def with_map(folder, **changes):
    path = folder / shards.INDEX
    placed = json.loads(path.read_text())["weight_map"] | changes
    path.write_text(json.dumps({"weight_map": {name: file for name, file in placed.items() if file}}))


def test_shards_may_have_any_name(sharded):
    found = shards.survey(sharded)
    assert all(equal(files.read_tensor(name, found[name]), tensor) for name, tensor in TENSORS.items())


OUTSIDE = [
    *("../x.safetensors", "/etc/x", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", "."),
    *(".hidden.safetensors", "x.bin", "x.safetensors\n", "", "\0.safetensors", "~/x.safetensors"),
]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_an_index_names_only_files_in_its_folder(sharded, name):
    for path in (sharded.parent / "x.safetensors", sharded / "a" / "b.safetensors"):  # both exist
        path.parent.mkdir(exist_ok=True)
        save_file({"a": TENSORS["a"]}, path)
    placed = json.loads((sharded / shards.INDEX).read_text())["weight_map"] | {"a": name}
    (sharded / shards.INDEX).write_text(json.dumps({"weight_map": placed}))
    refused(sharded, shards.INDEX, "is not a safetensors file in this folder")


def test_no_file_is_opened_before_all_names_are_checked(sharded, monkeypatch):
    with_map(sharded, e="../x.safetensors")
    monkeypatch.setattr(shards, "read_header", lambda path, *_: pytest.fail(f"{path} was opened"))
    refused(sharded, "../x.safetensors")


def test_links_may_lead_only_into_the_hugging_face_cache(sharded, tmp_path):
    hub = tmp_path / "models--x"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    snapshot = Path(shutil.move(sharded, hub / "snapshots" / "0a1b"))
    for number, path in enumerate(list(snapshot.iterdir())):
        path.rename(hub / "blobs" / f"{number:064x}")
        path.symlink_to(f"../../blobs/{number:064x}")
    found = shards.survey(snapshot)
    assert all(equal(files.read_tensor(name, found[name]), tensor) for name, tensor in TENSORS.items())
    outside = tmp_path / "outside.safetensors"
    shutil.copy(snapshot / "one.safetensors", outside)
    (snapshot / "one.safetensors").unlink()
    for target in (outside, hub / "snapshots" / "other.safetensors", "../../one.safetensors"):
        shutil.copy(outside, hub / "snapshots" / "other.safetensors")
        shutil.copy(outside, hub / "one.safetensors")
        (snapshot / "one.safetensors").symlink_to(target)
        refused(snapshot, "one.safetensors", "is a link out of the folder")
        (snapshot / "one.safetensors").unlink()
    (snapshot / "one.safetensors").symlink_to("one.safetensors")  # to itself
    refused(snapshot, "one.safetensors")


def test_links_without_an_index_may_lead_only_within_the_folder(tmp_path):
    folder = written(tmp_path / "x")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors").symlink_to("other.safetensors")
    assert shards.survey(folder).keys() == TENSORS.keys()
    (folder / "model.safetensors").unlink()
    (folder / "other.safetensors").rename(tmp_path / "y.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "y.safetensors")
    refused(folder, "model.safetensors", "is a link out of the folder")


def test_an_index_that_does_not_match_its_files_is_rejected(sharded):
    index = sharded / shards.INDEX
    whole = index.read_text()
    save_file(
        {"a": TENSORS["a"], **{n: TENSORS[n] for n in "cd" if n in TENSORS}}, sharded / "three.safetensors"
    )
    for changes, said in [
        ({"a": "four.safetensors"}, ["four.safetensors", "no such file"]),
        ({"a": "two.safetensors"}, ["one.safetensors", "holds a", "two.safetensors"]),
        ({"a": None}, ["one.safetensors", "holds a", "it is not in the index"]),
        ({"f": "two.safetensors"}, ["two.safetensors", "lacks f"]),
        ({"f": "three.safetensors"}, ["three.safetensors", "holds a", "one.safetensors"]),  # a is in both
    ]:
        with_map(sharded, **changes)
        refused(sharded, *said)
        index.write_text(whole)
    shards.survey(sharded)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "[1]",
            "1",
            "null",
            "{}",
            '{"weight_map": []}',
            '{"weight_map": {}}',
            '{"weight_map": {"a": 1}}',
        ),
        *(
            '{"weight_map": {"a": ["one.safetensors"]}}',
            '{"weight_map": "one.safetensors"}',
            '{"weight_map": null}',
        ),
        '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}',
        '{"a": ' * 100_000,
    ],
    ids=lambda text: text[:50],
)
def test_an_invalid_index_is_rejected(sharded, text):
    (sharded / shards.INDEX).write_text(text)
    refused(sharded, shards.INDEX)


JSONS = {
    "empty": b"",
    "not JSON": b"vocab_size = 3",
    "not UTF-8": b'{"a": "\xff"}',
    "a list": b"[1]",
    "a number": b"1",
    "a duplicate key": b'{"a": 1, "b": 2, "a": 1}',
    "a duplicate nested key": b'{"a": {"b": 2, "b": 1}}',
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "1e400": b'{"a": 1e400}',
    "5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "100,000 brackets": b'{"a": ' + b"[" * 100_000,
    "100,000 objects": b'{"a": ' * 100_000,
    "NUL": b"\0",
    "cut": b'{"a": 1',
    "trailing text": b'{"a": 1} x',
}


@pytest.mark.parametrize("content", JSONS.values(), ids=JSONS.keys())
def test_json_that_is_not_an_object_is_a_one_line_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_error_names_the_key_or_the_number(tmp_path):
    path = tmp_path / "x.json"
    for name, said in {"a duplicate key": "'a'", "NaN": "NaN", "1e400": "1e400", "a list": "list"}.items():
        path.write_bytes(JSONS[name])
        with pytest.raises(ValueError, match=said):
            files.read_json(path)


def test_json_without_a_file_is_rejected(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(ValueError, match="not a readable JSON file"):
            files.read_json(path)


def test_a_huge_file_is_not_read_as_json(tmp_path):
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.truncate(10**11)  # sparse: takes no disk space
    with pytest.raises(ValueError, match="larger than"):
        files.read_json(path)


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=20,
        ),
    )
)
def test_written_json_is_read_back(tmp_path_factory, found):
    path = tmp_path_factory.getbasetemp() / "same.json"
    try:
        files.write_json(path, found)
    except UnicodeEncodeError:
        return  # an unpaired surrogate
    assert files.read_json(path) == found


def raw(header, data=b""):
    """The bytes of a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


FILES = {
    "empty": b"",
    "7 bytes": b"1234567",
    "length 2^63": struct.pack("<Q", 2**63) + b"{}",
    "length 2^64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "length 100,000,001": struct.pack("<Q", 100_000_001) + b"{}",
    "length of the file": struct.pack("<Q", 10) + b"{}",
    "a list": raw([1]),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "100,000 brackets": raw(b"[" * 100_000),
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
    "a zip": b"PK\x03\x04" + b"\0" * 60,
    "beyond the end": raw(entry(offsets=(0, 80), shape=(20,)), b"\0" * 8),
    "cut short": raw(entry(), b"\0" * 7),
    "bytes left over": raw(entry(), b"\0" * 9),
    "a hole": raw(entry(offsets=(8, 16)), b"\0" * 16),
    "reversed": raw(entry(offsets=(8, 0)), b"\0" * 8),
    "negative": raw(entry(offsets=(-8, 0)), b"\0" * 8),
    "a different size": raw(entry(shape=(3,)), b"\0" * 8),
    "shape [-2]": raw(entry(shape=(-2,)), b"\0" * 8),
    "shape [2.0]": raw(entry(shape=(2.0,)), b"\0" * 8),
    "shape 2^62 x 2^62": raw(entry(shape=(2**62, 2**62)), b"\0" * 8),
    "shape (0, 2^63)": raw(entry(shape=(0, 2**63), offsets=(0, 0))),
    "dtype F99": raw(entry("F99"), b"\0" * 8),
    "dtype I8": raw(entry("I8", (8,)), b"\0" * 8),
    "dtype I64": raw(entry("I64", (1,)), b"\0" * 8),
    "dtype BOOL": raw(entry("BOOL", (8,)), b"\0" * 8),
    "dtype F8_E5M2": raw(entry("F8_E5M2", (8,)), b"\0" * 8),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_hostile_files_are_one_line_errors_that_name_them(tmp_path, content):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, str(folder / "model.safetensors"))
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_an_unknown_dtype_is_named_with_its_tensor(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(FILES["dtype I8"])
    refused(tmp_path, "model.safetensors: a is I8; expected one of", "BF16")


def test_a_header_too_long_for_its_tensors_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    for length, most in ((65 * 2**20, 10**9), (4096 + 400 * 7 + 1, 7)):
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(100 * 2**20)  # sparse: takes no disk space
        with pytest.raises(ValueError, match=f"model.safetensors: a header of {length} bytes is larger than"):
            shards.survey(tmp_path, most)
    empty = ",".join(f'"{i}":{{"dtype":"F64","shape":[0],"data_offsets":[0,0]}}' for i in range(300_000))
    path.write_bytes(raw(f"{{{empty}}}".encode()))
    with pytest.raises(ValueError, match="is larger than"):
        shards.survey(tmp_path, 2000)


def test_an_index_too_long_for_its_tensors_is_not_read(sharded):
    index = sharded / shards.INDEX
    index.write_text(index.read_text() + " " * 10_000)
    assert shards.survey(sharded, 100).keys() == TENSORS.keys()
    with pytest.raises(ValueError, match=r"index\.json: .*larger than"):
        shards.survey(sharded, 5)


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)], ids=["pipe", "folder", "loop"]
)
@pytest.mark.parametrize("name", ["model.safetensors", shards.INDEX])
def test_pipes_folders_and_link_loops_are_rejected(tmp_path, name, make):
    make(tmp_path / name)
    refused(tmp_path, "holds no model.safetensors and no model.safetensors.index.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_rejected_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(FILES["a pickle"])
    refused(tmp_path, name, "pickle files are never read; convert it to safetensors")


def test_a_file_truncated_after_the_survey_is_a_one_line_error(tmp_path):
    folder = written(tmp_path / "x")
    found = shards.survey(folder)
    os.truncate(folder / "model.safetensors", 20)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        files.read_tensor("a", found["a"])
    os.remove(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        files.read_tensor("a", found["a"])
