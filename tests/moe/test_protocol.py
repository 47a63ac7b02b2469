"""What makes a router: a subclass of moe.Router with attributes, or any module that returns a Routing."""

import pytest
import torch
from torch import nn

from moe import Capacity, Experts, MoE, Router, Routing, SigmoidRouter, balance
from moe.router import described
from tests.helpers import refused

DIM, NUM_EXPERTS = 5, 4


def routing_by(experts):
    """(...) int64 -> a top-1 Routing with weight 1"""
    experts = experts.unsqueeze(-1)
    scores = torch.zeros(*experts.shape[:-1], NUM_EXPERTS).scatter(-1, experts, 1.0)
    return Routing(experts, torch.ones(experts.shape), scores, scores)


class Minimal(Router):
    """Declares nothing."""

    def forward(self, x):
        return routing_by(x.argmax(-1) % NUM_EXPERTS)


class Declared(Router):
    """Declares everything."""

    mixes_tokens = needs_tokens = needs_mask = True

    def __init__(self):
        super().__init__(DIM, NUM_EXPERTS)
        self.register_buffer("bias", torch.zeros(NUM_EXPERTS))

    def forward(self, x, tokens, mask=None):
        return routing_by(tokens % NUM_EXPERTS)


class Plain(nn.Module):
    """No subclass of Router: token ids and mask by name, the attributes given."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x, *, tokens=None, mask=None):
        self.given = (tokens, mask)
        return routing_by(tokens % NUM_EXPERTS)


def facts(router):
    about = described(router)
    return about.dim, about.num_experts, about.mixes_tokens, about.needs_tokens, about.needs_mask


def test_a_subclass_describes_itself():
    for router in (Minimal(), Declared(), SigmoidRouter(DIM, NUM_EXPERTS, 2)):
        assert described(router) is router
    assert facts(Minimal()) == (None, None, False, False, False) and Minimal().bias is None
    assert facts(Minimal(dim=3, num_experts=2))[:2] == (3, 2)
    assert facts(Declared()) == (DIM, NUM_EXPERTS, True, True, True)
    assert not Minimal().state_dict() and list(Declared().state_dict()) == ["bias"]


def test_any_other_module_is_described_by_its_attributes_and_arguments():
    assert facts(nn.Identity()) == (None, None, False, False, False)
    assert facts(Plain()) == (None, None, False, True, True)
    assert facts(Plain(dim=3, num_experts=2, mixes_tokens=True)) == (3, 2, True, True, True)


def test_a_buffer_is_a_selection_bias_and_a_parameter_is_not():
    load = torch.tensor([9, 1, 1, 1])
    buffered = Plain(bias=torch.zeros(NUM_EXPERTS))
    balance.update_bias_(buffered, load, 0.5)
    assert buffered.bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert described(buffered).bias.data_ptr() == buffered.bias.data_ptr()
    declared = Declared()
    balance.update_bias_(Capacity(declared), load, 0.5)
    assert declared.bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    learned = Plain(bias=nn.Parameter(torch.zeros(NUM_EXPERTS)))
    assert described(learned).bias is None and balance.selection_bias(learned) is None
    refused(lambda: balance.update_bias_(learned, load, 0.5), "Plain has no selection bias to update")
    assert not learned.bias.any()


@pytest.mark.parametrize("router", [Declared, Plain])
def test_a_router_gets_token_ids_by_name(router):
    layer = MoE(router(), Experts(NUM_EXPERTS, DIM, 3))
    x, tokens = torch.randn(2, 3, DIM, requires_grad=True), torch.tensor([[0, 1, 2], [3, 4, 5]])
    y, routing = layer(x, tokens=tokens)
    assert routing.experts.squeeze(-1).tolist() == [[0, 1, 2], [3, 0, 1]]
    torch.testing.assert_close(y, layer.experts.reference(x, routing))
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert (
        MoE(Minimal(), layer.experts)(x, tokens=tokens)[0].shape == x.shape
    )  # it takes no ids, and gets none


def test_a_wrapper_passes_token_ids_and_mask_by_name():
    router = Plain(num_experts=NUM_EXPERTS)
    tokens, mask = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[True, False, True, True]])
    routing = Capacity(router, 0.1)(torch.randn(1, 4, DIM), tokens=tokens, mask=mask)
    assert router.given[0] is tokens and router.given[1] is mask
    assert routing.experts.squeeze(-1).tolist() == [[0, -1, -1, 1]]  # capacity 1
    assert routing.asked.squeeze(-1).tolist() == [[0, -1, 0, 1]]


def test_sizes_must_match_where_both_are_known():
    experts = Experts(NUM_EXPERTS, DIM, 3)
    for router in (Minimal(dim=8), Plain(dim=8)):
        refused(lambda router=router: MoE(router, experts), "router with dim=8, experts with dim=5")
    for router in (Minimal(num_experts=6), Plain(num_experts=6)):
        said = "router with num_experts=6, experts with num_experts=4"
        refused(lambda router=router: MoE(router, experts), said)
    MoE(Minimal(), experts)
    MoE(Plain(dim=8, num_experts=6), nn.Identity())
    refused(lambda: Capacity(Minimal()), "Minimal has no num_experts")


def test_a_layer_refuses_a_router_that_returns_no_routing():
    class Odd(Router):
        def forward(self, x):
            return x

    refused(
        lambda: MoE(Odd(), Experts(4, DIM, 3))(torch.randn(2, DIM)), "Odd returned a Tensor", "moe.Routing"
    )
