"""The machine: device, dtype, compiler, memory."""

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable

import torch


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto": a GPU if available.

    Raises:
        ValueError: no such device on this machine.
    """
    found = ["cpu"]
    if torch.cuda.is_available():
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + found
    elif torch.backends.mps.is_available():
        found = ["mps", *found]
    if name == "auto":
        return torch.device(found[0])
    if name in found or f"{name}:0" in found:
        return torch.device(name)
    raise ValueError(f"device {name!r} was not found; available: {', '.join(found)}")


def or_cpu(name: str, device: torch.device, trial: Callable[[torch.device], object]) -> torch.device:
    """The device, or the CPU if `name` is "auto" and a trial on an MPS device fails.

    PyTorch's MPS backend lacks operators, and float64; which ones a model needs shows only when it runs.
    """
    if name != "auto" or device.type != "mps":
        return device
    try:
        trial(device)
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        warnings.warn(f"using the CPU: a trial on {device} fails: {said:.200}", stacklevel=2)
        return torch.device("cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; "auto": bf16 if the hardware supports it, else fp32.

    A CPU without bf16 units emulates it a hundred times slower than fp32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and bf16_units() != ""
    return torch.bfloat16 if native else torch.float32


def check_compiler(device: torch.device, asked: str) -> None:
    """Raise ValueError naming the option `asked` if torch.compile has no C++ compiler."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    name = os.environ.get("CXX") or default
    if device.type == "cpu" and shutil.which(name) is None:
        raise ValueError(
            f"{asked}: torch.compile needs a C++ compiler, and {name!r} was not found; "
            "install it, or set the environment variable CXX to another"
        )


def memory() -> int:
    """Bytes of main memory; 0 if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def bf16_units() -> str:
    """The CPU's bf16 units that PyTorch uses: "AMX" (tiles), "BF16" (AVX-512 instructions) or "" (none).

    ATEN_CPU_CAPABILITY can disable them.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return ""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "BF16" if torch.cpu._is_avx512_bf16_supported() else ""


def describe(device: torch.device | None = None) -> dict[str, str | int]:
    """The hardware and versions, to be stored with a measurement."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
        cpu = names[0] if names else cpu
    facts: dict[str, str | int] = {
        "cpu": cpu,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "cpu_capability": f"{torch.backends.cpu.get_cpu_capability()} {bf16_units()}".strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": sys.platform,
    }
    if device is not None and device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts
