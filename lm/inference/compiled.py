"""A step of decoding as compiled code: its kernels one after another, without Python between them."""

from collections.abc import Sequence
from types import FunctionType

import torch
from torch import Tensor

from mla.paged import Plan

from .. import machine
from .step import Decoder


class CompiledStep:
    """`Decoder.step` by one token of each text. On a GPU the kernels are replayed as a CUDA graph.

    The code is the same for any lengths of the texts. It is made when it is needed first, in some ten
    seconds: for one text, for a few whose experts are copied, for more.

    The model's weights may change, their shapes and dtypes may not.

    Raises:
        ValueError: there is no C++ compiler.
    """

    def __init__(self, decoder: Decoder, device: torch.device):
        machine.check_compiler(device, "compile")

        def step(tokens: Tensor, pools: Sequence[Tensor], plan: Plan) -> Tensor:
            return decoder.step(tokens, pools, plan)

        # What torch.compile made is found again by code object, then by guards. A code object for this model
        # alone needs no guards on its modules: they would take a tenth of a step.
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
        """tokens (rows,), plan of `time` 1 that is made for it -> logits (rows, 1, vocab)"""
        several = (tokens, plan.positions, plan.page, plan.starts) if plan.rows > 1 else ()
        for tensor in (*several, plan.seen, plan.reader, plan.keys, plan.order):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self.run(tokens, pools, plan)
