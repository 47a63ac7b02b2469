"""Converting grouped-query attention to MLA: exact at full size, and the error at smaller sizes."""

import copy
import math

import pytest
import torch
from torch import nn

from mla import GroupedQueryAttention, Llama3, RotaryEmbedding, YaRN, to_mla
from mla.convert import inputs, relative_error, turned
from mla.paged import PAGE, Plan, entry_of, step_of
from tests.moe.pretend import OnMPS, mps, to_mps

BATCH, TIME, DIM, HEADS, HEAD_DIM = 2, 11, 50, 6, 8
KV_HEADS = pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])  # MHA, GQA twice, MQA
YARN = YaRN(8.0, 16, mscale=1.0, mscale_all_dim=0.4)  # MLA scales its softmax with it, GQA does not
ROPES = {
    "interleaved": {},
    "halves, slow": {"interleaved": False, "theta": 1e6},
    "yarn": {"scaling": YARN, "theta": 100.0},
    "llama 3, halves": {"interleaved": False, "scaling": Llama3(4.0, 32)},
}


def make(kv_heads, dim=DIM, dtype=torch.float64, rope=None, **options):
    rope = RotaryEmbedding(HEAD_DIM, **(rope or {}))
    layer = GroupedQueryAttention(dim, HEADS, kv_heads, HEAD_DIM, rope=rope, **options).to(dtype)
    for linear in (layer.q, layer.k):  # far from uniform attention
        linear.weight.data.mul_(3)
    if layer.out.bias is not None:
        layer.out.bias.data.normal_()
    return layer


def some_x(dtype=torch.float64, batch=BATCH, time=TIME, dim=DIM):
    return torch.randn(batch, time, dim, dtype=dtype)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@KV_HEADS
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_at_full_size_the_outputs_are_the_same(kv_heads, rope):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for dim in (DIM, 20):  # 20: below the width of all values
            gqa, x = make(kv_heads, dim, dtype, rope, out_bias=True), some_x(dtype, dim=dim)
            mla, far = to_mla(gqa), torch.stack((torch.arange(TIME) * 3 + 40, torch.arange(TIME).flip(0)))
            mask = torch.rand(BATCH, TIME, TIME) < 0.7
            close(mla(x), gqa(x), tolerance)
            close(mla(x, positions=far, mask=mask), gqa(x, positions=far, mask=mask), tolerance)
            assert (gqa(x, positions=far) - gqa(x)).abs().max() > 100 * tolerance


@KV_HEADS
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@torch.no_grad()
def test_at_full_size_steps_through_every_cache_are_the_same(kv_heads, rope):
    gqa, x = make(kv_heads, rope=rope), some_x()
    mla, want = to_mla(gqa), gqa(x)
    for sizes in ([TIME], [1] * TIME, [5, 1, 1, 4]):
        cache, old = mla.new_cache(BATCH, TIME), gqa.new_cache(BATCH, TIME)
        for chunk, part in zip(x.split(sizes, dim=1), want.split(sizes, dim=1)):
            close(mla(chunk, cache), part)
            close(gqa(chunk, old), part)
    step = step_of(type(mla))
    heads, width, dtype, device = entry_of(mla, step)
    pool = torch.zeros(BATCH, heads, PAGE, width, dtype=dtype, device=device)
    for at, part in enumerate(want.unbind(1)):
        plan = Plan([[row] for row in range(BATCH)], [at] * BATCH, 1, device)
        rows = torch.nn.functional.pad(x[:, at], (0, 0, 0, plan.filled - BATCH))
        close(step.run(mla, rows, pool, plan)[:BATCH], part)
    # new tokens after rows of different length
    cache = mla.new_cache(BATCH, TIME)
    mla(x[:, :5], cache)
    cache.truncate([5, 2])
    close(mla(x[:, 5:6], cache)[0], want[0, 5:6])
    old = gqa.new_cache(BATCH, TIME)
    gqa(x[:, :5], old)
    old.truncate([5, 2])
    close(mla(x[:, 6:9], cache)[1], (gqa(x[:, 5:6], old), gqa(x[:, 6:9], old))[1][1])


