"""The rotary embedding and its scalings against complex multiplication, in plain floats, and transformers."""

import cmath
import math

import pytest
import torch

from mla import Linear, Llama3, RotaryEmbedding, YaRN
from mla.rope import frequencies

DIM, THETA = 6, 100.0
X = torch.randn(3, 5, 2, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([3, 4, 5, 9, 12])
SCALINGS = {  # theta and scaling
    "linear": (10000.0, Linear(3.0)),
    "V3": (10000.0, YaRN(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)),
    "V2": (10000.0, YaRN(40.0, 4096, mscale=0.707, mscale_all_dim=0.707)),
    "Kimi K2": (50000.0, YaRN(32.0, 4096, 1.0, 1.0, mscale=1.0, mscale_all_dim=1.0)),
    "Qwen": (1e6, YaRN(4.0, 32768)),
    "two mscales": (10000.0, YaRN(8.0, 4096, mscale=1.5, mscale_all_dim=0.5)),
    "no fast pair": (10000.0, YaRN(8.0, 128)),
    "hardly any context": (10000.0, YaRN(8.0, 6)),
    "no slow pair": (10.0, YaRN(8.0, 1000)),
    "Llama 3.1": (500000.0, Llama3(8.0, 8192, 1.0, 4.0)),
    "all of Llama 3's ramp": (100.0, Llama3(5.0, 100, 0.5, 20.0)),
}
DIMS = (2, 6, 10, 64, 128)
SCALED = pytest.mark.parametrize("theta, scaling", SCALINGS.values(), ids=SCALINGS)
LAYOUTS = pytest.mark.parametrize("interleaved", [True, False])


def plain_frequencies(dim, theta=THETA):
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def scaled_frequencies(dim, theta, scaling):
    """Radians per position for each pair, from the papers; YaRN's ramp from its authors' code."""
    scaled = []
    rounds = lambda i: scaling.original_context * theta ** (-2 * i / dim) / (2 * math.pi)  # noqa: E731
    for i, frequency in enumerate(plain_frequencies(dim, theta)):
        if isinstance(scaling, Linear):
            kept = 0.0
        elif isinstance(scaling, Llama3):
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = min(max((rounds(i) - low) / (high - low), 0.0), 1.0)
        else:  # linear from the last fast pair to the first slow one
            fast = max((j for j in range(dim) if rounds(j) >= scaling.beta_fast), default=0)
            slow = min((j for j in range(dim) if rounds(j) <= scaling.beta_slow), default=dim - 1)
            kept = 1.0 if i <= fast else 0.0 if i >= slow else (slow - i) / (slow - fast)
        scaled.append(kept * frequency + (1 - kept) * frequency / scaling.factor)
    return scaled


def cos_sin_factor(scaling):
    """YaRN's factor on cos and sin."""
    of = lambda mscale: 0.1 * mscale * math.log(scaling.factor) + 1  # noqa: E731
    return of(scaling.mscale) / of(scaling.mscale_all_dim) if isinstance(scaling, YaRN) else 1.0


def by_hand(vector, position, interleaved, radians, factor=1.0):
    """Pair i, as one complex number, times factor x exp(1j x position x radians[i]) (RoFormer eq. 15)."""
    half = len(vector) // 2
    out = [0.0] * len(vector)
    for i in range(half):
        a, b = pair(i, half, interleaved)
        z = complex(vector[a], vector[b]) * factor * cmath.exp(1j * position * radians[i])
        out[a], out[b] = z.real, z.imag
    return out


def pair(i, half, interleaved):
    return (2 * i, 2 * i + 1) if interleaved else (i, i + half)


@LAYOUTS
def test_rotation_is_multiplication_by_a_complex_number_of_length_1(interleaved):
    y = RotaryEmbedding(DIM, THETA, interleaved)(X, POSITIONS)
    for row in range(3):
        for time, position in enumerate(POSITIONS.tolist()):
            for head in range(2):
                want = by_hand(X[row, time, head].tolist(), position, interleaved, plain_frequencies(DIM))
                assert y[row, time, head].tolist() == pytest.approx(want, abs=5e-6)  # angles are fp32
    torch.testing.assert_close(y.norm(dim=-1), X.norm(dim=-1), rtol=1e-6, atol=0)


def test_one_pair_rotates_counterclockwise_by_the_position_in_radians():
    for position in (-2, 0, 1, 7):
        y = RotaryEmbedding(2)(torch.tensor([[[1.0, 0.0]]]), torch.tensor([position]))
        assert y.flatten().tolist() == pytest.approx([math.cos(position), math.sin(position)], abs=1e-6)


def test_the_two_layouts_differ_by_a_permutation_of_the_features():
    split = torch.tensor([0, 2, 4, 1, 3, 5])  # even features, then odd ones
    interleaved, halves = RotaryEmbedding(DIM, THETA), RotaryEmbedding(DIM, THETA, interleaved=False)
    assert torch.equal(halves(X[..., split], POSITIONS), interleaved(X, POSITIONS)[..., split])
    assert not torch.allclose(halves(X, POSITIONS), interleaved(X, POSITIONS), atol=0.1)


@LAYOUTS
@pytest.mark.parametrize("shift", [1, 100, 5000])
def test_scores_depend_on_relative_positions_only(interleaved, shift):
    rope = RotaryEmbedding(DIM, THETA, interleaved)
    q, k = X[:, :, 0], X[:, :, 1]
    scores = lambda start: rope(q, POSITIONS + start) @ rope(k, POSITIONS + start).mT  # noqa: E731
    torch.testing.assert_close(scores(shift), scores(0), rtol=0, atol=1e-2 if shift > 1000 else 1e-4)
    assert (rope(q, POSITIONS + 1) @ rope(k, POSITIONS).mT - scores(0)).abs().max() > 0.1


def test_position_0_changes_nothing():
    for interleaved in (True, False):
        assert torch.equal(RotaryEmbedding(DIM, THETA, interleaved)(X, torch.zeros(5, dtype=torch.int64)), X)


def test_every_row_may_have_different_positions():
    rope = RotaryEmbedding(DIM, THETA)
    own = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [5, 4, 3, 2, 90]])
    y = rope(X, own)
    for row in range(3):
        assert torch.equal(y[row : row + 1], rope(X[row : row + 1], own[row]))


