"""Damaged and hostile folders: each is refused in one line, and nothing in it is run."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lm.checkpoint import load, save
from lm.config import Config
from lm.model import Transformer
from tests.helpers import ROOT, content, refused
from tests.lm.runs import bits


def raw(header, data=b""):
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def taken_apart(path):
    """A safetensors file -> its header and data"""
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


NAME = "blocks.0.attention.kv_a.weight"  # (12, 16)


def changed(**fields):
    def change(header, data):
        header[NAME] |= fields
        return raw(header, data)

    return change


def shifted(by):
    def change(header, data):
        header[NAME]["data_offsets"] = [offset + by for offset in header[NAME]["data_offsets"]]
        return raw(header, data)

    return change


def reversed_offsets(header, data):
    header[NAME]["data_offsets"].reverse()
    return raw(header, data)


def with_a_hole(header, data):
    for entry in header.values():
        entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    return raw(header, b"\0" * 8 + data)


def swapped_shape(header, data):
    header[NAME]["shape"].reverse()
    return raw(header, data)


def without_one(header, data):
    tensors = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    del tensors[NAME]
    return rebuilt(header, tensors)


def rebuilt(header, tensors):
    at, entries = 0, {}
    for name, piece in tensors.items():
        entries[name] = {**header[name], "data_offsets": [at, at + len(piece)]}
        at += len(piece)
    return raw(entries, b"".join(tensors.values()))


def with_one_more(header, data):
    header["extra"] = {"dtype": "F64", "shape": [1], "data_offsets": [len(data), len(data) + 8]}
    return raw(header, data + b"\0" * 8)


def renamed(header, data):
    return raw({("x" if name == NAME else name): entry for name, entry in header.items()}, data)


def of_dtype(dtype, size, chosen=lambda name: name == NAME):
    def change(header, data):
        tensors = {}
        for name, entry in header.items():
            piece = data[slice(*entry["data_offsets"])]
            if chosen(name):
                header[name]["dtype"], piece = dtype, b"\0" * (len(piece) // 8 * size)
            tensors[name] = piece
        return rebuilt(header, tensors)

    return change


def with_numbers(*values):
    def change(header, data):
        start = header[NAME]["data_offsets"][0]
        data = bytearray(data)
        data[start : start + 8 * len(values)] = struct.pack(f"<{len(values)}d", *values)
        return raw(header, bytes(data))

    return change


def many_empty_tensors(header, data):
    empty = f'"dtype":"F64","shape":[0],"data_offsets":[{len(data)},{len(data)}]'
    more = ",".join(f'"{i}":{{{empty}}}' for i in range(300_000))
    return raw(f"{json.dumps(header)[:-1]},{more}}}".encode(), data)


WEIGHTS = {
    "empty": lambda header, data: b"",
    "7 bytes": lambda header, data: b"1234567",
    "length 2^63": lambda header, data: struct.pack("<Q", 2**63) + b"{}",
    "length 100,000,001": lambda header, data: struct.pack("<Q", 100_000_001) + b"{}",
    "length of the file": lambda header, data: struct.pack("<Q", 10) + b"{}" + b" " * 8,
    "header a list": lambda header, data: raw([1]),
    "header not UTF-8": lambda header, data: raw(b'{"\xff": 1}'),
    "100,000 brackets": lambda header, data: raw(b"[" * 100_000),
    "100,000 objects": lambda header, data: raw(b'{"a":' * 100_000),
    "no header": lambda header, data: raw(b"{}"),
    "text": lambda header, data: b"PK\x03\x04 a zip, or something else that was pickled",
    "overlapping": shifted(-8),
    "beyond the end": shifted(10**9),
    "negative": shifted(-(10**9)),
    "a hole": with_a_hole,
    "reversed": reversed_offsets,
    "bytes left over": lambda header, data: raw(header, data + b"more"),
    "cut short": lambda header, data: raw(header, data[:-1]),
    "cut in half": lambda header, data: raw(header, data)[: len(data) // 2],
    "shape [-2]": changed(shape=[-2]),
    "shape [2.0]": changed(shape=[2.0]),
    "shape text": changed(shape="12"),
    "shape 2^62 x 2^62": changed(shape=[2**62, 2**62]),
    "shape (0, 2^63)": changed(shape=[0, 2**63]),
    "rank 70": changed(shape=[1] * 68 + [12, 16]),
    "dtype F99": changed(dtype="F99"),
    "I64 for F64": changed(dtype="I64"),
    "transposed": swapped_shape,
    "(1, 12, 16) for (12, 16)": changed(shape=[1, 12, 16]),
    "(192,) for (12, 16)": changed(shape=[192]),
    "300,000 empty tensors": many_empty_tensors,
    "one missing": without_one,
    "one too many": with_one_more,
    "renamed": renamed,
    "one matrix in fp32": of_dtype("F32", 4),
    "one matrix in int32": of_dtype("I32", 4),
    "all in fp8": of_dtype("F8_E4M3", 1, lambda name: True),
    "bias in bf16": of_dtype("BF16", 2, lambda name: name.endswith("router.bias")),
    "a NaN": with_numbers(1.0, float("nan")),
    "infinities": with_numbers(float("inf"), float("-inf")),
}


@pytest.fixture(scope="module")
def whole(tiny, make_model, tmp_path_factory):
    """A saved model in float64, to be copied and not changed."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    save(make_model(tiny().model), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load_refused(folder, *said, names=None):
    """load(folder) is a one-line ValueError within seconds, and changes nothing in the folder -> the line"""
    before, began = content(folder.parent), time.process_time()
    message = refused(lambda: load(folder), names or folder, *said)
    assert time.process_time() - began < 5
    assert content(folder.parent) == before
    return message


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_hostile_weights_are_one_line_that_names_the_file(folder, change):
    path = folder / "model.safetensors"
    path.write_bytes(change(*taken_apart(path)))
    load_refused(folder, names=path)