@pytest.mark.parametrize(
    "kv_heads, dim, rank, rope, numbers",
    [
        (2, DIM, None, None, 2 * 16 + 1),  # all keys and values, and the constant
        (6, DIM, None, None, 48 + 48 + 1),
        (6, 20, None, None, 48 + 20 + 1),  # the values have rank 20
        (2, DIM, 9, 4, 9 + 4),
        (2, DIM, None, 4, 4 + 12 + 16 + 1),
    ],
)
def test_cache_sizes_are_as_documented(kv_heads, dim, rank, rope, numbers):
    gqa = make(kv_heads, dim)
    mla, x = to_mla(gqa, rank, rope), some_x(dim=dim)
    cache, old = mla.new_cache(BATCH, 16), gqa.new_cache(BATCH, 16)
    mla(x, cache), gqa(x, old)
    assert cache.nbytes == BATCH * 16 * 8 * numbers
    assert old.nbytes == BATCH * 16 * 8 * 2 * kv_heads * HEAD_DIM
    assert int((cache.filled != 0).any(dim=(0, 1)).sum()) == numbers - 1  # the constant: 0 after kv_norm


class SomeTurn(nn.Module):
    """A rotary embedding that rotates only some pairs of features."""

    def __init__(self, rope, pairs):
        super().__init__()
        self.rope, self.dim = rope, rope.dim
        self.features = [2 * i + j for i in pairs for j in (0, 1)]
        if not rope.interleaved:
            self.features = [i + j * rope.dim // 2 for i in pairs for j in (0, 1)]

    def forward(self, x, positions):
        y = x * self.rope.cos_sin_factor
        y[..., self.features] = self.rope(x, positions)[..., self.features]
        return y


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("pairs", [[1], [0, 2], [1, 2, 3]], ids=str)
def test_pairs_that_are_not_rotated_score_as_at_distance_zero(rope, pairs):
    gqa, x = make(1, rope=rope), some_x()
    for weight in (gqa.q.weight, gqa.k.weight):  # the pairs to rotate matter most
        rows = weight.data.view(-1, HEAD_DIM, DIM)
        rows[:, SomeTurn(gqa.rope, pairs).features] *= 30
        weight.data /= 20
    mla = to_mla(gqa, qk_rope_head_dim=2 * len(pairs))
    assert mla.rope.pairs.tolist() == pairs and mla.qk_nope_head_dim == HEAD_DIM - 2 * len(pairs)
    gqa.rope = SomeTurn(gqa.rope, pairs)
    close(mla(x), gqa(x))
    gqa.rope = gqa.rope.rope
    assert relative_error(gqa, mla, x) > 1e-6


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_heads_whose_keys_are_multiples_of_one_another_share_one_rope_key(rope):
    gqa, x = make(3, rope=rope), some_x()
    keys = gqa.k.weight.data.view(3, HEAD_DIM, DIM)
    keys[1], keys[2] = -0.5 * keys[0], 2 * keys[0]
    close(to_mla(gqa, qk_rope_head_dim=HEAD_DIM)(x), gqa(x), 1e-6)
    assert relative_error(gqa, to_mla(gqa, qk_rope_head_dim=HEAD_DIM - 2), x) > 1e-5


def correlated(time=200):
    """Inputs concentrated in a few directions."""
    sizes = 1.5 ** -torch.arange(DIM, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64)).Q
    return some_x(batch=4, time=time) * sizes @ rotation * 4


