import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.loss import cross_entropy, token_log_probs


def by_hand(logits, target):
    """Log-probability of one target, in plain Python."""
    largest = max(logits)
    return logits[target] - largest - math.log(sum(math.exp(z - largest) for z in logits))


ROWS = st.integers(2, 6).flatmap(
    lambda vocab: st.lists(
        st.tuples(
            st.lists(st.floats(-50, 50), min_size=vocab, max_size=vocab),
            st.integers(0, vocab - 1),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    )
)


@given(rows=ROWS)
def test_loss_is_minus_the_log_of_the_softmax(rows):
    logits = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    targets, mask = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    want = [by_hand(row[0], row[1]) for row in rows]
    assert token_log_probs(logits, targets).tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)
    assert float(cross_entropy(logits, targets)) == pytest.approx(
        -sum(want) / len(want), rel=1e-12, abs=1e-12
    )
    counted = [value for value, row in zip(want, rows) if row[2]]
    mean = -sum(counted) / len(counted) if counted else 0.0
    assert float(cross_entropy(logits, targets, mask)) == pytest.approx(mean, rel=1e-12, abs=1e-12)


def test_leading_axes_are_kept():
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    targets = torch.randint(5, (2, 3, 4))
    got = token_log_probs(logits, targets)
    assert got.shape == (2, 3, 4)
    assert got[1, 2, 3].item() == pytest.approx(
        by_hand(logits[1, 2, 3].tolist(), targets[1, 2, 3].item()), rel=1e-12
    )
    assert token_log_probs(logits[0, 0, 0], targets[0, 0, 0]).shape == ()


def test_even_logits_cost_the_log_of_the_vocabulary():
    assert float(
        cross_entropy(torch.zeros(3, 7, dtype=torch.float64), torch.tensor([0, 3, 6]))
    ) == pytest.approx(math.log(7))


def test_nothing_left_by_the_mask_is_0_with_gradient_0():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    value = cross_entropy(logits, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_masked_tokens_have_no_gradient_and_do_not_change_the_mean():
    logits = torch.zeros(3, 4)
    logits[1] = 1e4
    logits.requires_grad_()
    value = cross_entropy(logits, torch.tensor([1, 1, 1]), torch.tensor([True, False, False]))
    value.backward()
    assert value.item() == pytest.approx(math.log(4))
    assert logits.grad[0].tolist() == pytest.approx([0.25, -0.75, 0.25, 0.25])
    assert logits.grad[1:].abs().sum() == 0


@pytest.mark.parametrize(
    "dtype, wide",
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_narrow_logits_are_summed_in_fp32(dtype, wide):
    logits = torch.randn(64, 300).to(dtype)
    targets = torch.randint(300, (64,))
    got = token_log_probs(logits, targets)
    assert got.dtype == cross_entropy(logits, targets).dtype == wide
    want = [by_hand(row, target) for row, target in zip(logits.double().tolist(), targets.tolist())]
    assert got.tolist() == pytest.approx(want, rel=1e-5)


def test_the_gradient_is_probability_minus_target():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, 2, 2])
    cross_entropy(logits, targets).backward()
    for row, target, grad in zip(logits.tolist(), targets.tolist(), logits.grad.tolist()):
        want = [(math.exp(by_hand(row, i)) - (i == target)) / 4 for i in range(6)]
        assert grad == pytest.approx(want, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("logits, targets", [((2, 3, 5), (2, 4)), ((2, 3, 5), (2, 3, 5)), ((3, 5), ())])
def test_shapes_that_do_not_agree_are_refused(logits, targets):
    with pytest.raises(ValueError, match=r"logits .* and targets .* must agree in all but the vocabulary"):
        token_log_probs(torch.zeros(logits), torch.zeros(targets, dtype=torch.int64))
