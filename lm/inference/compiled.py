"""The decode step under torch.compile, without Python between its kernels."""

from collections.abc import Sequence
from types import FunctionType

import torch
from torch import Tensor

from mla.paged import Plan

from .. import machine
from .step import Decoder


class CompiledStep:
    """`Decoder.step` for one token per row. On a GPU the kernels are replayed as a CUDA graph.

    It compiles on first use, in about ten seconds: once for one row, once for a few rows, whose experts are
    copied, and once for more. Sequence lengths do not matter.

    The model's weights may change; their shapes and dtypes may not.

    Raises:
        ValueError: no C++ compiler.
    """

    def __init__(self, decoder: Decoder, device: torch.device):
        machine.check_compiler(device, "compile")

        def step(tokens: Tensor, pools: Sequence[Tensor], plan: Plan) -> Tensor:
            return decoder.step(tokens, pools, plan)

        # torch.compile looks up its code by code object, then by guards. A code object for this model alone
        # needs no guards on its modules, which would take a tenth of a step.
        own = FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
        self.run = torch.compile(
            own,
            dynamic=False,
            options={
                "triton.cudagraphs" if device.type == "cuda" else "cpp_wrapper": True,
                "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
            },
        )

    def __call__(self, tokens: Tensor, pools: Sequence[Tensor], plan: Plan) -> Tensor:
        """tokens (rows,), plan with `time` 1 and compiled=True -> logits (rows, 1, vocab)"""
        several = (tokens, plan.positions, plan.page, plan.starts) if plan.rows > 1 else ()
        for tensor in (*several, plan.seen, plan.reader, plan.keys, plan.order):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self.run(tokens, pools, plan)
