"""The report's figures: every point is visible and every number can be read."""

import matplotlib.pyplot as plt
import pytest
import torch

from lm.report import figures
from tests.lm.report.colours import contrast

BASELINE = {"best": 1.383, "best_order": 5}  # nats per byte, far below a short run's losses
SHORT = [(5.180, None), (4.379, None), (3.867, 3.759), (3.552, None), (3.382, None), (3.301, 3.297)]


def rows_of(losses):
    """Pairs (loss, val_loss) -> rows of metrics.jsonl"""
    rows = [{"tokens": 512 * i, "seconds": 2.5 * i, "loss": loss} for i, (loss, _) in enumerate(losses, 1)]
    for row, (_, held_out) in zip(rows, losses):
        if held_out is not None:
            row["val_loss"] = held_out
    return rows


def drawn(losses, baseline=BASELINE):
    """Each axis' visible curves {label: losses}, and the losses that lie outside its limits."""
    figure = figures.draw_loss(rows_of(losses), baseline)
    try:
        figure.canvas.draw()
        for axis in figure.axes:
            (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
            assert left < right and low < high
            assert axis.get_legend() is None  # it would hide points
            curves, outside = {}, []
            for line in axis.lines:
                points = list(zip(*line.get_data()))
                # one point without a marker shows nothing
                assert len(points) > 1 or line.get_marker() not in (None, "None", "", " "), line.get_label()
                curves[line.get_label().partition(" (")[0]] = [y for _, y in points]
                if line.get_label().startswith("best"):
                    assert low < points[0][1] < high
                    continue
                outside += [y for x, y in points if not (left <= x <= right and low < y < high)]
            yield curves, outside, high - low
    finally:
        plt.close(figure)


@pytest.mark.filterwarnings("error")  # matplotlib widens empty limits with a warning
@pytest.mark.parametrize("baseline", [BASELINE, None], ids=["n-gram", "own text"])
@pytest.mark.parametrize(
    "losses",
    [
        SHORT,
        [(5.180, 5.169)],
        [(5.180, None)],
        [(3.25, 3.25)] * 4,
        [(0.0, None)] * 2,
        [(loss, None) for loss, _ in SHORT],
    ],
    ids=["short", "one row", "one row, no evaluation", "constant", "zero", "no evaluation"],
)
def test_every_point_of_a_short_run_is_in_sight(losses, baseline):
    for curves, outside, _ in drawn(losses, baseline):
        assert outside == []
        assert curves["training batch"] == [loss for loss, _ in losses]
        assert curves.get("held-out text", []) == [loss for _, loss in losses if loss is not None]
        assert ("best n-gram" in curves) == (baseline is not None)


@pytest.mark.parametrize("first", [5.5, 1e6])
def test_high_first_losses_do_not_flatten_the_rest(first):
    losses = [(first, None), (3.5, None), (2.4, 2.3), (1.9, 1.8), (1.7, 1.65), (1.6, 1.55), (1.5, 1.5)]
    for _, outside, height in drawn(losses):
        assert outside == [first, 3.5] and height < 2
    for _, outside, _ in drawn(losses[::-1]):  # a run that diverges
        assert outside == []


@pytest.mark.parametrize(
    "loads", [[1.0] * 8, [8.0] + [0.0] * 7, [6.4, 1.6] + [0.0] * 6, [0.2, 0.6, 1.2, 2.0]]
)
def test_loads_can_be_read_on_their_colours(loads):
    figure = figures.draw_load(torch.tensor([loads, loads[::-1]]) / len(loads))
    axis, [picture] = figure.axes[0], figure.axes[0].images
    assert len(axis.texts) == 2 * len(loads)
    for text in axis.texts:
        expert, layer = text.get_position()
        value = (loads if layer == 0 else loads[::-1])[expert]
        assert text.get_text() == f"{value:.1f}"
        assert contrast(text.get_color(), picture.cmap(picture.norm(value))) >= 3
    plt.close(figure)


def test_a_single_row_of_loads_shows_its_points():
    figure = figures.draw_balance([{"step": 5, "max_violations": [0.5, 1.5]}])
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[0.5], [1.5]]
    assert all(line.get_marker() == "o" for line in lines)
    plt.close(figure)
