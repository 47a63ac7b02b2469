"""The layer against V3 eq. 12, and the influence of other tokens on a token's output."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe import Experts, Gated, MoE, Routing, SigmoidRouter, SoftmaxRouter, SwiGLU, balance

DIM, HIDDEN, SHARED, NUM_EXPERTS, TOP_K = 7, 3, 5, 6, 2


def make(scale=2.5, shared=True, dim=DIM, hidden=HIDDEN, num_experts=NUM_EXPERTS):
    router = SigmoidRouter(dim, num_experts, TOP_K, routed_scaling_factor=scale)
    router.bias.copy_(torch.randn(num_experts))
    return MoE(router, Experts(num_experts, dim, hidden), SwiGLU(dim, SHARED) if shared else None)


def ffn(u, gate_up, down):
    half = len(gate_up) // 2
    gate, up = gate_up[:half] @ u, gate_up[half:] @ u
    return down @ (gate / (1 + (-gate).exp()) * up)


def test_output_equals_the_equation():
    layer = make().double()
    x = torch.randn(3, 11, DIM, dtype=torch.float64)
    y, routing = layer(x)
    chosen, weights = routing.experts.flatten(0, 1).tolist(), routing.weights.flatten(0, 1)
    shared, experts = layer.shared, layer.experts
    for u, row, slots, g in zip(x.flatten(0, 1), y.flatten(0, 1), chosen, weights):
        want = ffn(u, shared.gate_up.weight, shared.down.weight)
        for weight, i in zip(g, slots):
            want = want + weight * ffn(u, experts.gate_up[i], experts.down[i])
        torch.testing.assert_close(row, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights.sum(-1), torch.full((33,), 2.5, dtype=torch.float64))


def test_the_shared_expert_stands_outside_the_routed_scale():
    layer, x = make(scale=1.0).double(), torch.randn(20, DIM, dtype=torch.float64)
    once = layer(x)[0]
    layer.router.routed_scaling_factor = 3.0
    thrice = layer(x)[0]
    routed = (thrice - once) / 2
    torch.testing.assert_close(once - routed, layer.shared(x), rtol=1e-10, atol=1e-12)
    layer.shared = None
    torch.testing.assert_close(layer(x)[0], 3 * routed, rtol=1e-10, atol=1e-12)


class HashRouter(nn.Module):
    """Token id modulo experts; token 0 goes to no expert."""

    def forward(self, x, tokens=None):
        experts = tokens.unsqueeze(-1).remainder(NUM_EXPERTS).where(tokens.unsqueeze(-1) > 0, -1)
        scores = x.new_zeros(*tokens.shape, NUM_EXPERTS)
        return Routing(experts, torch.ones_like(experts, dtype=x.dtype), scores, scores)


def test_a_router_that_takes_token_ids_gets_them():
    layer = MoE(HashRouter(), Experts(NUM_EXPERTS, DIM, HIDDEN), SwiGLU(DIM, SHARED))
    x, tokens = torch.randn(2, 4, DIM), torch.tensor([[0, 7, 6, 5], [1, 0, 2, 3]])
    y, routing = layer(x, tokens=tokens)
    assert routing.experts[..., 0].tolist() == [[-1, 1, 0, 5], [1, -1, 2, 3]]
    nowhere = tokens == 0
    torch.testing.assert_close(y[nowhere], layer.shared(x)[nowhere])
    assert balance.tokens_per_expert(routing).tolist() == [1, 2, 1, 1, 0, 1]
    plain = make()
    assert torch.equal(plain(x, tokens=tokens)[0], plain(x)[0])


def test_router_and_experts_that_disagree_are_refused():
    with pytest.raises(ValueError, match="router with dim=8, experts with dim=7"):
        MoE(SigmoidRouter(8, 6, 2), Experts(6, 7, 3))
    with pytest.raises(ValueError, match="router with num_experts=6, experts with num_experts=5"):
        MoE(SigmoidRouter(7, 6, 2), Experts(5, 7, 3))
    MoE(nn.Identity(), Experts(5, 7, 3))  # a router need not declare its sizes


def short_products_round_as_long_ones() -> bool:
    """Whether this machine's matmul gives a row the same bits in 16, 32 ... rows as in 1024 (AVX2: no)."""
    for inner, columns in ((64, 64), (24, 80), (704, 256)):
        x, w = torch.randn(1024, inner), torch.randn(columns, inner)
        whole = nn.functional.linear(x, w)
        if any(not torch.equal(nn.functional.linear(x[:n], w), whole[:n]) for n in (16, 32, 48, 64, 112)):
            return False
    return True


