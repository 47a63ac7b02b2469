"""Tests of annealed."""

import torch

from exercises.projects.annealed import AnnealedRouter
from exercises.projects.checks import check_router
from moe import SoftmaxRouter


def test_it_is_a_router():
    check_router(AnnealedRouter(dim=12, num_experts=10, top_k=3), dim=12, num_experts=10, top_k=3)


def test_the_first_choices_are_samples_without_replacement():
    torch.manual_seed(0)
    router = AnnealedRouter(dim=12, num_experts=5, top_k=2)
    x, draws = torch.randn(12), 50_000
    likely = router.eval()(x).scores.detach()
    pairs = router.train()(x.expand(draws, 12)).experts
    for first in range(5):
        for second in range(first + 1, 5):
            a, b = likely[first], likely[second]
            expected = float(a * b / (1 - a) + b * a / (1 - b))  # first a then b, or first b then a
            found = ((pairs == first).any(1) & (pairs == second).any(1)).double().mean().item()
            assert abs(found - expected) < 5 * (expected * (1 - expected) / draws) ** 0.5


def test_weights_are_the_normalized_scores_without_noise():
    router, x = AnnealedRouter(dim=12, num_experts=10, top_k=3), torch.randn(40, 12)
    routing = router(x)
    chosen = routing.scores.gather(-1, routing.experts)
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.scores, routing.logits.softmax(-1))


def test_only_training_passes_lower_the_temperature_and_a_checkpoint_keeps_it():
    plain = SoftmaxRouter(dim=12, num_experts=10, top_k=3, normalize=True)
    router = AnnealedRouter(dim=12, num_experts=10, top_k=3, passes=4)
    router.weight = plain.weight
    x = torch.randn(500, 12)

    def differ():
        return (router(x).experts.sort().values != plain(x).experts.sort().values).double().mean().item()

    assert router.eval() and differ() == 0
    router.train()
    shares = [differ() for _ in range(4)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 2 * shares[3] > 0
    copy = AnnealedRouter(dim=12, num_experts=10, top_k=3, passes=4)
    copy.load_state_dict(router.state_dict())
    assert copy.passed == router.passed == 4
    assert differ() == 0
