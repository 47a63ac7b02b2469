"""Tests of cosine."""

import torch

from exercises.projects.checks import check_router
from exercises.projects.cosine import CosineRouter


def test_it_is_a_router():
    check_router(CosineRouter(dim=12, num_experts=10, top_k=3), dim=12, num_experts=10, top_k=3)


def test_scores_are_the_softmax_of_cosine_over_temperature():
    router = CosineRouter(dim=12, num_experts=10, top_k=3)
    router.log_temperature.data.fill_(-1.2)
    x = torch.randn(12)
    logits = []
    for row in router.weight:
        cosine = sum(a * b for a, b in zip(x, row)) / (sum(a * a for a in x) * sum(b * b for b in row)) ** 0.5
        logits.append(float((cosine / torch.tensor(-1.2).exp()).detach()))
    expected = torch.tensor(logits).softmax(-1)
    routing = router(x)
    torch.testing.assert_close(routing.scores, expected)
    best = sorted(expected.tolist())[-3:]
    torch.testing.assert_close(sorted(routing.weights.tolist()), [value / sum(best) for value in best])


def test_lengths_do_not_matter():
    router, x = CosineRouter(dim=12, num_experts=10, top_k=3), torch.randn(4, 5, 12)
    scores = router(x).scores
    torch.testing.assert_close(router(7 * x).scores, scores)
    router.weight.data[2] *= 7
    torch.testing.assert_close(router(x).scores, scores)
