import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm import loss
from lm.loss import cross_entropy, head_cross_entropy, token_log_probs


def by_hand(logits, target):
    """The log-probability of one target, in plain Python."""
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


def test_an_empty_mask_gives_loss_0_with_gradient_0():
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
def test_mismatched_shapes_are_rejected(logits, targets):
    with pytest.raises(ValueError, match=r"logits .* and targets .* must agree in all but the vocabulary"):
        token_log_probs(torch.zeros(logits), torch.zeros(targets, dtype=torch.int64))


@pytest.fixture
def chunked(monkeypatch):
    """Chunks of at most 4 tokens with a vocabulary of 11."""
    monkeypatch.setattr(loss, "CHUNK", 4 * 11 * 4)


MASKS = {
    "none": None,
    "some": torch.tensor([[True, False, True, True, False, True, True]] * 2 + [[False] * 7]),
    "all hidden": torch.zeros(3, 7, dtype=torch.bool),
}


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_logits_in_chunks_cost_what_all_at_once_cost(mask, dtype, close):
    hidden = torch.randn(3, 7, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 5, dtype=dtype, requires_grad=True)
    targets = torch.randint(11, (3, 7))
    found = [
        head_cross_entropy(hidden, weight, targets, mask),
        cross_entropy(hidden @ weight.T, targets, mask),
    ]
    assert type(found[0].grad_fn).__name__ == "ChunkedBackward" and found[0].dtype == dtype
    torch.testing.assert_close(*found, rtol=close, atol=close)
    for mine, theirs in zip(*(torch.autograd.grad(value / 3, (hidden, weight)) for value in found)):
        torch.testing.assert_close(mine, theirs, rtol=close, atol=close)
    with torch.no_grad():
        assert torch.equal(head_cross_entropy(hidden, weight, targets, mask), found[0])


@pytest.mark.usefixtures("chunked")
def test_logits_in_chunks_give_gradients_that_accumulate():
    weight, total = torch.randn(11, 5, dtype=torch.float64, requires_grad=True), 0
    for _ in range(3):
        hidden, targets = torch.randn(9, 5, dtype=torch.float64), torch.randint(11, (9,))
        head_cross_entropy(hidden, weight, targets).backward()
        total += torch.autograd.grad(cross_entropy(hidden @ weight.T, targets), weight)[0]
    torch.testing.assert_close(weight.grad, total, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("chunked")
def test_logits_in_chunks_are_of_autocasts_dtype_and_their_gradients_of_the_weights():
    hidden, weight = torch.randn(20, 64, requires_grad=True), torch.randn(11, 64, requires_grad=True)
    targets = torch.randint(11, (20,))
    found = []
    for run in (head_cross_entropy, lambda h, w, t: cross_entropy(torch.nn.functional.linear(h, w), t)):
        with torch.autocast("cpu", torch.bfloat16):
            value = run(hidden, weight, targets)
        found.append((value, *torch.autograd.grad(value, (hidden, weight))))
    for mine, theirs in zip(*found):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 1e-2 * theirs.norm()
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("chunked")
def test_a_masked_nan_does_not_reach_the_loss():
    hidden, weight = torch.randn(9, 5), torch.randn(11, 5)
    hidden[2] = 1e38
    mask = torch.arange(9) != 2
    value = head_cross_entropy(hidden, weight, torch.zeros(9, dtype=torch.int64), mask)
    want = cross_entropy(hidden[mask] @ weight.T, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(value, want)


@pytest.mark.parametrize("chunk", [4 * 11 * 4, 2**20])
@pytest.mark.parametrize("bad", [1e38, float("inf"), float("nan")])
def test_a_masked_nan_does_not_reach_a_gradient(monkeypatch, chunk, bad):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    hidden, weight = torch.randn(9, 5), torch.randn(11, 5, requires_grad=True)
    targets, mask = torch.arange(9), torch.arange(9) != 2
    found = []
    for rows, of, keep in ((hidden.clone(), targets, mask), (hidden[mask], targets[mask], None)):
        if keep is not None:
            rows[2] = bad
        rows.requires_grad_()
        head_cross_entropy(rows, weight, of, keep).backward()
        found.append((weight.grad, rows.grad if keep is None else rows.grad[mask]))
        if keep is not None:
            assert not rows.grad[2].any()
        weight.grad = None
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [4 * 11 * 4, 2**20])
@pytest.mark.parametrize("mask", [torch.ones(8) > 0, torch.ones(4, 1) > 0, torch.ones(4, 8)])
def test_a_mask_of_the_wrong_shape_or_dtype_is_rejected(monkeypatch, chunk, mask):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    hidden, weight, targets = torch.randn(4, 8, 5), torch.randn(11, 5), torch.zeros(4, 8, dtype=torch.int64)
    for refused in (
        lambda: head_cross_entropy(hidden, weight, targets, mask),
        lambda: cross_entropy(hidden @ weight.T, targets, mask),
    ):
        with pytest.raises(ValueError, match=r"^mask is .*; expected torch.bool \(4, 8\)"):
            refused()


@pytest.mark.parametrize("target", [-100, -1, 11])
@pytest.mark.parametrize("chunk", [4 * 11 * 4, 2**20])
def test_a_target_outside_the_vocabulary_is_rejected(monkeypatch, chunk, target):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    targets = torch.zeros(9, dtype=torch.int64)
    targets[3] = target
    with pytest.raises(ValueError, match=rf"^target {target} is not in the vocabulary, 0\.\.10"):
        head_cross_entropy(torch.randn(9, 5), torch.randn(11, 5), targets)


@pytest.mark.usefixtures("chunked")
def test_many_chunks_of_bf16_add_their_gradients_in_fp32():
    hidden = torch.randn(4000, 5).bfloat16()
    targets, found = torch.randint(11, (4000,)), []
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.zeros(11, 5, dtype=dtype, requires_grad=True)
        head_cross_entropy(hidden.to(dtype), weight, targets).backward()
        found.append(weight.grad.float())
    assert (found[0] - found[1]).norm() < 0.01 * found[1].norm()  # a bf16 sum is off by 10 %


@pytest.mark.usefixtures("chunked")
def test_a_gradient_of_the_gradient_of_chunks_is_an_error():
    hidden = torch.randn(9, 5, requires_grad=True)
    value = head_cross_entropy(hidden, torch.randn(11, 5), torch.zeros(9, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="chunked logits have no second derivative"):
        torch.autograd.grad(value, hidden, create_graph=True)


def test_at_most_a_chunk_of_logits_is_computed_at_once(monkeypatch):
    rows, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(loss.F, "linear", lambda x, w: rows.append(len(x)) or linear(x, w))
    hidden, weight = torch.randn(300, 4), torch.randn(1000, 4)
    targets = torch.randint(1000, (300,))
    head_cross_entropy(hidden, weight, targets)
    monkeypatch.setattr(loss, "CHUNK", 4 * 1000 * 128)
    head_cross_entropy(hidden, weight, targets)
    assert rows == [300, 128, 128, 44]


@pytest.mark.usefixtures("chunked")
def test_mismatched_shapes_are_rejected_in_chunks_too():
    with pytest.raises(ValueError, match="must agree in all but the vocabulary"):
        head_cross_entropy(torch.zeros(9, 5), torch.zeros(11, 5), torch.zeros(3, 3, dtype=torch.int64))