@pytest.mark.parametrize(
    "change, said",
    [
        ("7 bytes", ["not a safetensors file"]),
        ("300,000 empty tensors", ["a header of ", "larger than needed (at most "]),
        ("one missing", ["1 missing tensors", NAME]),
        ("one too many", ["1 unexpected tensors", "extra"]),
        ("transposed", [NAME, "(16, 12)", "(12, 16)"]),
        ("(192,) for (12, 16)", [NAME, "(192,)", "(12, 16)"]),
        ("I64 for F64", [NAME, "I64", "F64"]),
        ("one matrix in fp32", ["several dtypes", "torch.float32", "torch.float64"]),
        ("bias in bf16", ["blocks.1.mlp.router.bias", "torch.bfloat16", "torch.float32"]),
        ("a NaN", [NAME, "holds 1 NaN or infinite number"]),
        ("infinities", [NAME, "holds 2 NaN or infinite numbers"]),
    ],
)
def test_the_error_says_what_is_wrong(folder, change, said):
    path = folder / "model.safetensors"
    path.write_bytes(WEIGHTS[change](*taken_apart(path)))
    load_refused(folder, *said)


def test_many_missing_tensors_are_counted_and_five_named(folder):
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    expected = len(Transformer(load_config(folder).model).state_dict())
    message = load_refused(folder, f"{expected} missing tensors")
    assert message.count("blocks.") + message.count("embedding") == 5


def load_config(folder):
    return Config.load(folder / "config.toml")


def with_config(folder, old, new):
    path = folder / "config.toml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


