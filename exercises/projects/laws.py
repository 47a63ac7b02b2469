"""What every router and every attention keeps to, for the tests of projects."""

from typing import Any

import torch
from torch import Tensor, nn


def check_router(router: nn.Module, dim: int, num_experts: int, top_k: int, alone: bool = True) -> None:
    """Assert that it gives a `moe.Routing` of the right shapes, can be trained, and is no lottery in evaluation.

    Args:
        alone: a token's experts do not depend on the tokens beside it; False: they may, as in expert choice.
    """
    x = torch.randn(3, 5, dim)
    router.eval()
    experts, weights, scores, logits = router(x)
    assert experts.shape == weights.shape == (3, 5, top_k) and experts.dtype == torch.int64
    assert scores.shape == logits.shape == (3, 5, num_experts)
    assert all(tensor.isfinite().all() for tensor in (weights, scores, logits))
    assert experts.min() >= -1 and experts.max() < num_experts
    for row in experts.flatten(0, 1).tolist():
        chosen = [expert for expert in row if expert >= 0]
        assert len(set(chosen)) == len(chosen), f"a token goes to an expert twice: {row}"
    again = router(x)
    assert torch.equal(again.experts, experts) and torch.equal(again.weights, weights)
    if alone:
        one = router(x[1:2, 3:4])
        assert torch.equal(one.experts[0, 0].sort().values, experts[1, 3].sort().values)
    router.train()
    trained = router(x)
    (trained.weights * torch.randn_like(trained.weights)).sum().backward()
    without = [name for name, p in router.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without, f"no gradient reaches {', '.join(without)}"


def check_attention(attention: nn.Module, dim: int) -> None:
    """Assert that no token sees a later one, that a text in pieces gives what it gives at once, and gradients."""
    attention.eval()
    x = torch.randn(3, 23, dim)
    y = attention(x)
    assert y.shape == x.shape and y.isfinite().all()
    changed = x.clone()
    changed[:, 14:] += 1
    before = attention(changed)[:, :14]
    torch.testing.assert_close(before, y[:, :14], msg=lambda text: f"a token sees a later one: {text}")
    torch.testing.assert_close(in_pieces(attention, x, (7, 1, 1, 9, 5)), y)
    attention.train()
    (attention(x) * torch.randn_like(x)).sum().backward()
    without = [name for name, p in attention.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without, f"no gradient reaches {', '.join(without)}"


@torch.no_grad()
def in_pieces(attention: Any, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """What an attention gives that reads x (batch, time, dim) in pieces, by its cache."""
    cache = attention.new_cache(len(x), x.shape[1])
    return torch.cat([attention(piece, cache) for piece in x.split(lengths, dim=1)], dim=1)
