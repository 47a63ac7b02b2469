"""The mixture of three texts, the experts' shares of them, and routing with the best experts disabled."""

import pytest
import torch

from lm import data
from lm.model import Transformer
from moe import GShardRouter, SigmoidRouter


def test_the_mixture_has_a_third_of_each_domain_and_no_held_out_text(experiment, tmp_path):
    paths = experiment.texts(tmp_path, 100_000)
    mixed = paths["mixed"].read_bytes()
    block = experiment.BLOCK
    assert len(mixed) == 3 * (90_000 // block) * block
    assert mixed[: 2 * block].startswith(data.CORPUS.joinpath("train.txt").read_bytes()[:block])
    sums = mixed[2 * block : 3 * block].splitlines()
    for line in sums[:-1]:
        left, right = line.split(b"=")
        assert sum(map(int, left.split(b"+"))) == int(right)
    for name in experiment.DOMAINS:
        held_out = paths[name].read_bytes()
        assert len(held_out) == 10_000
        assert held_out[2000:2200] not in mixed
    assert experiment.texts(tmp_path, 100_000) == paths
    assert experiment.texts(tmp_path, 90_000)["mixed"] != paths["mixed"]


@pytest.mark.parametrize("kind", [SigmoidRouter, GShardRouter])
@torch.no_grad()
def test_with_its_best_experts_disabled_a_token_gets_the_next_ones(experiment, kind):
    router = kind(8, 16, 2).eval()
    if kind is SigmoidRouter:
        router.bias.copy_(torch.randn(16) / 4)
        router.routed_scaling_factor = 1.7
    x = torch.randn(3, 5, 8)
    whole, same = router(x), experiment.Without(router, 0)(x)
    torch.testing.assert_close(same.experts.sort(-1).values, whole.experts.sort(-1).values)
    torch.testing.assert_close(same.weights.sort(-1).values, whole.weights.sort(-1).values)
    found = experiment.Without(router, 3 / 16)(x)
    choice = whole.scores + (router.bias if kind is SigmoidRouter else 0)
    for at in torch.cartesian_prod(torch.arange(3), torch.arange(5)).tolist():
        order = choice[tuple(at)].argsort(descending=True)
        assert found.experts[tuple(at)].tolist() == order[3:5].tolist()
        scores = whole.scores[tuple(at)][order[3:5]]
        scale = 1.7 if kind is SigmoidRouter else 1
        torch.testing.assert_close(found.weights[tuple(at)], scale * scores / scores.sum())


@torch.no_grad()
def test_use_is_the_share_of_each_domains_tokens(experiment, experiments, mini, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "TOKENS", 512)
    paths = experiment.texts(tmp_path, 60_000)
    model = Transformer(mini.model)
    model.initialize(torch.Generator().manual_seed(0))
    routers = [block.mlp.router for block in model.blocks]
    found = experiment.look(model, mini, paths)
    use = torch.tensor(found["use"])
    assert use.shape == (3, 2, 63)
    torch.testing.assert_close(use.sum(-1), torch.full((3, 2), 3.0), atol=5e-3, rtol=0)
    mean = use.mean(0)
    assert found["specialisation"] == pytest.approx(float(use.amax(0).sum() / mean.sum()), abs=5e-3)
    assert 1 < found["specialisation"] < 3
    losses = {found[experiment.disabled(share)] for share in experiment.SHARES}
    assert len(losses | {found[experiment.disabled(1 / 32, True)]}) == len(experiment.SHARES) + 1
    assert found["loss, 0.0000 disabled"] == pytest.approx(sum(found["losses"].values()) / 3)
    assert [block.mlp.router for block in model.blocks] == routers
