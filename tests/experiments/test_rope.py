"""Attentions that rotate all dims, or none, against loops from the equations."""

import copy

import pytest
import torch

from mla import MultiheadLatentAttention, RotaryEmbedding

SIZES = (12, 3, 5, 4, 6, 7)  # dim, heads, latent, nope, rope, value


@torch.no_grad()
def test_all_turns_is_attention_over_fully_rotated_keys(experiment):
    attention = experiment.AllTurns(*SIZES).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q = attention.q(x).unflatten(-1, (3, 10))
    latent, k_rope = attention.kv_a(x).split([5, 6], dim=-1)
    k, v = attention.kv_b(attention.kv_norm(latent)).unflatten(-1, (3, 11)).split([4, 7], dim=-1)
    y = torch.zeros(2, 9, 3, 7, dtype=torch.float64)
    turns = RotaryEmbedding(4), RotaryEmbedding(6)

    def turned(vector, position):
        at = torch.tensor([position])
        first, second = vector.split([4, 6])
        parts = [turn(part.view(1, 1, 1, -1), at).flatten() for turn, part in zip(turns, (first, second))]
        return torch.cat(parts)

    for b, head, t in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(9)).tolist():
        query = turned(q[b, t, head], t)
        keys = torch.stack([turned(torch.cat((k[b, s, head], k_rope[b, s])), s) for s in range(t + 1)])
        y[b, t, head] = (keys @ query * 10**-0.5).softmax(0) @ v[b, : t + 1, head]
    torch.testing.assert_close(attention(x), attention.out(y.flatten(2)))


@torch.no_grad()
def test_without_rotation_the_order_of_the_past_does_not_matter(experiment):
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    shuffled = torch.cat((x[:, torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])], x[:, 8:]), dim=1)
    for kind, same in ((experiment.NothingTurns, True), (MultiheadLatentAttention, False)):
        attention = kind(*SIZES).double()
        off = (attention(x)[:, -1] - attention(shuffled)[:, -1]).abs().max()
        assert (off < 1e-12) == same


@pytest.mark.parametrize(
    "kind, absorbs", [("16 of 48 dims turned", True), ("none turned", True), ("all turned", False)]
)
def test_absorption_fails_if_expanded_keys_are_rotated(experiment, experiments, mini, kind, absorbs):
    from lm.model import Transformer

    config = experiments("common").changed(mini, attention={"kind": experiment.KINDS[kind]})
    model = Transformer(config.model)
    model.initialize(torch.Generator().manual_seed(0))
    off = experiment.absorbed_is_off(copy.deepcopy(model), config)["absorbed_is_off"]
    assert off < 1e-5 if absorbs else off > 0.01


def test_the_cache_of_fully_rotated_keys_holds_every_head(experiment, mini):
    a = mini.model.attention
    kept = experiment.numbers_kept(mini)
    assert kept["16 of 48 dims turned"] == kept["none turned"] == a.kv_lora_rank + a.qk_rope_head_dim
    assert kept["all turned"] == a.num_heads * (a.qk_nope_head_dim + a.v_head_dim) + a.qk_rope_head_dim
