"""A decode step of the whole model over pages: `Transformer.forward` on the tokens of many rows, flattened.

mla/paged.py has the attention.
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
from moe import Experts, MoE, Routing, SwiGLU
from moe.router import described

from .. import machine
from ..model import Transformer

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WARNED: set[type] = set()


class Decoder:
    """A model as an engine runs it, on a column-major copy of the matrices where that is faster.

    On a CPU a product of few rows with a column-major matrix takes two thirds of the time. The model's own
    memory is not changed; `refresh` copies changed weights again. Shapes, dtypes and device must not change.
    A model larger than a quarter of the machine's memory is not copied.

    Attributes:
        paged: every attention has a decode step over pages; if not, only `model` itself can run.
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
        self.copies: list[tuple[nn.Module, nn.Module, str]] = []  # module, its copy, name of the matrix
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
    def step(
        self,
        tokens: Tensor,
        pools: Sequence[Tensor],
        plan: Plan,
        last: int = 1,
        experts: list[Tensor] | None = None,
    ) -> Tensor:
        """Read `plan.time` more tokens of each row -> the logits at the last positions

        tokens (rows x time,) int64, pools: each layer's memory -> (rows, last, vocab)

        Args:
            last: number of positions, from the end, to return logits for: 1 to draw a token, more to verify
                drafts.
            experts: a list to which each MoE layer's choice (rows x time, top_k) is appended.
        """
        tokens = F.pad(tokens, (0, plan.filled - plan.tokens))
        x = self.view.embedding(tokens)  # (filled, dim)
        for block, attend, mixes, pool in zip(self.view.blocks, self.attend, self.mixes, pools):
            x = x + attend(block.attention, block.attention_norm(x), pool, plan)
            normed = block.mlp_norm(x)
            if isinstance(block.mlp, MoE):
                y, routing = moe_step(block.mlp, normed, plan.tokens, tokens, mixes)
                x = x + y
                if experts is not None:
                    experts.append(routing.experts)
            else:
                x = x + block.mlp(normed)
        if plan.time > 1:
            x = x[: plan.tokens].view(plan.rows, plan.time, -1)[:, plan.time - last :].flatten(0, 1)
            x = F.pad(x, (0, 0, 0, -len(x) % ROWS))
        return self.view.head(self.view.norm(x))[: plan.rows * last].unflatten(0, (-1, last))

    @torch.no_grad()
    def refresh(self) -> bool:
        """Copy the model's weights again if any number has changed, by whatever means -> whether one has

        Raises:
            ValueError: a weight has a different shape, dtype or device than at the start.
        """
        marks = [mark(tensor) for tensor in weights_of(self.model)]
        if len(marks) == len(self.marks) and all(map(torch.equal, marks, self.marks)):
            return False
        for theirs, ours, name in self.copies:
            new, old = getattr(theirs, name), getattr(ours, name)
            if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
                now, was = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (new, old))
                raise ValueError(f"{name} is {now}, was {was} when the engine was created; create a new one")
            old.copy_(new)
        self.marks = marks
        return True

    def laid_out(self, module: nn.Module, linears: bool) -> nn.Module:
        """The module with column-major matrices; submodules without such matrices are shared, not copied.

        linears: whether to copy the weights of linear layers.
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
        ours = copy.copy(module)  # a shallow copy: give it its own tables of children and parameters
        ours._modules = {**module._modules, **children}
        matrices = {name: nn.Parameter(by_columns(getattr(module, name)), False) for name in names}
        ours._parameters = {**module._parameters, **matrices}
        self.copies += [(module, ours, name) for name in names]
        return ours


def moe_step(layer: MoE, x: Tensor, count: int, tokens: Tensor, mixes: bool) -> tuple[Tensor, Routing]:
    """`MoE.forward` where only the first `count` rows of x (filled, dim) are tokens

    -> y (filled, dim), the routing of those rows

    mixes: the router compares all rows, so it must not see the padding.
    """
    routed, tokens = (x[:count], tokens[:count]) if mixes else (x, tokens)
    routing = layer.router(routed, tokens=tokens) if layer.needs_tokens else layer.router(routed)
    y = torch.zeros_like(x) if layer.shared is None else layer.shared(x)
    routing = routing.map(lambda part: part[:count])
    y[:count] += layer.experts(x[:count], routing)
    return y, routing


def by_columns(matrix: Tensor) -> Tensor:
    """A column-major copy of matrices (..., rows, columns)."""
    return matrix.detach().mT.contiguous().mT


def weights_of(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers: everything that a model's output depends on."""
    return [*model.parameters(), *model.buffers()]


def mark(tensor: Tensor) -> Tensor:
    """A checksum: sums of a tensor's bits along its last axis and across it, modulo 2^64.

    A version counter would miss changes through `.data`. A change of one number is always detected; several
    go undetected only if they cancel in every row and every column.
    """
    bits = tensor.detach().contiguous().view(INTEGERS[tensor.itemsize])
    if not bits.numel():
        return bits.long()
    bits = bits.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    if bits.shape[1] * bits.itemsize % 8 == 0:
        bits = bits.view(torch.int64)
    return torch.cat((bits.sum(0), bits.sum(1)))
