"""Parts of one's own, a router or an attention outside this project: tried before anything is trained."""

import copy

import torch
from torch import Tensor

from moe import Routing

from .model import Transformer


@torch.no_grad()
def try_parts(model: Transformer) -> None:
    """Run a copy of a model that has such parts on a few tokens.

    Raises:
        ValueError: it fails, or gives what losses and biases cannot go by; names the parts.
    """
    own = model.config.own_parts()
    if not own:
        return
    tokens = torch.arange(4).remainder(model.config.vocab_size).expand(2, -1)
    with torch.random.fork_rng(devices=[]):  # the training's numbers stay what they are
        try:
            for routing in copy.deepcopy(model)(tokens).routings:  # a part may count its passes
                check_routing(routing, (*tokens.shape, model.config.moe.num_experts))
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise ValueError(f"{' and '.join(own.values())}: a first pass fails: {said}") from None


def check_routing(routing: Routing, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless scores and logits have this shape, (..., num_experts)."""
    for name in ("scores", "logits"):
        part = getattr(routing, name)
        found = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
        if found != shape:
            raise ValueError(f"{name} are {found}; expected {shape}, a number for each expert")