def latents(gqa, mla, x):
    """Unrotated keys and values, (tokens, features): as mla has them, and the exact ones."""
    w_key, w_value = mla.split_kv_b()
    groups = HEADS // gqa.num_kv_heads
    latent = mla.compress(x)[0].flatten(0, 1)
    found = [torch.einsum("tl, hwl -> thw", latent, w[::groups]).flatten(1) for w in (w_key, w_value)]
    exact = to_mla(gqa, None, mla.qk_rope_head_dim, x)
    w_key, w_value = exact.split_kv_b()
    latent = exact.compress(x)[0].flatten(0, 1)
    return found, [torch.einsum("tl, hwl -> thw", latent, w[::groups]).flatten(1) for w in (w_key, w_value)]


@torch.no_grad()
@pytest.mark.parametrize("rank", [3, 8, 15])
def test_the_latent_is_the_best_of_its_rank_for_the_sample(rank):
    gqa, x = make(2), correlated()
    mla = to_mla(gqa, rank + 1, 6, x)
    (key, value), (key_wanted, value_wanted) = latents(gqa, mla, x)
    close(value_wanted, gqa.v(x).flatten(0, 1))
    balance = value_wanted.norm() / key_wanted.norm()
    left = torch.cat((balance * (key - key_wanted), value - value_wanted), dim=1).square().sum()
    singular = torch.linalg.svdvals(torch.cat((balance * key_wanted, value_wanted), dim=1))
    assert math.isclose(left, singular[rank:].square().sum(), rel_tol=1e-4)  # Eckart and Young's bound


