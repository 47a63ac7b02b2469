"""Watch the calls of one function: what it changes, which memory it shares, and in which precision it computes.

The probe of an exercise compares numbers; these are the faults that right numbers can hide.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

NARROW = (torch.bfloat16, torch.float16)
# operations whose results are poor in 8 bits of precision: in fp32 wherever the package computes them
DELICATE = {
    *("_softmax", "_log_softmax", "exp", "exp2", "expm1", "log", "logsumexp", "sigmoid", "log_sigmoid"),
    *("sin", "cos", "polar", "pow", "rsqrt", "sqrt", "reciprocal", "mean", "var", "linalg_vector_norm"),
    *("cumsum", "_fused_rms_norm", "native_layer_norm"),
}
MEMORY, PRECISION = "memory", "precision"  # the two facts noted, as names of an outcome's entries


class Precision(TorchDispatchMode):
    """Notes the DELICATE operations that run in a narrow dtype."""

    def __init__(self, notes: set[str]):
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in DELICATE:
            narrow = [one.dtype for one in args if isinstance(one, Tensor) and one.dtype in NARROW]
            wide = (kwargs or {}).get("dtype") in (torch.float32, torch.float64)
            if narrow and not wide:
                self.notes.add(f"{name.strip('_')} runs in {str(narrow[0]).removeprefix('torch.')}")
        return func(*args, **(kwargs or {}))


def tensors_in(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an argument, a result or an object's state, with their names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        for part, tensor in [*value.named_parameters(), *value.named_buffers()]:
            yield f"{name}.{part}", tensor
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part, name)
    elif isinstance(value, tuple | list):
        for part in value[:64]:
            yield from tensors_in(part, name)


def memory(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 if it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def state_of(this: Any) -> list[tuple[str, Tensor]]:
    """The tensors that an object holds."""
    held = list(tensors_in(this, "self")) if isinstance(this, nn.Module) else []
    for name, value in vars(this).items() if hasattr(this, "__dict__") else ():
        if not name.startswith("_"):
            held += tensors_in(value, f"self.{name}")
    return held


def watched(original: Callable[..., Any], notes: dict[str, set[str]]) -> Callable[..., Any]:
    """The same function; every call adds to the notes."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        this = given.pop("self", None)
        inputs = [pair for name, value in given.items() for pair in tensors_in(value, name)]
        state = state_of(this)
        copies = [tensor.detach().clone() for _, tensor in inputs + state]
        before = {memory(tensor) for _, tensor in state}
        with Precision(notes[PRECISION]):
            result = original(*args, **kwargs)
        said = notes[MEMORY]
        for (name, tensor), copy in zip(inputs + state, copies):
            now = tensor.detach()
            if not ((now == copy) | ((now != now) & (copy != copy))).all():
                said.add(f"{name} is changed in place")
        owner = {memory(tensor): name for name, tensor in inputs if tensor.numel()}
        for _, tensor in tensors_in(result, "the result"):
            if shared := owner.get(memory(tensor)):
                said.add(f"the result shares memory with {shared}: a later change of one changes the other")
        for held, tensor in state_of(this):
            address = memory(tensor)
            if address not in before and (shared := owner.get(address)):
                said.add(f"{held} shares memory with {shared}: copy it, the caller may overwrite it")
        return result

    return call


def watch(module: types.ModuleType, function: str) -> dict[str, set[str]]:
    """Watch a function of a module, by its dotted name -> the notes"""
    *classes, last = function.split(".")
    owner: Any = functools.reduce(getattr, classes, module)
    notes: dict[str, set[str]] = {MEMORY: set(), PRECISION: set()}
    setattr(owner, last, watched(vars(owner)[last], notes))
    return notes


def backward(loss: Tensor) -> None:
    """loss.backward(), or nothing if no gradient can reach the inputs: then the comparison says so."""
    if loss.requires_grad:
        loss.backward()
