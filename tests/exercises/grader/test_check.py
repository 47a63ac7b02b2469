"""How a check describes wrong results."""

import math

import pytest
import torch

from exercises.grader.check import Results
from exercises.grader.compare import compare, difference, is_close, same

RIGHT = torch.arange(1.0, 31.0).reshape(2, 5, 3).sin()
SQUARE = torch.arange(1.0, 10.0).reshape(3, 3).cos()


@pytest.mark.parametrize(
    "found, right, said",
    [
        (RIGHT, RIGHT, ""),
        (RIGHT * (1 + 1e-6), RIGHT, ""),
        (RIGHT.double() * (1 + 1e-6), RIGHT.double(), "differs in "),
        (RIGHT[:, :4], RIGHT, "its shape is (2, 4, 3), expected (2, 5, 3)"),
        (RIGHT.double(), RIGHT, "its dtype is float64, expected float32"),
        (None, RIGHT, "no gradient reaches it"),
        (RIGHT, None, "should have no gradient"),
        (None, None, ""),
        (-RIGHT, RIGHT, "has the wrong sign"),
        (2.5 * RIGHT, RIGHT, "is 2.5 times what it should be"),
        (0 * RIGHT, RIGHT, "is zero everywhere"),
        (RIGHT.log(), RIGHT, "is infinite or NaN in 15 of 30 elements"),
        (SQUARE.T, SQUARE, "is transposed: its last two axes are swapped"),
        (RIGHT.flip(-1), RIGHT, "has the right values in a different order along its last axis"),
        (RIGHT.roll(1, 1), RIGHT, "is shifted by one along its second axis"),
        (RIGHT.roll(-1, 1), RIGHT, "is shifted by one along its second axis"),
        (torch.cat((RIGHT[:1], RIGHT[1:] + 1)), RIGHT, "is correct only at index 0 of its first axis"),
        (torch.cat((RIGHT[:, :1], RIGHT[:, 1:] + 1), 1), RIGHT, "is correct only at index 0 of its second"),
        (RIGHT + 1e-3 * RIGHT.square(), RIGHT, "differs in "),
        (torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3]), "differs in 1 of 3 elements"),
        (torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 1.0]), ""),
        (torch.tensor([math.inf, 1.0]), torch.tensor([-math.inf, 1.0]), "differs in 1 of 2 elements"),
        (torch.zeros(3), torch.zeros(3), ""),
        (torch.ones(3), torch.zeros(3), "differs in 3 of 3 elements"),
    ],
)
def test_a_difference_is_described_in_words(found, right, said):
    assert difference(found, right).startswith(said) and bool(difference(found, right)) == bool(said)


def test_values_that_are_nearly_right_are_said_to_be_so():
    """Also where the wrong ones happen to lie outside the first row; never if one side is infinite."""
    near = RIGHT.clone()
    near[1] += 2e-3
    assert "nearly right, as if a step ran in float16 or bfloat16" in difference(near, RIGHT)
    closed = RIGHT.where(RIGHT > 0, -math.inf)
    assert difference(closed.clamp(min=torch.finfo().min), closed).endswith("expected -inf")


@pytest.mark.parametrize(
    "dtype, close", [(torch.float32, 1e-4), (torch.float64, 1e-9), (torch.bfloat16, 4e-3)]
)
def test_the_tolerance_of_each_dtype(dtype, close):
    right = RIGHT.to(dtype)
    size = float(right.abs().max())
    off = torch.zeros_like(right, dtype=torch.float64)
    off[1, 2, 0] = close * size
    assert is_close(right.double() + 0.5 * off, right) and not is_close(right.double() + 2 * off, right)


def test_each_tensor_has_a_stage_and_none_passes_after_an_error():
    right = {"a": RIGHT, "gradient of a": RIGHT}
    rows = compare({"a": RIGHT[0], "gradient of a": -RIGHT}, right)
    assert [(row["stage"], row["passed"]) for row in rows] == [("shapes, types", False), ("gradients", False)]
    rows = compare({"raised": {"type": "E", "says": "x"}}, right)
    assert [row["says"] for row in rows] == ["not reached"] * 2 and not any(row["passed"] for row in rows)


def test_outcomes_are_compared_by_their_values_or_their_errors():
    raised = {"raised": {"type": "IndexError", "says": "out", "line": 3}}
    assert same(raised, {"raised": {"type": "IndexError", "says": "out", "line": 9}})
    assert not same(raised, {"raised": {"type": "IndexError", "says": "other", "line": 3}})
    assert not same(raised, {"a": RIGHT}) and not same({"a": RIGHT}, raised)
    assert same({"a": RIGHT}, {"a": RIGHT.clone()}) and not same({"a": RIGHT}, {"a": RIGHT + 1})


def test_an_error_in_a_fixture_counts_as_a_failure():
    results = Results()

    class Report:
        nodeid, when, failed, passed, skipped, longrepr = "a::b", "setup", True, False, False, "broken\nmore"

    results.pytest_runtest_logreport(Report)
    assert results.failed == [{"test": "a::b", "says": "broken"}] and results.passed == 0
