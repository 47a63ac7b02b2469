"""Checks that every custom router and attention should pass."""

from typing import Any

import torch
from torch import Tensor, nn


def check_router(router: nn.Module, dim: int, num_experts: int, top_k: int, independent: bool = True) -> None:
    """Assert valid shapes and expert ids, repeatable evaluation, and gradients for every parameter.

    Args:
        independent: a token's experts do not depend on the other tokens; False: they may, as in expert choice.
    """
    x = torch.randn(3, 5, dim)
    router.eval()
    routing = router(x)
    experts, weights = routing.experts, routing.weights
    assert experts.shape == weights.shape == (3, 5, top_k) and experts.dtype == torch.int64
    assert routing.scores.shape == routing.logits.shape == (3, 5, num_experts)
    assert all(tensor.isfinite().all() for tensor in (weights, routing.scores, routing.logits))
    assert experts.min() >= -1 and experts.max() < num_experts
    for row in experts.flatten(0, 1).tolist():
        chosen = [expert for expert in row if expert >= 0]
        assert len(set(chosen)) == len(chosen), f"a token is routed to the same expert twice: {row}"
    again = router(x)
    assert torch.equal(again.experts, experts) and torch.equal(again.weights, weights)
    if independent:
        one = router(x[1:2, 3:4])
        assert torch.equal(one.experts[0, 0].sort().values, experts[1, 3].sort().values)
    router.train()
    trained = router(x)
    (trained.weights * torch.randn_like(trained.weights)).sum().backward()
    check_gradients(router)


def check_attention(attention: nn.Module, dim: int) -> None:
    """Assert causality, equal outputs with and without a cache, and gradients for every parameter."""
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
    check_gradients(attention)


def check_gradients(module: nn.Module) -> None:
    """Assert that backward has reached every parameter."""
    without = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without, f"no gradient reaches {', '.join(without)}"


@torch.no_grad()
def in_pieces(attention: Any, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The output of an attention that reads x (batch, time, dim) in chunks, through its cache."""
    cache = attention.new_cache(len(x), x.shape[1])
    return torch.cat([attention(piece, cache) for piece in x.split(lengths, dim=1)], dim=1)