CONFIGS = {
    "dim 10^9": ("\ndim = 16", "\ndim = 1000000000"),
    "dim 2^31 - 1": ("\ndim = 16", "\ndim = 2147483647"),
    "dim 10^18": ("\ndim = 16", f"\ndim = {10**18}"),
    "different dim": ("\ndim = 16", "\ndim = 32"),
    "dim as text": ("\ndim = 16", '\ndim = "16"'),
    "dim NaN": ("\ndim = 16", "\ndim = nan"),
    "dim 1e400": ("\ndim = 16", "\ndim = 1e400"),
    "dim of 5,000 digits": ("\ndim = 16", "\ndim = " + "9" * 5000),
    "dim of 400 digits": ("\ndim = 16", "\ndim = " + "9" * 400),
    "a key twice": ("\ndim = 16", "\ndim = 16\ndim = 16"),
    "100,000 brackets": ("\ndim = 16", "\ndim = " + "[" * 100_000),
    "an unknown key": ("\ndim = 16", "\ndim = 16\nwidth = 16"),
    "0 layers": ("num_layers = 3", "num_layers = 0"),
    "-1 layers": ("num_layers = 3", "num_layers = -1"),
    "10^6 layers": ("num_layers = 3", "num_layers = 1000000"),
    "1000 layers": ("num_layers = 3", "num_layers = 1000"),
    "2^31 experts": ("num_experts = 8", f"num_experts = {2**31 - 4}"),
    "2^31 heads": ("num_heads = 2", f"num_heads = {2**31 - 1}"),
    "eps 1e400": ("norm_eps = ", "norm_eps = 1e400 #"),
    "odd rope": ("qk_rope_head_dim = 4", "qk_rope_head_dim = 5"),
    "groups of one": ("num_groups = 4", "num_groups = 8"),
    "unknown router": ('router = "sigmoid"', 'router = "evil"'),
    "unknown attention": ('kind = "mla"', 'kind = "../evil"'),
    "a number for the router": ('router = "sigmoid"', "router = 7"),
    "a list": ("[model.moe]", "[[model.moe]]"),
}


@pytest.mark.parametrize("old, new", CONFIGS.values(), ids=CONFIGS.keys())
def test_hostile_configs_are_one_line_that_names_the_folder(folder, old, new):
    with_config(folder, old, new)
    load_refused(folder)


@pytest.mark.parametrize(
    "text", [b"", b"[model]\n", b"\xef\xbb\xbf[model]", b"\xff\xfe", b"{}", b"\0"], ids=repr
)
def test_configs_that_do_not_describe_the_weights_are_rejected(folder, text):
    (folder / "config.toml").write_bytes(text)
    load_refused(folder)


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)], ids=["pipe", "folder", "loop"]
)
@pytest.mark.parametrize("name", ["config.toml", "model.safetensors"])
def test_what_is_not_a_file_is_rejected(folder, name, make):
    (folder / name).unlink()
    make(folder / name)
    load_refused(folder)


def test_folders_without_config_or_weights_are_rejected(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    load_refused(folder, "no checkpoint yet")
    (folder / "config.toml").unlink()
    load_refused(folder, "holds no config.toml")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent", tmp_path / "file"):
        said = f"{path.name}: is not a folder; expected a run or a saved model"
        refused(lambda path=path: load(path), said)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pkl", "checkpoints/step-000001/model.bin"]
)
def test_pickles_are_never_opened(folder, name):
    (folder / "model.safetensors").unlink()
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_refused(folder)
    assert not Path("pwned").exists()


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that creates a file when imported -> the file's path"""
    (tmp_path / "evil_part.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w')\n"
        "import moe, mla\n"
        "class Router(moe.SigmoidRouter): pass\n"
        "class Attention(mla.MultiheadLatentAttention): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evil_part", raising=False)
    return tmp_path / "mark"


