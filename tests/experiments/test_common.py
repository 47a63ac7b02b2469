"""The analysis of experiments, on curves and samples whose answers are known."""

import math

import pytest


def test_a_level_is_reached_where_the_curve_crosses_it(experiment):
    reach = experiment.reach
    xs = [10, 20, 80, 160]
    losses = [4 - math.log2(x) / 2 for x in xs]  # straight over log x
    for x in (10, 15, 33, 80, 150, 160):
        assert reach(xs, losses, 4 - math.log2(x) / 2) == pytest.approx(x)
    assert reach(xs, losses, losses[0] + 0.1) is None  # it starts below
    assert reach(xs, losses, losses[-1] - 0.1) is None
    assert reach(xs, [3, 2, 2.5, 1], 2.2) == pytest.approx(10 * 2**0.8)  # the first time


def test_the_interval_is_students(experiment):
    mean, error = experiment.mean_and_error([1.0, 2.0, 6.0])
    assert (mean, error) == pytest.approx((3, math.sqrt(7 / 3)))
    assert experiment.interval([1.0, 2.0, 6.0]) == pytest.approx((3 - 4.303 * error, 3 + 4.303 * error))
    low, high = experiment.interval([1.0, 3.0])
    assert (low, high) == pytest.approx((2 - 12.706, 2 + 12.706))
