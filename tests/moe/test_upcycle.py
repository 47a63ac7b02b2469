"""Upcycling a dense MLP: the same function at first, and a layer that learns."""

import pytest
import torch

from moe import MixtralRouter, MoE, SigmoidRouter, SoftmaxRouter, SwiGLU, upcycle

DIM, HIDDEN = 13, 24
# num_experts, top_k, num_shards, num_shared_shards
SIZES = {
    "whole copies": (8, 2, 1, 0),
    "three of five copies": (5, 3, 1, 0),
    "a copy in four": (8, 4, 4, 0),
    "two copies in four": (16, 8, 4, 0),
    "a shard shared": (12, 2, 3, 1),
    "a shard shared, three copies": (12, 6, 3, 1),
    "all but one shard shared": (6, 2, 3, 2),
    "one copy": (8, 8, 8, 0),
}
EVERY_SIZE = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
ROUTERS = pytest.mark.parametrize("router", [SigmoidRouter, SoftmaxRouter])


def make(dtype=torch.float64):
    return SwiGLU(DIM, HIDDEN).to(dtype)


def some_x(dtype=torch.float64):
    return torch.randn(3, 50, DIM, dtype=dtype)


def by_hand(mlp, x):
    """down (silu(gate x) * up x), written out."""
    gate, up = (x @ rows.T for rows in (mlp.gate_up.weight[:HIDDEN], mlp.gate_up.weight[HIDDEN:]))
    return gate / (1 + (-gate).exp()) * up @ mlp.down.weight.T


@EVERY_SIZE
@ROUTERS
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("factor", [None, 2.5])
def test_the_experts_give_what_the_mlp_gave(sizes, router, grouped, factor):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        mlp, x = make(dtype), some_x(dtype)
        layer = upcycle(mlp, *sizes, router=router, grouped=grouped, routed_scaling_factor=factor)
        assert isinstance(layer, MoE) and isinstance(layer.router, router)
        y, routing = layer(x)
        torch.testing.assert_close(y, by_hand(mlp, x), rtol=0, atol=tolerance)
        _, top_k, shards, shared = sizes
        assert routing.experts.shape == (3, 50, top_k)
        assert layer.router.routed_scaling_factor == (factor or shards - shared)


