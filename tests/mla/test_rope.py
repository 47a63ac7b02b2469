"""The rotary embedding against complex multiplication and explicit 2 x 2 rotations."""

import cmath
import math

import pytest
import torch

from mla import RotaryEmbedding

DIM, THETA = 6, 100.0
X = torch.randn(3, 5, 2, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([3, 4, 5, 9, 12])


def by_hand(vector, position, interleaved, theta=THETA):
    """Pair i, as one complex number, times exp(1j x position x theta^(-2i/dim)) (RoFormer eq. 15)."""
    half = len(vector) // 2
    out = [0.0] * len(vector)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        z = complex(vector[a], vector[b]) * cmath.exp(1j * position * theta ** (-2 * i / len(vector)))
        out[a], out[b] = z.real, z.imag
    return out


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_multiplication_by_a_complex_number_of_length_1(interleaved):
    y = RotaryEmbedding(DIM, THETA, interleaved)(X, POSITIONS)
    for row in range(3):
        for time, position in enumerate(POSITIONS.tolist()):
            for head in range(2):
                want = by_hand(X[row, time, head].tolist(), position, interleaved)
                assert y[row, time, head].tolist() == pytest.approx(want, abs=5e-6)  # angles are fp32
    torch.testing.assert_close(y.norm(dim=-1), X.norm(dim=-1), rtol=1e-6, atol=0)


def test_one_pair_turns_counterclockwise_by_the_position_in_radians():
    for position in (-2, 0, 1, 7):
        y = RotaryEmbedding(2)(torch.tensor([[[1.0, 0.0]]]), torch.tensor([position]))
        assert y.flatten().tolist() == pytest.approx([math.cos(position), math.sin(position)], abs=1e-6)


def test_the_two_layouts_differ_by_a_permutation_of_the_features():
    split = torch.tensor([0, 2, 4, 1, 3, 5])  # even features, then odd ones
    interleaved, halves = RotaryEmbedding(DIM, THETA), RotaryEmbedding(DIM, THETA, interleaved=False)
    assert torch.equal(halves(X[..., split], POSITIONS), interleaved(X, POSITIONS)[..., split])
    assert not torch.allclose(halves(X, POSITIONS), interleaved(X, POSITIONS), atol=0.1)


@pytest.mark.parametrize("interleaved", [True, False])
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


def test_every_row_may_have_its_own_positions():
    rope = RotaryEmbedding(DIM, THETA)
    own = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [5, 4, 3, 2, 90]])
    y = rope(X, own)
    for row in range(3):
        assert torch.equal(y[row : row + 1], rope(X[row : row + 1], own[row]))


def test_heads_turn_alike_and_are_optional():
    rope = RotaryEmbedding(DIM, THETA)
    for positions in (POSITIONS, POSITIONS + torch.arange(3).unsqueeze(1)):
        assert torch.equal(rope(X[:, :, 1], positions), rope(X, positions)[:, :, 1])


def test_bf16_features_are_turned_by_fp32_angles():
    rope = RotaryEmbedding(DIM, 1e6).bfloat16()
    x = X.float().bfloat16()
    positions = torch.tensor([256, 257, 1001, 4095, 4097])  # bf16 knows 256 and 258
    y = rope(x, positions)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, RotaryEmbedding(DIM, 1e6)(x.float(), positions).bfloat16())
    assert not list(rope.parameters()) and not rope.state_dict()


def test_turning_back_undoes_a_turn_and_is_its_gradient():
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
def test_a_theta_without_meaning_is_refused(theta):
    with pytest.raises(ValueError, match=f"theta={theta} must be finite and at least 1"):
        RotaryEmbedding(4, theta)


def test_scaling_is_refused_until_it_exists():
    with pytest.raises(ValueError, match="scaling='yarn' is not supported"):
        RotaryEmbedding(4, scaling="yarn")


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
