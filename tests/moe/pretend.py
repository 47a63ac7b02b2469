"""A Mac's GPU, pretended: tensors that say they are on MPS, compute on the CPU, and refuse float64."""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps")


class OnMPS(Tensor):
    """A CPU tensor that says it is on MPS. C++, which has no MPS here, is told that it is on meta."""

    inner: Tensor
    device = property(lambda self: MPS)
    is_cpu = is_cuda = is_meta = property(lambda self: False)
    is_mps = property(lambda self: True)

    @staticmethod
    def __new__(cls, inner):
        at = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device="meta", **at)
        made.inner = inner
        return made

    def tolist(self):  # which C++ allows no subclass
        return self.inner.tolist()

    def __repr__(self):
        return f"OnMPS({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Creates(TorchDispatchMode):
    """Creates tensors on the pretended device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Names(TorchFunctionMode):
    """Passes "mps" on to C++ as "meta"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and is_mps(kwargs.get("device")):  # is created out of a mode's sight
            return OnMPS(func(*args, **{**kwargs, "device": "cpu"}))
        args, kwargs = tree_map(lambda x: "meta" if is_mps(x) else x, (args, kwargs))
        return func(*args, **kwargs)


def is_mps(x):
    """Whether x names the device."""
    return isinstance(x, str | torch.device) and x in ("mps", MPS)


@contextmanager
def mps():
    """device="mps" works inside, without float64."""
    with Names(), Creates():
        yield


def run(func, args, kwargs):
    """The operator on the CPU; its result is on MPS if a tensor, or the device asked for, is."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    given = [t for t in tensors if isinstance(t, OnMPS)]
    asked = kwargs.get("device")
    there = bool(given) if asked is None else torch.device(asked).type != "cpu"
    numbers = [t for t in tensors if t.ndim == 0 and not isinstance(t, OnMPS)]  # may be mixed
    if given and len(given) + len(numbers) < len(tensors) and "copy" not in str(func):
        raise RuntimeError(f"{func}: expected all tensors on one device")
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, OnMPS) else x, (args, kwargs))
    if asked is not None:
        inner_kwargs["device"] = "cpu"
    out = func(*inner_args, **inner_kwargs)

    def wrap(value):
        if not isinstance(value, Tensor):
            return value
        if value.dtype == torch.float64 and (there or given):  # to the CPU too: cast on the device first
            raise TypeError(f"{func}: MPS has no float64")
        same = [t for t in given if t.inner is value]  # in place
        return same[0] if same else OnMPS(value) if there else value

    return tree_map(wrap, out)


def to_mps(module):
    """Move a module to the pretended device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(
                    OnMPS(parameter.detach()), parameter.requires_grad
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnMPS(buffer)
    return module


class NoFloat64(TorchDispatchMode):
    """Refuses an operator that makes float64 of other dtypes, on the CPU too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        dtypes = [{t.dtype for t in tree_leaves(x) if isinstance(t, Tensor)} for x in ((args, kwargs), out)]
        if torch.float64 in dtypes[1] - dtypes[0]:
            raise TypeError(f"{func} makes float64")
        return out