def test_heads_share_the_angles_and_are_optional():
    rope = RotaryEmbedding(DIM, THETA)
    for positions in (POSITIONS, POSITIONS + torch.arange(3).unsqueeze(1)):
        assert torch.equal(rope(X[:, :, 1], positions), rope(X, positions)[:, :, 1])


def test_bf16_features_are_rotated_by_fp32_angles():
    rope = RotaryEmbedding(DIM, 1e6).bfloat16()
    x = X.float().bfloat16()
    positions = torch.tensor([256, 257, 1001, 4095, 4097])  # bf16 has 256 and 258, not 257
    y = rope(x, positions)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, RotaryEmbedding(DIM, 1e6)(x.float(), positions).bfloat16())
    assert not list(rope.parameters()) and not rope.state_dict()


def test_negative_positions_undo_the_rotation_and_give_its_gradient():
    rope = RotaryEmbedding(DIM, THETA)
    x = X.clone().requires_grad_()
    y = rope(x, POSITIONS)
    torch.testing.assert_close(rope(y, -POSITIONS), x, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad((y * X.flip(0)).sum(), x)
    torch.testing.assert_close(gradient, rope(X.flip(0), -POSITIONS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 1, 7, -2])
def test_an_odd_dim_is_refused(dim):
    with pytest.raises(ValueError, match=f"dim={dim} must be even and at least 2"):
        RotaryEmbedding(dim)


@pytest.mark.parametrize("theta", [0.0, -1, 0.5, math.inf, math.nan])
def test_theta_out_of_range_is_refused(theta):
    with pytest.raises(ValueError, match=f"theta={theta} must be finite and at least 1"):
        RotaryEmbedding(4, theta)


def test_theta_1_is_refused_for_yarn():
    with pytest.raises(ValueError, match=r"theta=1\.0 must be above 1 for YaRN"):
        RotaryEmbedding(4, 1.0, scaling=YaRN(4.0, 4096))


@pytest.mark.parametrize("scaling", ["yarn", 4.0, YaRN, {"factor": 4.0}])
def test_a_wrong_type_of_scaling_is_refused(scaling):
    with pytest.raises(ValueError, match=r"scaling=.* must be a Linear, YaRN, Llama3 or None"):
        RotaryEmbedding(4, scaling=scaling)


NUMBERS = {
    Linear: {"factor": 1.0},
    YaRN: {
        "factor": 1.0,
        "original_context": 1,
        "beta_fast": 1e-6,
        "beta_slow": 1e-6,
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
    },
    Llama3: {"factor": 1.0, "original_context": 1, "low_freq_factor": 1e-6, "high_freq_factor": 1e-6},
}


@pytest.mark.parametrize(
    "kind, name, least", [(kind, *item) for kind, numbers in NUMBERS.items() for item in numbers.items()]
)
def test_scaling_fields_out_of_range_are_refused_by_name(kind, name, least):
    good = {"factor": 4.0, "original_context": 4096}
    good = {key: value for key, value in good.items() if key in NUMBERS[kind]}
    for value in (least - 1e-7, -1, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"^{name}={value} must be finite and at least {least}$"):
            kind(**{**good, name: value})
    if name not in ("beta_fast", "high_freq_factor"):  # must not be below their counterparts
        assert getattr(kind(**{**good, name: least}), name) == least


def test_a_ramp_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match=r"beta_fast=1\.5 is below beta_slow=2\.0"):
        YaRN(4.0, 4096, beta_fast=1.5, beta_slow=2.0)
    for high in (1.5, 2.0):
        with pytest.raises(ValueError, match=f"high_freq_factor={high} must be above low_freq_factor=2.0"):
            Llama3(4.0, 4096, low_freq_factor=2.0, high_freq_factor=high)