def separate(gqa, rank, rope, x):
    """to_mla, but with half the rank for keys and half for values, each by its own SVD."""
    mla, exact = to_mla(gqa, rank + 1, rope, x), to_mla(gqa, None, rope, x)
    down, groups = exact.kv_a.weight[1:-rope].detach(), HEADS // gqa.num_kv_heads
    tokens = x.flatten(0, 1)
    downs, ups = [], []
    for up in exact.split_kv_b():
        weight = up[::groups, :, 1:].flatten(0, 1).detach() @ down  # (kv_heads x width, dim)
        basis = torch.linalg.svd(tokens @ weight.T, full_matrices=False).Vh[: rank // 2].T  # plain PCA
        downs.append(basis.T @ weight)
        ups.append(basis.unflatten(0, (gqa.num_kv_heads, -1)).repeat_interleave(groups, dim=0))
    key, value = ups
    up = torch.cat((torch.cat((key, torch.zeros_like(key)), -1), torch.cat((0 * value, value), -1)), dim=1)
    mla.kv_a.weight.data[1:-rope] = torch.cat(downs)
    mla.kv_b.weight.data[:, 1:] = up.flatten(0, 1)
    return mla


def test_a_sample_beats_the_weights_alone_and_one_latent_beats_two():
    for seed in range(5):
        torch.manual_seed(seed)
        gqa, x = make(2), correlated(time=100)
        x, other = x[:2], x[2:]  # evaluated on inputs outside the sample
        exact = to_mla(gqa, None, 8, x)  # except for the rotation
        found = [relative_error(exact, to_mla(gqa, rank, 8, x), other) for rank in (4, 7, 10, 13, 25)]
        assert found == sorted(found, reverse=True) and found[-1] < 1e-10
        joint, weights = to_mla(gqa, 9, 8, x), to_mla(gqa, 9, 8)
        three = [relative_error(gqa, mla, other) for mla in (joint, separate(gqa, 8, 8, x), weights)]
        assert three[0] < 0.96 * three[1] and three[1] < 0.5 * three[2]


def test_without_a_sample_one_latent_beats_two_where_keys_and_values_read_the_same():
    gqa, x = make(2), some_x(batch=8)
    reads = torch.randn(10, DIM, dtype=torch.float64) / DIM**0.5
    for linear in (gqa.k, gqa.v):
        linear.weight.data = torch.randn(16, 10, dtype=torch.float64) @ reads + 0.02 * linear.weight.data
    exact = to_mla(gqa, None, 6)
    joint, two = to_mla(gqa, 11, 6), separate(gqa, 10, 6, torch.eye(DIM, dtype=torch.float64).unsqueeze(0))
    assert relative_error(exact, joint, x) < 0.03 and relative_error(exact, two, x) > 0.3


def test_error_falls_with_every_rotated_pair():
    gqa, x = make(2), some_x(batch=8)
    found = [relative_error(gqa, to_mla(gqa, None, width, x), x) for width in (2, 6, 10, 14, 16)]
    assert found == sorted(found, reverse=True) and found[0] > 0.05 and found[-1] < 1e-10


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_displacement_of_pairs_is_the_mean_over_the_samples_distances(rope):
    rope = RotaryEmbedding(HEAD_DIM, **rope)
    found = turned(rope, inputs(make(2), some_x(time=5))[1])
    for pair, far in enumerate(found.tolist()):
        way = 0.0
        for distance in range(5):
            x = torch.zeros(1, 1, HEAD_DIM, dtype=torch.float64)
            x[..., SomeTurn(rope, [pair]).features[0]] = 1 / rope.cos_sin_factor
            way += float((rope(x, torch.tensor([distance])) - x * rope.cos_sin_factor).square().sum()) / 5
        assert math.isclose(far, way, rel_tol=1e-5, abs_tol=1e-6)


def test_large_keys_do_not_take_the_latent_from_the_values():
    gqa, large, x = make(2), make(2), correlated()
    large.load_state_dict(gqa.state_dict())
    large.k.weight.data *= 50
    large.q.weight.data /= 50
    close(large(x), gqa(x))
    one, other = (to_mla(attention, 7, 6, x) for attention in (gqa, large))
    assert one.rope.pairs.tolist() == other.rope.pairs.tolist()
    close(one(x), other(x))


def test_kv_norm_stays_an_identity_in_training_and_gradients_are_those_of_gqa():
    gqa, x, target = make(2), some_x().requires_grad_(), some_x()
    mla = to_mla(gqa)
    for attention in (gqa, mla):
        ((attention(x) - target) ** 2).sum().backward()
    want = torch.autograd.grad(((gqa(x) - target) ** 2).sum(), x)[0]
    close(torch.autograd.grad(((mla(x) - target) ** 2).sum(), x)[0], want, 1e-8)
    close(mla.out.weight.grad, gqa.out.weight.grad, 1e-8)
    optimizer = torch.optim.Adam(mla.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        loss = (mla(x.detach()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    latent = mla.kv_a(x)[..., : mla.kv_lora_rank]
    close(mla.compress(x)[0][..., 1:], latent[..., 1:], 1e-7)
    assert (mla.compress(x)[0][..., 0] == 0).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_loses_no_more_than_in_gqa(dtype, tolerance):
    gqa, x = make(2, dtype=torch.float32), some_x(torch.float32)
    want = gqa(x)
    gqa, x = gqa.to(dtype), x.to(dtype)
    mla = to_mla(gqa)
    assert {parameter.dtype for parameter in mla.parameters()} == {dtype}
    for attention in (gqa, mla):
        assert (attention(x).float() - want).norm() < tolerance * want.norm()


def test_a_sample_of_one_token_is_exact_at_full_size():
    gqa, x = make(2), some_x()
    close(to_mla(gqa, x=x[:1, :1])(x), gqa(x))


def test_relative_error_is_a_ratio_of_norms():
    before, after, x = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), torch.randn(2, 4, 3)
    after.weight.data = before.weight.data * 1.25
    assert math.isclose(relative_error(before, after, x), 0.25, rel_tol=1e-6)
    after.weight.data[0], before.weight.data[1:] = 0, 0
    assert relative_error(before, nn.Identity(), torch.zeros(1, 1, 3) + x) != 0.25


@pytest.mark.parametrize(
    "options, arguments, message",
    [
        ({"qkv_bias": True}, {}, "qkv_bias=True cannot be converted"),
        ({"qk_norm_eps": 1e-6}, {}, "a qk norm cannot be converted"),
        ({}, {"qk_rope_head_dim": 5}, r"qk_rope_head_dim=5 must be even and in 2\.\.16"),
        ({}, {"qk_rope_head_dim": 0}, "qk_rope_head_dim=0 must be"),
        ({}, {"qk_rope_head_dim": 18}, "qk_rope_head_dim=18 must be"),
        ({}, {"kv_lora_rank": 1}, r"kv_lora_rank=1 must lie in 2\.\.17"),
        ({}, {"kv_lora_rank": 18}, "kv_lora_rank=18 must lie in"),
        ({}, {"kv_lora_rank": 26, "qk_rope_head_dim": 8}, r"kv_lora_rank=26 must lie in 2\.\.25"),
        ({}, {"x": torch.zeros(4, DIM)}, r"x has shape \(4, 50\); expected \(batch, time, dim=50\)"),
        ({}, {"x": torch.zeros(1, 4, 7)}, r"x has shape \(1, 4, 7\)"),
        ({}, {"x": torch.zeros(0, 4, DIM)}, r"x has shape \(0, 4, 50\)"),
        ({}, {"x": torch.zeros(1, 4, DIM)}, "NaN or only zeros"),
        ({}, {"x": torch.full((1, 4, DIM), math.nan)}, "x holds infinities, NaN"),
        ({}, {"kv_lora_rank": 8.5}, "kv_lora_rank=8.5 must be a whole number"),
        ({}, {"qk_rope_head_dim": 8.0}, "qk_rope_head_dim=8.0 must be a whole number"),
    ],
)
def test_wrong_options_and_arguments_are_refused(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        to_mla(make(2, **options), **arguments)


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match=r"^gqa=Linear must be a GroupedQueryAttention"):
        to_mla(nn.Linear(3, 3))


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e4])
def test_inputs_of_any_scale_are_converted_exactly_given_a_sample(size):
    gqa, x = make(2, dtype=torch.float32), size * some_x(torch.float32)
    assert relative_error(gqa, to_mla(gqa, x=x), x) < 3e-6


@torch.no_grad()
def test_the_sample_decides_which_pairs_are_rotated():
    """Two pairs in a key: the weights favour one, the sample the other."""
    gqa = make(1, dim=4)
    for linear in (gqa.q, gqa.k):
        weight = torch.zeros(linear.out_features // HEAD_DIM, HEAD_DIM // 2, 2, 4, dtype=torch.float64)
        weight[:, 0, :, 0], weight[:, 1, :, 1] = 3, 1
        linear.weight.copy_(weight.flatten(0, 2))
    x = some_x(dim=4)
    x[..., 0] *= 1e-3
    assert to_mla(gqa, None, 2).rope.pairs.tolist() == [0]
    assert to_mla(gqa, None, 2, x).rope.pairs.tolist() == [1]
    assert to_mla(gqa, None, 2, x.flip(-1)).rope.pairs.tolist() == [0]


def test_an_embedding_whose_pairs_are_unknown_is_refused():
    gqa = make(2)
    gqa.rope = SomeTurn(gqa.rope, [0])
    with pytest.raises(ValueError, match="rope=SomeTurn must be a RotaryEmbedding"):
        to_mla(gqa)


def test_on_a_device_without_float64_it_is_computed_on_the_cpu():
    gqa, x = make(3, dtype=torch.float32, out_bias=True), some_x(torch.float32)
    there = to_mps(copy.deepcopy(gqa))
    with mps():
        mla, chosen = to_mla(there), to_mla(there, 9, 6, OnMPS(x))
        errors = [relative_error(there, after, OnMPS(x)) for after in (mla, chosen)]
    want = [relative_error(gqa, after, x) for after in (to_mla(gqa), to_mla(gqa, 9, 6, x))]
    assert mla.q.weight.device.type == "mps" and mla.q.weight.dtype == torch.float32
    assert errors[0] < 1e-5 and errors[1] == pytest.approx(want[1], rel=1e-4) and want[1] > 0.01
