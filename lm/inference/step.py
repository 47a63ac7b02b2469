"""A decode step of the whole model over pages: `Transformer.forward` on a flat batch of tokens of many texts.

The attention's part is mla/paged.py.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla import GroupedQueryAttention, MultiheadLatentAttention
from mla.paged import ROWS, Plan, changed, entry_of, step_of
from moe import Experts, MoE, SwiGLU
from moe.router import described

from .. import machine
from ..model import Transformer

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WARNED: set[type] = set()


class Decoder:
    """A model as an engine runs it, on its own copy of the matrices where that is faster.

    On a CPU few rows times a matrix stored by columns take two thirds of the time. The model's own memory
    stays as it is; `refresh` takes its weights over when they have changed. Their shapes, dtypes and device
    must stay. A model that would fill more than a quarter of the machine's memory is run as it is.

    Attributes:
        paged: every attention has a step over pages; else only the model itself can be run.
        entries: (heads, width, dtype, device) of each layer's pages.
    """

    def __init__(self, model: Transformer):
        attentions: list[Any] = [block.attention for block in model.blocks]
        steps = [step_of(type(attention)) for attention in attentions]
        found = [step for step in steps if step is not None]
        self.paged = len(found) == len(steps)
        for kind in {type(a) for a, step in zip(attentions, steps) if step is None} - WARNED:
            WARNED.add(kind)
            methods = ", ".join(changed(kind))
            because = f"overrides {methods}" if methods else "has no decode step in mla.paged.STEPS"
            said = f"{kind.__name__} {because}; it is run without pages, several times slower"
            warnings.warn(said, stacklevel=3)
        self.model = model
        self.copies: list[tuple[nn.Module, nn.Module, str]] = []  # a module, its copy, the matrix's name
        self.marks: list[Tensor] = []
        self.view: Any = model
        if not self.paged:
            return
        self.attend = [step.run for step in found]
        self.entries = [entry_of(attention, step) for attention, step in zip(attentions, found)]
        self.mixes = [isinstance(b.mlp, MoE) and described(b.mlp.router).mixes_tokens for b in model.blocks]
        size = sum(parameter.nbytes for parameter in model.parameters())
        if model.embedding.weight.is_cpu and not 0 < machine.memory() < 4 * size:
            self.view = self.laid_out(model, False)
        self.marks = [mark(tensor) for tensor in weights_of(model)]

    @torch.no_grad()
    def step(self, tokens: Tensor, pools: Sequence[Tensor], plan: Plan, last: int = 1) -> Tensor:
        """Read `plan.time` more tokens of each text, and predict what follows the last of them.

        tokens (rows x time,) int64, pools: each layer's memory -> (rows, last, vocab)

        Args:
            last: at how many places, counted from the end, logits are wanted: 1 to draw a token, more to
                verify drafts.
        """
        tokens = F.pad(tokens, (0, plan.filled - plan.tokens))
        x = self.view.embedding(tokens)  # (filled, dim)
        for block, attend, mixes, pool in zip(self.view.blocks, self.attend, self.mixes, pools):
            x = x + attend(block.attention, block.attention_norm(x), pool, plan)
            normed = block.mlp_norm(x)
            if isinstance(block.mlp, MoE):
                x = x + moe_step(block.mlp, normed, plan.tokens, tokens, mixes)
            else:
                x = x + block.mlp(normed)
        if plan.time > 1:
            x = x[: plan.tokens].view(plan.rows, plan.time, -1)[:, plan.time - last :].flatten(0, 1)
            x = F.pad(x, (0, 0, 0, -len(x) % ROWS))
        return self.view.head(self.view.norm(x))[: plan.rows * last].unflatten(0, (-1, last))

    @torch.no_grad()
    def refresh(self) -> bool:
        """Take the model's weights over if a number of them has changed, by whatever means -> whether one had

        Raises:
            ValueError: they have another shape, dtype or device than when this was made.
        """
        marks = [mark(tensor) for tensor in weights_of(self.model)]
        if len(marks) == len(self.marks) and all(map(torch.equal, marks, self.marks)):
            return False
        for theirs, ours, name in self.copies:
            new, old = getattr(theirs, name), getattr(ours, name)
            if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
                now, was = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (new, old))
                raise ValueError(f"{name} is {now}, and was {was} when the engine was made; make a new one")
            old.copy_(new)
        self.marks = marks
        return True

    def laid_out(self, module: nn.Module, linears: bool) -> nn.Module:
        """The module with its matrices stored by columns; what has none in it is shared, not copied.

        linears: whether the weights of linear layers are such matrices here.
        """
        names: tuple[str, ...] = ()
        if isinstance(module, Experts):
            names = ("gate_up", "down")
        elif linears and isinstance(module, nn.Linear):
            names = ("weight",)
        inside = isinstance(module, MultiheadLatentAttention | GroupedQueryAttention | SwiGLU)
        children = {name: self.laid_out(child, inside) for name, child in module.named_children()}
        if not names and all(children[name] is child for name, child in module.named_children()):
            return module
        ours = copy.copy(module)  # which shares the tables of children and parameters: they get their own
        ours._modules = {**module._modules, **children}
        matrices = {name: nn.Parameter(by_columns(getattr(module, name)), False) for name in names}
        ours._parameters = {**module._parameters, **matrices}
        self.copies += [(module, ours, name) for name in names]
        return ours


def moe_step(layer: MoE, x: Tensor, count: int, tokens: Tensor, mixes: bool) -> Tensor:
    """`MoE.forward` where only the first `count` rows of x (filled, dim) are tokens -> y (filled, dim)

    mixes: the router chooses among all rows, so those that only fill up must not take the tokens' places.
    """
    routed, tokens = (x[:count], tokens[:count]) if mixes else (x, tokens)
    routing = layer.router(routed, tokens=tokens) if layer.needs_tokens else layer.router(routed)
    y = torch.zeros_like(x) if layer.shared is None else layer.shared(x)
    y[:count] += layer.experts(x[:count], routing.map(lambda part: part[:count]))
    return y


def by_columns(matrix: Tensor) -> Tensor:
    """A copy with the same numbers, shape and (..., rows, columns), stored column after column."""
    return matrix.detach().mT.contiguous().mT


def weights_of(model: nn.Module) -> list[Tensor]:
    """Every number that a model's output depends on."""
    return [*model.parameters(), *model.buffers()]


def mark(tensor: Tensor) -> Tensor:
    """The sums of a tensor's bits along its last axis and across it, modulo 2^64: they tell any change.

    A version counter would miss what is changed through `.data`. One change of a number is always seen;
    several stay unseen only if they cancel in every row and in every column.
    """
    bits = tensor.detach().contiguous().view(INTEGERS[tensor.itemsize])
    if not bits.numel():
        return bits.long()
    bits = bits.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    if bits.shape[1] * bits.itemsize % 8 == 0:
        bits = bits.view(torch.int64)
    return torch.cat((bits.sum(0), bits.sum(1)))
