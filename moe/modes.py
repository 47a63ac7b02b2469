"""Modes of PyTorch in which the fast paths must not read numbers, or must use other operators."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be read: not on meta, nor fake, traced, or inside a transform."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return not transformed()


def cheap_to_read(tensor: Tensor) -> bool:
    """Whether they can be read without synchronizing a GPU."""
    return tensor.is_cpu and has_numbers(tensor)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the tensor's device; None if it is off, or unknown there, as on meta."""
    kind = tensor.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work: only plain operators can then be differentiated."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def watched() -> bool:
    """Whether a TorchDispatchMode is active, such as FlopCounterMode, or torch.export."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._len_torch_dispatch_stack() > 0