@pytest.mark.parametrize("dim, hidden, num_experts", [(64, 32, 8), (24, 40, 5), (256, 704, 4)])
def test_a_token_gets_the_same_bits_in_any_fp32_batch_of_16_and_more(dim, hidden, num_experts):
    if not short_products_round_as_long_ones():
        pytest.skip("a row's last bits depend on the number of rows on this machine, even in multiples of 16")
    layer = make(shared=False, dim=dim, hidden=hidden, num_experts=num_experts)
    x = torch.randn(300, dim)
    whole, routing = layer(x)
    for n in [*range(16, 48), 111]:
        y, mine = layer(x[:n])
        assert torch.equal(mine.weights, routing.weights[:n])
        assert torch.equal(y, whole[:n]), n
    shuffle = torch.randperm(300)
    assert torch.equal(layer(x[shuffle])[0], whole[shuffle])


@pytest.mark.parametrize("hostile", [1e18, math.inf, math.nan])
def test_hostile_neighbours_change_nothing(hostile):
    layer = make(shared=False)
    x = torch.randn(40, DIM)
    clean = layer(x)[0]
    x[20:] = hostile
    assert torch.equal(layer(x)[0][:20], clean[:20])


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_in_any_batch_a_token_gets_the_same_experts_and_output_within_rounding(dtype, error):
    layer = make(dim=64, hidden=32).to(dtype)
    x = torch.randn(40, 64).to(dtype)
    whole, routing = layer(x)
    for n in range(1, 40):
        y, mine = layer(x[:n])
        assert torch.equal(mine.experts, routing.experts[:n])
        assert torch.equal(mine.weights, routing.weights[:n])
        assert (y - whole[:n]).norm() <= error * whole[:n].norm(), n


sizes = st.integers(1, 9)


@given(sizes, sizes, sizes, st.lists(st.integers(0, 3), max_size=3), st.booleans(), st.booleans())
def test_any_sizes_give_finite_outputs_and_gradients_to_every_weight(dim, hidden, n, leading, v3, has_shared):
    kind = SigmoidRouter if v3 else SoftmaxRouter
    shared = SwiGLU(dim, hidden) if has_shared else None
    layer = MoE(kind(dim, n, (n + 1) // 2), Experts(n, dim, hidden), shared)
    x = torch.randn(*leading, dim, requires_grad=True)
    y, routing = layer(x)
    assert y.shape == x.shape and y.isfinite().all()
    assert balance.tokens_per_expert(routing).sum() == x[..., 0].numel() * ((n + 1) // 2)
    (y.sum() + balance.sequence_loss(routing) + balance.z_loss(routing)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *layer.parameters()])


def test_output_equals_transformers():
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=32, moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=3, n_group=4,
        topk_group=2, n_shared_experts=2, routed_scaling_factor=2.5,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = DeepseekV3MoE(config)
    router = SigmoidRouter(32, 8, 3, num_groups=4, top_groups=2, routed_scaling_factor=2.5)
    ours = MoE(router, Experts(8, 32, 12), SwiGLU(32, 24))
    with torch.no_grad():
        theirs.gate.weight.copy_(router.weight)
        theirs.gate.e_score_correction_bias.copy_(router.bias.normal_())
        theirs.experts.gate_up_proj.copy_(ours.experts.gate_up)
        theirs.experts.down_proj.copy_(ours.experts.down)
        gate, up = ours.shared.gate_up.weight.chunk(2)
        theirs.shared_experts.gate_proj.weight.copy_(gate)
        theirs.shared_experts.up_proj.weight.copy_(up)
        theirs.shared_experts.down_proj.weight.copy_(ours.shared.down.weight)
    x = torch.randn(2, 25, 32)
    torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-5, atol=1e-6)


def test_a_gated_shared_expert_equals_transformers_qwen2_moe():
    pytest.importorskip("transformers")
    from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=32, moe_intermediate_size=12, shared_expert_intermediate_size=20, num_experts=8,
        num_experts_per_tok=3, norm_topk_prob=False,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = Qwen2MoeSparseMoeBlock(config)
    ours = MoE(SoftmaxRouter(32, 8, 3), Experts(8, 32, 12), Gated(SwiGLU(32, 20), 32))
    gate, up = ours.shared.mlp.gate_up.weight.chunk(2)
    theirs.load_state_dict(
        {
            "gate.weight": ours.router.weight,
            "experts.gate_up_proj": ours.experts.gate_up,
            "experts.down_proj": ours.experts.down,
            "shared_expert.gate_proj.weight": gate,
            "shared_expert.up_proj.weight": up,
            "shared_expert.down_proj.weight": ours.shared.mlp.down.weight,
            "shared_expert_gate.weight": ours.shared.gate.weight,
        }
    )
    x = torch.randn(2, 25, 32)
    torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gives", [lambda x: x, lambda x: (x, x, x, x)])
def test_a_router_that_returns_no_routing_is_refused(gives):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return gives(x)

    with pytest.raises(ValueError, match=r"^Odd returned a (Tensor|tuple), not a moe\.Routing"):
        MoE(Odd(), Experts(4, 6, 3))(torch.randn(2, 6))
