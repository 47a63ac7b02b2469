import json

import pytest
import torch

from lm import machine
from tests.helpers import refused


def pretend(monkeypatch, gpus=0, mps=False, bf16=True, amx=False, avx512_bf16=False, capability="AVX512"):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
    )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


@pytest.mark.parametrize(
    "gpus, mps, name, want",
    [
        (0, False, "auto", "cpu"),
        (0, False, "cpu", "cpu"),
        (2, False, "auto", "cuda:0"),
        (2, False, "cuda", "cuda"),
        (2, False, "cuda:1", "cuda:1"),
        (2, False, "cpu", "cpu"),
        (0, True, "auto", "mps"),
        (0, True, "mps", "mps"),
        (0, True, "cpu", "cpu"),
    ],
)
def test_a_device_is_found_by_name_and_auto_prefers_a_gpu(monkeypatch, gpus, mps, name, want):
    pretend(monkeypatch, gpus, mps)
    assert machine.pick_device(name) == torch.device(want)


@pytest.mark.parametrize(
    "gpus, name, found",
    [
        (0, "cuda", "cpu"),
        (0, "", "cpu"),
        (0, "gpu", "cpu"),
        (0, "meta", "cpu"),
        (2, "cuda:2", "cuda:0, cuda:1, cpu"),
        (1, "mps", "cuda:0, cpu"),
    ],
)
def test_a_missing_device_lists_the_available_ones(monkeypatch, gpus, name, found):
    pretend(monkeypatch, gpus)
    assert refused(lambda: machine.pick_device(name)) == f"device {name!r} was not found; available: {found}"


@pytest.mark.parametrize(
    "device, amx, bf16, want",
    [
        ("cpu", False, True, torch.float32),
        ("cpu", True, False, torch.bfloat16),
        ("cuda", False, True, torch.bfloat16),
        ("cuda", True, False, torch.float32),  # emulated: not native
        ("mps", True, True, torch.float32),
    ],
)
def test_auto_dtype_is_bf16_only_where_the_hardware_has_it(monkeypatch, device, amx, bf16, want):
    pretend(monkeypatch, amx=amx, bf16=bf16)
    assert machine.pick_dtype("auto", torch.device(device)) == want


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("amx", [True, False])
def test_a_named_dtype_is_used(monkeypatch, name, amx):
    pretend(monkeypatch, amx=amx)
    assert machine.pick_dtype(name, torch.device("cpu")) == getattr(torch, name)


def test_the_description_is_json_and_names_what_measurements_depend_on():
    facts = machine.describe(torch.device("cpu"))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["cpu_capability"]


@pytest.mark.parametrize(
    "amx, avx512_bf16, dtype, capability",
    [
        (False, False, torch.float32, "AVX512"),
        (False, True, torch.bfloat16, "AVX512 BF16"),
        (True, True, torch.bfloat16, "AVX512 AMX"),
    ],
)
def test_bf16_instructions_without_tiles_count_too(monkeypatch, amx, avx512_bf16, dtype, capability):
    pretend(monkeypatch, amx=amx, avx512_bf16=avx512_bf16)
    assert machine.pick_dtype("auto", torch.device("cpu")) == dtype
    assert machine.describe()["cpu_capability"] == capability


def test_matrix_units_that_pytorch_was_told_not_to_use_do_not_count(monkeypatch):
    pretend(monkeypatch, amx=True, avx512_bf16=True, capability="AVX2")
    assert machine.pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert machine.describe()["cpu_capability"] == "AVX2"