@pytest.mark.parametrize(
    "old, new",
    [('router = "sigmoid"', 'router = "evil_part:Router"'), ('kind = "mla"', 'kind = "evil_part:Attention"')],
)
def test_code_that_a_folder_names_is_not_imported_unless_trusted(folder, evil, old, new):
    model = load(folder)
    with_config(folder, old, new)
    said = "is code; importing it needs trust_code (--trust-code)"
    refused(lambda: load(folder), "config.toml: ", "'evil_part:", said)
    assert not evil.exists() and "evil_part" not in sys.modules
    assert bits(load(folder, trust_code=True)) == bits(model)
    assert evil.exists()


AUDIT = """
import json, resource, sys, warnings
import lm, lm.checkpoint, torch
warnings.simplefilter("ignore")
warm = lm.load(sys.argv[1])
seen = []
def hook(event, arguments):
    if event.split(".")[0] in ("exec", "compile", "import", "pickle", "subprocess", "socket"):
        seen.append((event, str(arguments)[:200]))
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if event == "os.system" or writes:
        seen.append((event, str(arguments)[:200]))
sys.addaudithook(hook)
refused, memory = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[2:]:
    try:
        lm.load(folder)
    except ValueError:
        refused += 1
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
print(json.dumps([refused, seen, grown]))
"""


def test_loading_hostile_folders_runs_nothing_and_writes_nothing(whole, evil, tmp_path):
    folders = []
    for number, change in enumerate(WEIGHTS.values()):
        folder = Path(shutil.copytree(whole, tmp_path / f"weights{number}"))
        path = folder / "model.safetensors"
        path.write_bytes(change(*taken_apart(path)))
        folders.append(folder)
    evil_configs = [
        ('router = "sigmoid"', 'router = "evil_part:Router"'),
        ('kind = "mla"', 'kind = "os:system"'),
    ]
    for number, (old, new) in enumerate([*CONFIGS.values(), *evil_configs]):
        folder = Path(shutil.copytree(whole, tmp_path / f"config{number}"))
        with_config(folder, old, new)
        folders.append(folder)
    before = content(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", AUDIT, str(whole), *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
    )
    number, seen, grown = json.loads(ran.stdout.splitlines()[-1])
    assert number == len(folders)
    lazy = ("('torch", "('numpy")  # their own lazy imports
    assert [entry for entry in seen if not entry[1].startswith(lazy)] == []
    assert grown < 64 * 1024 + 2 * 20 * 1024, f"{grown} kB more memory"  # the largest file has 20 MB
    assert content(tmp_path) == before


@pytest.fixture(scope="module")
def edited(whole, tmp_path_factory):
    """A copy of the saved model, to be edited repeatedly."""
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("edited") / "model"))


@settings(max_examples=150)
@given(
    name=st.integers(0, 10**6),
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "BOOL", "", None, True, [], {}])
    | st.lists(st.integers(-(2**65), 2**65) | st.integers(-3, 40) | st.floats(), max_size=4),
)
def test_any_single_edit_of_a_header_is_refused_or_the_same_model(whole, edited, name, field, value):
    path = edited / "model.safetensors"
    header, data = taken_apart(whole / "model.safetensors")
    names = sorted(header)
    header[names[name % len(names)]][field] = value
    path.write_bytes(raw(header, data))
    try:
        loaded = load(edited)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert bits(loaded) == bits(load(whole))


@settings(max_examples=100)
@given(at=st.integers(0, 10**9), value=st.integers(0, 255), cut=st.booleans())
def test_any_flipped_byte_of_a_header_or_cut_is_refused_or_the_same_shapes(whole, edited, at, value, cut):
    path = edited / "model.safetensors"
    stored = bytearray((whole / "model.safetensors").read_bytes())
    at %= len(stored) if cut else 8 + struct.unpack("<Q", stored[:8])[0]
    if cut:
        path.write_bytes(stored[:at])
    else:
        stored[at] = value
        path.write_bytes(stored)
    try:
        loaded = load(edited)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert not cut
        assert {n: t.shape for n, t in loaded.state_dict().items()} == {
            n: t.shape for n, t in load(whole).state_dict().items()
        }