@LAYOUTS
@SCALED
def test_every_pair_rotates_at_its_scaled_frequency(theta, scaling, interleaved):
    for dim in DIMS:
        radians, half = scaled_frequencies(dim, theta, scaling), dim // 2
        positions = [round(1 / frequency) for frequency in radians]  # pair i has rotated by about a radian
        x = torch.randn(1, half, dim, dtype=torch.float64)
        y = RotaryEmbedding(dim, theta, interleaved, scaling)(x, torch.tensor(positions))
        for i, position in enumerate(positions):
            want = by_hand(x[0, i].tolist(), position, interleaved, radians, cos_sin_factor(scaling))
            for feature in pair(i, half, interleaved):
                assert y[0, i, feature].item() == pytest.approx(want[feature], abs=5e-6)


@pytest.mark.parametrize("mscale, softmax_factor", [(1.0, 1.8739), (0.707, 1.5896)])
def test_deepseeks_yarn_scales_the_softmax_and_not_cos_and_sin(mscale, softmax_factor):
    for interleaved in (True, False):
        scaling = YaRN(40.0, 4096, mscale=mscale, mscale_all_dim=mscale)
        rope = RotaryEmbedding(DIM, THETA, interleaved, scaling)
        assert rope.cos_sin_factor == 1.0
        assert rope.softmax_factor == pytest.approx(softmax_factor, abs=5e-5)
        assert rope.softmax_factor == pytest.approx((0.1 * mscale * math.log(40) + 1) ** 2, rel=1e-14)
        assert torch.equal(rope(X, torch.zeros(5, dtype=torch.int64)), X)
        norms = rope(X, POSITIONS + 4096).norm(dim=-1)
        torch.testing.assert_close(norms, X.norm(dim=-1), rtol=1e-6, atol=0)


def test_the_papers_yarn_scales_cos_and_sin_and_not_the_softmax():
    rope = RotaryEmbedding(DIM, THETA, scaling=YaRN(4.0, 32768))
    assert rope.softmax_factor == 1.0 and rope.cos_sin_factor == pytest.approx(0.1 * math.log(4) + 1)
    torch.testing.assert_close(rope(X, 0 * POSITIONS), rope.cos_sin_factor * X, rtol=1e-6, atol=0)
    for other in (None, Linear(4.0), Llama3(4.0, 32768)):
        rope = RotaryEmbedding(DIM, THETA, scaling=other)
        assert (rope.cos_sin_factor, rope.softmax_factor) == (1.0, 1.0)


