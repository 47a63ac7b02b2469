"""Which tokens an evaluation of the whole text scores."""

import re

import numpy as np
import pytest
import torch

from lm import data, evaluate


@pytest.mark.parametrize("context", [1, 7, 8, 16, 33])
@pytest.mark.parametrize("extra", [0, 1, 5, 29, 30, 100])
def test_coverage_counts_the_targets_that_the_loss_is_the_mean_of(
    tiny, make_model, monkeypatch, context, extra
):
    model = make_model(tiny().model, torch.float32)
    windows = data.Windows(np.arange(context + 1 + extra, dtype=np.int64) % 256, context)
    scored, mean = [], evaluate.loss.head_cross_entropy

    def counted(hidden, weight, targets, mask):
        scored.extend(targets.flatten().tolist())
        return mean(hidden, weight, targets, mask)

    monkeypatch.setattr(evaluate.loss, "head_cross_entropy", counted)
    evaluate.evaluate(model, windows, None, torch.float32, 4)
    total, last = len(windows.tokens), scored[-1] + 1
    line = evaluate.coverage(windows)
    tail = f" and the last {total - last}" if last < total else ""
    said = f"{len(scored)} of {total} tokens are scored; the first {scored[0]}{tail} are left out"
    assert line == said
    assert scored == list(range(scored[0], last))
    numbers = [int(number) for number in re.findall("[0-9]+", line)]
    assert numbers[0] + sum(numbers[2:]) == numbers[1]
