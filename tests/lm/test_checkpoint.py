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
import torch._dynamo  # loading needs it, and the first import takes seconds: not the folder's fault
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lm import checkpoint, files
from lm.checkpoint import load, load_checkpoint, newest_checkpoint, save, save_checkpoint
from lm.config import Config
from lm.hub.hf import from_hf, to_hf
from lm.inference.generate import generate
from lm.model import Transformer
from lm.optim import build_optimizer
from tests.helpers import ROOT, content


def bits(model):
    """Every stored tensor's dtype, shape and bytes."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in model.state_dict().items()
    }


KINDS = {
    "mla": {},
    "tied": {"model": {"tie_embeddings": True}},
    "gqa, softmax": {"attention": {"kind": "gqa"}, "moe": {"router": "softmax"}},
    "all dense": {"model": {"num_dense_layers": 3}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_what_is_saved_is_loaded_bit_for_bit(tiny, make_model, tmp_path, changes, dtype):
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


def test_a_model_that_has_written_text_is_saved_as_any_other(tiny, make_model, tmp_path):
    model = make_model(tiny().model)
    before = bits(model)
    generate(model, torch.tensor([[1, 2, 3]]), 2)
    assert not all(tensor.is_contiguous() for tensor in model.state_dict().values())  # an engine laid it out
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


def test_loaded_weights_are_memory_of_their_own(tiny, make_model, tmp_path):
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


def test_saving_into_a_folder_that_holds_something_is_refused(tiny, make_model, tmp_path):
    model = make_model(tiny().model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = content(tmp_path)
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=f"{name}: is not an empty folder"):
            save(model, tmp_path / name)
    assert content(tmp_path) == before
    save(model, tmp_path / "empty")
    assert bits(load(tmp_path / "empty")) == bits(model)


# --- hostile folders


def raw(header, data=b""):
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def taken_apart(path):
    """-> header, data of a whole file"""
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
    "another name": renamed,
    "one matrix in fp32": of_dtype("F32", 4),
    "one matrix in int32": of_dtype("I32", 4),
    "all in fp8": of_dtype("F8_E4M3", 1, lambda name: True),
    "bias in bf16": of_dtype("BF16", 2, lambda name: name.endswith("router.bias")),
    "a NaN": with_numbers(1.0, float("nan")),
    "infinities": with_numbers(float("inf"), float("-inf")),
}


@pytest.fixture(scope="module")
def whole(tiny, make_model, tmp_path_factory):
    """A saved model in float64. Only to be copied."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    save(make_model(tiny().model), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(folder, *said, names=None):
    """load(folder) is one ValueError line within seconds, and nothing in the folder changes -> the line"""
    before, began = content(folder.parent), time.process_time()
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert time.process_time() - began < 5
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert str(names or folder) in message
    assert all(word in message for word in said), message
    assert content(folder.parent) == before
    return message


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_hostile_weights_are_one_line_that_names_the_file(folder, change):
    path = folder / "model.safetensors"
    path.write_bytes(change(*taken_apart(path)))
    refused(folder, names=path)


@pytest.mark.parametrize(
    "change, said",
    [
        ("7 bytes", ["not a safetensors file"]),
        ("300,000 empty tensors", ["a header of ", "larger than needed (at most "]),
        ("one missing", ["lacks 1 tensors", NAME]),
        ("one too many", ["has besides 1 tensors", "extra"]),
        ("transposed", [NAME, "(16, 12)", "(12, 16)"]),
        ("(192,) for (12, 16)", [NAME, "(192,)", "(12, 16)"]),
        ("I64 for F64", [NAME, "I64", "F64"]),
        ("one matrix in fp32", ["several dtypes", "torch.float32", "torch.float64"]),
        ("bias in bf16", ["blocks.1.mlp.router.bias", "torch.bfloat16", "torch.float32"]),
        ("a NaN", [NAME, "holds 1 number"]),
        ("infinities", [NAME, "holds 2 numbers"]),
    ],
)
def test_the_line_says_what_is_wrong(folder, change, said):
    path = folder / "model.safetensors"
    path.write_bytes(WEIGHTS[change](*taken_apart(path)))
    refused(folder, *said)


def test_many_missing_tensors_are_counted_and_five_named(folder):
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    expected = len(Transformer(load_config(folder).model).state_dict())
    message = refused(folder, f"lacks {expected} tensors")
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
    "another dim": ("\ndim = 16", "\ndim = 32"),
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
    "router of no name": ('router = "sigmoid"', 'router = "evil"'),
    "attention of no name": ('kind = "mla"', 'kind = "../evil"'),
    "no text": ('router = "sigmoid"', "router = 7"),
    "a list": ("[model.moe]", "[[model.moe]]"),
}


@pytest.mark.parametrize("old, new", CONFIGS.values(), ids=CONFIGS.keys())
def test_hostile_configs_are_one_line_that_names_the_folder(folder, old, new):
    with_config(folder, old, new)
    refused(folder)


@pytest.mark.parametrize(
    "text", [b"", b"[model]\n", b"\xef\xbb\xbf[model]", b"\xff\xfe", b"{}", b"\0"], ids=repr
)
def test_configs_that_are_no_config_of_these_weights_are_refused(folder, text):
    (folder / "config.toml").write_bytes(text)
    refused(folder)


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)], ids=["pipe", "folder", "loop"]
)
@pytest.mark.parametrize("name", ["config.toml", "model.safetensors"])
def test_what_is_no_file_is_refused(folder, name, make):
    (folder / name).unlink()
    make(folder / name)
    refused(folder)