@pytest.mark.parametrize("scaling", [Linear(1.0), YaRN(1.0, 4096, mscale_all_dim=0.5), Llama3(1.0, 4096)])
def test_a_factor_of_1_changes_nothing(scaling):
    rope = RotaryEmbedding(64, scaling=scaling)
    assert (rope.cos_sin_factor, rope.softmax_factor) == (1.0, 1.0)
    x = torch.randn(1, 5, 64)
    torch.testing.assert_close(rope(x, POSITIONS), RotaryEmbedding(64)(x, POSITIONS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scaling", [None, Linear(7.0), YaRN(7.0, 4096), Llama3(7.0, 4096)])
def test_the_device_is_that_of_the_features_not_the_default(scaling):
    rope, x = RotaryEmbedding(DIM, 77.0, scaling=scaling), X.float()
    with torch.device("meta"):
        y = rope(x, POSITIONS)
    assert y.device.type == "cpu" and rope(x.to("meta"), POSITIONS.to("meta")).device.type == "meta"
    assert torch.equal(y, rope(x, POSITIONS))


@pytest.mark.parametrize(
    "x, positions, message",
    [
        (X[..., :4], POSITIONS, r"x is torch.float64 \(3, 5, 2, 4\); expected floating-point .*dim=6"),
        (X[0, 0], POSITIONS, r"x is torch.float64 \(2, 6\)"),
        (X.long(), POSITIONS, r"x is torch.int64"),
        (X, POSITIONS[:4], r"positions have shape \(4,\); expected \(time,\) or \(batch, time\)"),
        (X, POSITIONS.expand(2, 5), r"positions have shape \(2, 5\)"),
        (X, torch.tensor(3), r"positions have shape \(\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, positions, message):
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(DIM)(x, positions)


def test_halves_equal_transformers_llama():
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angles = POSITIONS.float().unsqueeze(-1) / THETA ** (torch.arange(0, DIM, 2).float() / DIM)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    x = X.float().transpose(1, 2)  # (batch, heads, time, dim)
    theirs, _ = apply_rotary_pos_emb(x, x, cos.unsqueeze(0), sin.unsqueeze(0))
    ours = RotaryEmbedding(DIM, THETA, interleaved=False)(X.float(), POSITIONS)
    torch.testing.assert_close(ours.transpose(1, 2), theirs, rtol=0, atol=1e-6)


@SCALED
def test_scaled_vectors_equal_those_of_transformers_up_to_position_131072(theta, scaling):
    pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    kind = type(scaling).__name__.lower()
    names = {"original_context": "original_max_position_embeddings"}
    numbers = {names.get(name, name): value for name, value in vars(scaling).items() if value}
    longest = round(scaling.factor * getattr(scaling, "original_context", 4096))
    positions = torch.tensor([[0, 1, 100, 4095, 131072], [131071, 5000, 7, 65537, 32768]])
    for dim in DIMS:
        config = LlamaConfig(
            hidden_size=dim, num_attention_heads=1, head_dim=dim, max_position_embeddings=longest,
            rope_parameters={"rope_type": kind, "rope_theta": theta, **numbers},
        )  # fmt: skip
        frequency, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        ours = frequencies(dim, theta, scaling, torch.device("cpu"))
        torch.testing.assert_close(ours, frequency, rtol=2e-7, atol=0)
        x = torch.randn(2, 5, 3, dim)
        cos, sin = LlamaRotaryEmbedding(config)(x, positions)
        by_head = x.transpose(1, 2)
        halves = RotaryEmbedding(dim, theta, interleaved=False, scaling=scaling)
        interleaved = RotaryEmbedding(dim, theta, interleaved=True, scaling=scaling)
        assert halves.cos_sin_factor == interleaved.cos_sin_factor == pytest.approx(factor, rel=1e-14)
        theirs, _ = apply_rotary_pos_emb(by_head, by_head, cos, sin)
        torch.testing.assert_close(halves(x, positions).transpose(1, 2), theirs, rtol=0, atol=1e-5)
        theirs, _ = apply_rotary_pos_emb_interleave(by_head, by_head, cos, sin)
        y = interleaved(x, positions).transpose(1, 2)
        y = torch.cat((y[..., ::2], y[..., 1::2]), dim=-1)  # transformers puts even features first
        torch.testing.assert_close(y, theirs, rtol=0, atol=1e-5)