@EVERY_SIZE
@ROUTERS
@pytest.mark.parametrize("grouped", [True, False])
def test_a_token_uses_each_shard_of_the_copies_it_chose_once(sizes, router, grouped):
    num_experts, top_k, shards, shared = sizes
    layer = upcycle(make(), *sizes, router=router, grouped=grouped)
    routing, routed = layer.router(some_x()), shards - shared
    used = torch.zeros(150, num_experts).scatter(1, routing.experts.flatten(0, 1), 1.0)
    used = used.view(150, num_experts // routed, routed)
    assert torch.equal(used.sum(1), torch.full((150, routed), float(top_k // routed)))
    assert torch.equal(used, used[..., :1].expand_as(used))  # a whole copy, or nothing of it
    if top_k < num_experts:
        assert (used.sum(0)[:, 0] > 0).sum() > top_k // routed  # tokens use different copies


def test_experts_are_the_mlps_features_in_order_and_the_first_are_shared():
    mlp = make()
    layer = upcycle(mlp, 8, 2, num_shards=3, num_shared_shards=1, routed_scaling_factor=4.0)
    gate, up = mlp.gate_up.weight[:HIDDEN], mlp.gate_up.weight[HIDDEN:]
    for expert in range(8):
        first = 8 * (1 + expert % 2)  # 24 features: 0..7 shared, then the experts 0, 2, 4, 6 and 1, 3, 5, 7
        cut = slice(first, first + 8)
        assert torch.equal(layer.experts.gate_up[expert], torch.cat((gate[cut], up[cut])))
        assert torch.equal(layer.experts.down[expert], mlp.down.weight[:, cut] / 2)  # 2 shards / 4.0
    assert torch.equal(layer.shared.gate_up.weight, torch.cat((gate[:8], up[:8])))
    assert torch.equal(layer.shared.down.weight, mlp.down.weight[:, :8])


@ROUTERS
def test_only_with_groups_the_function_stays_where_copies_tie(router):
    mlp, x, off = make(), some_x(), {}
    for grouped in (True, False):
        layer = upcycle(mlp, 20, 4, num_shards=4, router=router, grouped=grouped)
        rows = layer.router.weight.data.view(5, 4, DIM)
        rows[1], rows[2:] = rows[0], -0.5 * rows[:1]  # the first two tie, as the best or the worst
        y, routing = layer(x)
        off[grouped] = (y - by_hand(mlp, x)).abs().amax(-1) > 1e-12
        copies = routing.experts // 4
        assert torch.equal(off[grouped], (copies != copies[..., :1]).any(-1))
    assert not off[True].any()
    assert off[False].sum() > 30  # of 150 tokens: some shards of one copy, some of the other


def test_with_groups_the_function_stays_where_sigmoids_saturate():
    mlp, x = make(torch.float32), some_x(torch.float32).abs()
    layer = upcycle(mlp, 20, 4, num_shards=4)
    layer.router.weight.data.abs_().mul_(1e4)
    y, routing = layer(x)
    assert torch.equal(routing.scores, torch.ones(3, 50, 20))
    torch.testing.assert_close(y, by_hand(mlp, x), rtol=0, atol=1e-5)


@ROUTERS
@pytest.mark.parametrize("grouped", [True, False])
def test_the_router_has_a_gradient_if_shards_differ_and_whole_copies_need_noise(router, grouped):
    x, direction = some_x(), some_x()

    def gradient(**options):
        layer = upcycle(make(), **options, router=router, grouped=grouped)
        (layer(x)[0] * direction).sum().backward()
        return layer.router.weight.grad.abs().max()

    assert gradient(num_experts=8, top_k=4, num_shards=4) > 0.1
    assert gradient(num_experts=12, top_k=4, num_shards=3, num_shared_shards=1) > 0.1
    assert gradient(num_experts=8, top_k=2) < 1e-12
    assert gradient(num_experts=8, top_k=2, noise=0.5) > 0.01


def test_copies_diverge_in_training_and_the_loss_falls():
    layer, x = upcycle(make(), 8, 4, num_shards=4), some_x()
    target = by_hand(make(), x).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = (layer(x)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    one, other = layer.experts.down.unflatten(0, (2, 4))
    assert (one - other).abs().amin(dim=(1, 2)).max() > 1e-5
    rows = layer.router.weight
    assert len(rows.unique(dim=0)) == 8


def test_noise_makes_copies_differ_by_its_share_of_the_weights():
    mlp, x = make(), some_x()
    plain = upcycle(mlp, 400, 2)
    assert len(plain.experts.gate_up.unique(dim=0)) == len(plain.experts.down.unique(dim=0)) == 1
    noisy = upcycle(mlp, 400, 2, noise=0.1)
    for name in ("gate_up", "down"):
        before, after = getattr(plain.experts, name), getattr(noisy.experts, name)
        share = (after - before).square().mean().sqrt() / before.square().mean().sqrt()
        assert abs(share - 0.1) < 0.002
        assert abs((after - before).mean()) < 0.001 * before.std()
    off = (noisy(x)[0] - by_hand(mlp, x)).norm() / by_hand(mlp, x).norm()
    assert 0.05 < off < 0.3


def test_the_same_seed_gives_the_same_layer_whatever_else_was_drawn():
    mlp = make()

    def layer(seed):
        torch.rand(seed + 3)
        generator = torch.Generator().manual_seed(seed)
        return upcycle(mlp, 6, 3, num_shards=3, noise=0.1, generator=generator).state_dict()

    one, same, other = layer(1), layer(1), layer(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if name != "router.bias")
    rows = upcycle(mlp, 4000, 2, router_std=0.3).router.weight
    assert abs(rows.std() - 0.3) < 0.01


def test_dtype_stays_and_the_mlp_is_neither_changed_nor_shared():
    mlp = make(torch.bfloat16)
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    layer = upcycle(mlp, 6, 2, num_shards=3, num_shared_shards=1)
    for name, value in layer.state_dict().items():
        assert value.dtype == (torch.float32 if name == "router.bias" else torch.bfloat16)
    for parameter in layer.parameters():
        assert parameter.requires_grad
        parameter.data.zero_()
    assert all(torch.equal(before[name], value) for name, value in mlp.state_dict().items())


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"num_shards": 5}, "num_shards=5 does not divide hidden_dim=24; 1, 2, 3, 4, 6, 8, 12, 24 do"),
        ({"num_shards": 0}, "num_shards=0 does not divide"),
        ({"num_shards": 4, "num_shared_shards": 4}, r"num_shared_shards=4 must lie in 0\.\.3"),
        ({"num_shared_shards": -1}, r"num_shared_shards=-1 must lie in 0\.\.0"),
        ({"num_shards": 3}, "num_experts=8 must be a multiple of 3, the routed shards"),
        ({"num_experts": 0}, "num_experts=0 must be a multiple of 1"),
        ({"num_shards": 4, "top_k": 2}, "top_k=2 must be a multiple of 4, .* and at most num_experts=8"),
        ({"num_shards": 4, "top_k": 12}, "top_k=12 must be a multiple of 4, .* and at most num_experts=8"),
        ({"top_k": 0}, "top_k=0 must be"),
        ({"router": MixtralRouter}, "router=.*MixtralRouter.* must be SigmoidRouter or SoftmaxRouter"),
        ({"top_k": 1}, "top_k=1 would leave the router without a gradient"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor=0.0 must be positive"),
        ({"router_std": 0.0}, "router_std=0.0 must be above 0"),
        ({"noise": float("nan")}, "noise=nan at least 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        upcycle(make(), **{"num_experts": 8, "top_k": 2, **sizes})


def test_only_a_swiglu_is_accepted():
    with pytest.raises(ValueError, match=r"mlp=Linear must be a moe\.SwiGLU"):
        upcycle(torch.nn.Linear(3, 3), 8, 2)
