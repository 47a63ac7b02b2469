"""What a check says of numbers that are wrong, and in which process it says it."""

import math

import pytest
import torch

from exercises.grader.check import Results, alike, compare, difference, same

RIGHT = torch.arange(1.0, 31.0).reshape(2, 5, 3).sin()
SQUARE = torch.arange(1.0, 10.0).reshape(3, 3).cos()


@pytest.mark.parametrize(
    "found, right, said",
    [
        (RIGHT, RIGHT, ""),
        (RIGHT * (1 + 1e-6), RIGHT, ""),
        (RIGHT.double() * (1 + 1e-6), RIGHT.double(), "differs in "),
        (RIGHT[:, :4], RIGHT, "its shape is (2, 4, 3), not (2, 5, 3)"),
        (RIGHT.double(), RIGHT, "its dtype is float64, not float32"),
        (None, RIGHT, "no gradient comes through"),
        (RIGHT, None, "has a gradient"),
        (None, None, ""),
        (-RIGHT, RIGHT, "has the wrong sign"),
        (2.5 * RIGHT, RIGHT, "is 2.5 times what it should be"),
        (0 * RIGHT, RIGHT, "is zero everywhere"),
        (RIGHT.log(), RIGHT, "is infinite or no number in 15 of 30 places"),
        (SQUARE.T, SQUARE, "is transposed: its last two axes are swapped"),
        (RIGHT.flip(-1), RIGHT, "has the right numbers in another order along its last axis"),
        (RIGHT.roll(1, 1), RIGHT, "is shifted by one along its second axis"),
        (RIGHT.roll(-1, 1), RIGHT, "is shifted by one along its second axis"),
        (torch.cat((RIGHT[:1], RIGHT[1:] + 1)), RIGHT, "is right at the first place of its first axis alone"),
        (torch.cat((RIGHT[:, :1], RIGHT[:, 1:] + 1), 1), RIGHT, "is right at the first place of its second"),
        (RIGHT + 1e-3 * RIGHT.square(), RIGHT, "differs in "),
        (torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3]), "differs in 1 of 3 places"),
        (torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 1.0]), ""),
        (torch.tensor([math.inf, 1.0]), torch.tensor([-math.inf, 1.0]), "differs in 1 of 2 numbers"),
        (torch.zeros(3), torch.zeros(3), ""),
        (torch.ones(3), torch.zeros(3), "differs in 3 of 3 numbers"),
    ],
)
def test_what_is_wrong_is_said_in_words(found, right, said):
    assert difference(found, right).startswith(said) and bool(difference(found, right)) == bool(said)


@pytest.mark.parametrize(
    "dtype, close", [(torch.float32, 1e-4), (torch.float64, 1e-9), (torch.bfloat16, 4e-3)]
)
def test_how_near_is_near_enough(dtype, close):
    right = RIGHT.to(dtype)
    size = float(right.abs().max())
    off = torch.zeros_like(right, dtype=torch.float64)
    off[1, 2, 0] = close * size
    assert alike((right.double() + 0.5 * off), right) and not alike((right.double() + 2 * off), right)


def test_rows_are_by_stage_and_nothing_is_right_where_something_was_raised():
    right = {"a": RIGHT, "gradient of a": RIGHT}
    rows = compare({"a": RIGHT[0], "gradient of a": -RIGHT}, right)
    assert [(row["stage"], row["passed"]) for row in rows] == [("shapes, types", False), ("gradients", False)]
    rows = compare({"raised": {"type": "E", "says": "x"}}, right)
    assert [row["says"] for row in rows] == ["not reached"] * 2 and not any(row["passed"] for row in rows)


def test_outcomes_agree_by_their_numbers_or_by_what_was_raised():
    raised = {"raised": {"type": "IndexError", "says": "out", "line": 3}}
    assert same(raised, {"raised": {"type": "IndexError", "says": "out", "line": 9}})
    assert not same(raised, {"raised": {"type": "IndexError", "says": "other", "line": 3}})
    assert not same(raised, {"a": RIGHT}) and not same({"a": RIGHT}, raised)
    assert same({"a": RIGHT}, {"a": RIGHT.clone()}) and not same({"a": RIGHT}, {"a": RIGHT + 1})


def test_a_test_that_breaks_in_its_fixture_is_not_passed():
    results = Results()

    class Report:
        nodeid, when, failed, passed, skipped, longrepr = "a::b", "setup", True, False, False, "broken\nmore"

    results.pytest_runtest_logreport(Report)
    assert results.failed == [{"test": "a::b", "says": "broken"}] and results.passed == 0
