"""Tests of sliding_window."""

import pytest
import torch

from exercises.projects.checks import check_attention, in_pieces
from exercises.projects.sliding_window import SlidingWindowMLA
from mla import MultiheadLatentAttention

SIZES = {"kv_lora_rank": 7, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 6}


def test_it_is_an_attention():
    check_attention(SlidingWindowMLA(20, 3, **SIZES, window=6), dim=20)


@pytest.mark.parametrize("window", [1, 2, 6, 23])
def test_it_equals_latent_attention_over_the_last_tokens(window):
    attention = SlidingWindowMLA(20, 3, **SIZES, window=window).double()
    whole = MultiheadLatentAttention(20, 3, **SIZES).double()
    whole.load_state_dict(attention.state_dict())
    x = torch.randn(2, 23, 20, dtype=torch.float64)
    y = attention(x)
    for place in range(23):
        first = max(0, place - window + 1)
        seen, positions = x[:, first : place + 1], torch.arange(first, place + 1)
        torch.testing.assert_close(y[:, place], whole(seen, positions=positions)[:, -1])


def test_each_row_of_a_batch_has_its_own_window():
    attention = SlidingWindowMLA(20, 3, **SIZES, window=4).eval()
    x = torch.randn(2, 11, 20)
    cache = attention.new_cache(2, 20)
    with torch.no_grad():
        attention(x[:, :8], cache)
        cache.truncate([8, 5])
        y = attention(x[:, 8:], cache)
        own = torch.cat([x[1:, :5], x[1:, 8:]], dim=1)
        torch.testing.assert_close(y[1:], in_pieces(attention, own, (5, 3))[:, 5:])
        torch.testing.assert_close(y[:1], attention(x[:1])[:, 8:])


def test_a_mask_is_applied_on_top_of_the_window():
    attention, x = SlidingWindowMLA(20, 3, **SIZES, window=4), torch.randn(2, 9, 20)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6] = False
    changed = x.clone()
    changed[1, 6] += 1
    y, other = attention(x, mask=mask), attention(changed, mask=mask)
    torch.testing.assert_close(y[1, 7:], other[1, 7:])
    torch.testing.assert_close(attention(x, mask=mask.unsqueeze(1).expand(2, 9, 9)), y)
    assert not torch.allclose(y[1, 7:], attention(x)[1, 7:])