def test_folders_without_what_is_needed_are_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    refused(folder, "no checkpoint yet")
    (folder / "config.toml").unlink()
    refused(folder, "holds no config.toml")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(
            ValueError, match=f"{path.name}: is not a folder; expected a run or a saved model"
        ):
            load(path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pkl", "checkpoints/step-000001/model.bin"]
)
def test_pickles_are_never_looked_at(folder, name):
    (folder / "model.safetensors").unlink()
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(folder)
    assert not Path("pwned").exists()


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module whose import leaves a mark."""
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
    with pytest.raises(
        ValueError,
        match=r"config.toml: .*'evil_part:.* is code; importing it needs trust_code \(--trust-code\)",
    ):
        load(folder)
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


def test_loading_hostile_folders_runs_and_writes_nothing(whole, evil, tmp_path):
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
    assert [
        entry for entry in seen if not entry[1].startswith(("('torch", "('numpy"))
    ] == []  # their own lazy imports
    assert grown < 64 * 1024 + 2 * 20 * 1024, f"{grown} kB more memory"  # the largest file has 20 MB
    assert content(tmp_path) == before


@pytest.fixture(scope="module")
def edited(whole, tmp_path_factory):
    """A copy of the saved model, edited again and again."""
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


# --- checkpoints of a run


def state_of(step):
    return {
        "step": step,
        "tokens": step * 64,
        "seconds": 1.5,
        "dtype": "torch.float32",
        "cpu_capability": "x",
        "threads": 1,
        "torch": torch.__version__,
    }


def stepped(config, steps=2, dtype=torch.float32):
    """A model and its optimizer after some steps."""
    model = Transformer(config.model).to(dtype)
    model.initialize(torch.Generator().manual_seed(0))
    optimizer = build_optimizer(model, config.train)
    for step in range(steps):
        model(torch.arange(step, step + 8).unsqueeze(0)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for router in model.routers():
            if router.bias is not None:
                router.bias += 0.1
    return model, optimizer


@pytest.fixture
def run(tmp_path, tiny):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(tiny().to_toml())
    return tmp_path / "run"


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
    for held in (model, fresh):  # and both go on alike
        held(torch.arange(8).unsqueeze(0)).logits.square().mean().backward()
    optimizer.step()
    other.step()
    assert bits(fresh) == bits(model)


def test_a_resumed_optimizer_is_memory_of_its_own(tiny, run):
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


def test_the_millionth_step_comes_after_the_one_before(tiny, run):
    model, optimizer = stepped(tiny())
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save_checkpoint(run, model, optimizer, state_of(step), keep=2)
        assert newest_checkpoint(run).name == f"step-{step:06d}"
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-1000000", "step-1000001"]


def test_what_a_killed_save_left_is_cleared_by_the_next(tiny, run):
    model, optimizer = stepped(tiny())
    for name in (".step-000003.tmp", ".step-000007.tmp"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "model.safetensors").write_text("half")
    save_checkpoint(run, model, optimizer, state_of(3), keep=2)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000003"]
    assert bits(load(run)) == bits(model)


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
    files = {("fsync", name) for name in ("model.safetensors", "optimizer.safetensors", "state.json")}
    assert set(events[:3]) == files
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
def test_a_save_that_fails_anywhere_harms_nothing(tiny, run, monkeypatch, owner, function, number, error):
    model, optimizer = stepped(tiny())
    first = save_checkpoint(run, model, optimizer, state_of(1), keep=1)
    before = content(run)
    owned = {"os": os, "checkpoint": checkpoint, "Path": Path}[owner]
    working, calls = getattr(owned, function), []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == number + 1:
            raise error
        return working(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owned, function, failing)
        with pytest.raises(type(error)):
            save_checkpoint(run, model, optimizer, state_of(2), keep=1)
    if (owner, function, number) == (
        "os",
        "fsync",
        4,
    ):  # the new one is in place already, the old not yet removed
        assert {name: held for name, held in content(run).items() if "step-000002" not in name} == before
    else:
        assert content(run) == before
        assert newest_checkpoint(run) == first
    save_checkpoint(run, model, optimizer, state_of(2), keep=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]


def test_a_save_of_a_model_that_fails_leaves_nothing(tiny, make_model, tmp_path, monkeypatch):
    model = make_model(tiny().model)

    def failing(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.raises(OSError, match="No space"):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(checkpoint, "sync", failing)
    (tmp_path / "config.toml").write_text("before")
    with pytest.raises(OSError, match="No space"):
        files.write_file(tmp_path / "config.toml", "after")
    assert content(tmp_path) == {"config.toml": b"before"}


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
    with pytest.warns(UserWarning, match="passed over") as caught:
        loaded = load(run)
    assert bits(loaded) == models[0]
    assert len(caught) == 1 and str(path) in str(caught[0].message)


def test_when_all_are_damaged_it_is_one_line(tiny, run):
    two_checkpoints(run, tiny())
    for path in (run / "checkpoints").iterdir():
        cut(path / "model.safetensors")
    with (
        pytest.warns(UserWarning, match="passed over") as caught,
        pytest.raises(ValueError, match="run: every checkpoint is damaged"),
    ):
        load(run)
    assert len(caught) == 2


def test_a_run_without_checkpoints_says_so(run):
    with pytest.raises(ValueError, match="run: no checkpoint yet"):
        load(run)


def test_names_that_are_no_checkpoints_are_passed_over(tiny, run):
    models = two_checkpoints(run, tiny())
    (run / "checkpoints" / "step-9").write_text("a file")
    (run / "checkpoints" / "step-zzz").mkdir()
    (run / "checkpoints" / ".step-000003.tmp").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bits(load(run)) == models[1]
