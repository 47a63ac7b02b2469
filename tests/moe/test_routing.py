"""Routing.asked, the experts before dropping: it survives whatever rebuilds a Routing."""

import pytest
import torch
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from moe import Capacity, Experts, MoE, Routing, SigmoidRouter, balance

DIM, NUM_EXPERTS, TOP_K, NUM_DEVICES = 6, 8, 2, 4
REBUILDS = {
    "positional": lambda routing: Routing(*routing),
    "by name": lambda routing: Routing(**routing._asdict()),
    "_replace": lambda routing: routing._replace(weights=2 * routing.weights),
    "map": lambda routing: routing.map(torch.clone),
    "pytree": lambda routing: tree_map(torch.clone, routing),
}
LOSSES = [
    balance.sequence_loss,
    balance.switch_loss,
    lambda routing: balance.device_loss(routing, NUM_DEVICES),
    lambda routing: balance.communication_loss(routing, NUM_DEVICES, TOP_K),
]


def make():
    """A layer in training that drops slots, and the router that it wraps."""
    router = SigmoidRouter(DIM, NUM_EXPERTS, TOP_K).double()
    router.bias[:2] = 0.5  # an uneven load
    return MoE(Capacity(router, 0.5), Experts(NUM_EXPERTS, DIM, 3).double()), router


@pytest.fixture
def x():
    return torch.randn(3, 11, DIM, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("rebuild", REBUILDS.values(), ids=REBUILDS)
def test_balance_uses_the_counts_before_dropping_in_a_rebuilt_routing(rebuild, x):
    layer, router = make()
    whole, routing = router(x), rebuild(layer(x)[1])
    assert type(routing) is Routing and (routing.experts < 0).any()
    assert torch.equal(balance.tokens_per_expert(routing, dropped=True), balance.tokens_per_expert(whole))
    for loss in LOSSES:
        graph = {"retain_graph": True}
        mine, theirs = (torch.autograd.grad(loss(r), router.weight, **graph)[0] for r in (routing, whole))
        torch.testing.assert_close(loss(routing), loss(whole), rtol=1e-12, atol=0)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)
    blind = routing._replace(asked=None)
    assert (
        abs(balance.switch_loss(blind) - balance.switch_loss(whole)) > 1e-3
    )  # after dropping, it looks even


def test_activation_checkpointing_keeps_asked_and_the_gradients(x):
    layer, router = make()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        y, routing = run(x)
        assert (routing.experts < 0).any()
        asked = balance.tokens_per_expert(routing, dropped=True)
        assert torch.equal(asked, balance.tokens_per_expert(router(x)))
        loss = y.square().sum() + balance.sequence_loss(routing)
        found.append([loss, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*found))


def test_map_changes_every_field_and_leaves_none_as_it_is(x):
    layer, router = make()
    first = layer(x)[1].map(lambda field: field[:1])
    assert [len(field) for field in first] == [1] * 5
    assert router(x).map(lambda field: field[:1]).asked is None
