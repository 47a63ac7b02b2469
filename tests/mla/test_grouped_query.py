"""Grouped-query attention against a plain loop, and MHA, GQA and MQA against each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mla import GroupedQueryAttention, RotaryEmbedding

BATCH, TIME, DIM, HEADS, HEAD_DIM = 3, 5, 11, 6, 4
KV_HEADS = pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])  # MHA, GQA twice, MQA


def make(kv_heads, rope=None):
    return GroupedQueryAttention(DIM, HEADS, kv_heads, HEAD_DIM, rope).double()


def some_x(time=TIME):
    return torch.randn(BATCH, time, DIM, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def by_hand(layer, text, positions):
    """softmax(q k^T / sqrt(head_dim)) v for one text, token by token, head by head."""
    turned = lambda vector, p: layer.rope(vector.view(1, 1, -1), torch.tensor([p])).flatten()  # noqa: E731
    part = lambda rows, i: rows[i * HEAD_DIM : (i + 1) * HEAD_DIM]  # noqa: E731
    keys, values, outputs = [], [], []
    for h, p in zip(text, positions):
        keys.append([turned(part(layer.k.weight @ h, i), p) for i in range(layer.num_kv_heads)])
        values.append([part(layer.v.weight @ h, i) for i in range(layer.num_kv_heads)])
        heads = []
        for i in range(HEADS):
            shared = i // (HEADS // layer.num_kv_heads)
            query = turned(part(layer.q.weight @ h, i), p)
            weights = [(query @ key[shared] / math.sqrt(HEAD_DIM)).exp() for key in keys]
            heads.append(sum(w * v[shared] for w, v in zip(weights, values)) / sum(weights))
        outputs.append(layer.out.weight @ torch.cat(heads))
    return torch.stack(outputs)


@KV_HEADS
def test_output_equals_a_plain_loop(kv_heads):
    layer, x = make(kv_heads), some_x()
    want = torch.stack([by_hand(layer, text, range(3, 3 + TIME)) for text in x])
    close(layer(x, positions=torch.arange(3, 3 + TIME)), want)


@KV_HEADS
def test_sharing_keys_is_mha_with_the_same_keys_in_every_head_of_a_group(kv_heads):
    layer, mha, x = make(kv_heads), make(HEADS), some_x()
    weights = layer.state_dict()
    for name in ("k.weight", "v.weight"):
        by_head = weights[name].view(kv_heads, HEAD_DIM, DIM)
        weights[name] = by_head.repeat_interleave(HEADS // kv_heads, dim=0).view(-1, DIM)
    mha.load_state_dict(weights)
    close(layer(x), mha(x))
    cache, mha_cache = layer.new_cache(BATCH, 8), mha.new_cache(BATCH, 8)
    assert cache.nbytes * HEADS == mha_cache.nbytes * kv_heads


@KV_HEADS
def test_every_chunking_gives_what_one_call_gives_and_so_do_gradients(kv_heads):
    layer, x = make(kv_heads), some_x().requires_grad_()
    want, direction = layer(x), some_x()
    gradients = torch.autograd.grad((want * direction).sum(), [x, *layer.parameters()], retain_graph=True)
    for sizes in ([5], [1] * 5, [4, 1], [1, 4], [2, 1, 2]):
        cache = layer.new_cache(BATCH, TIME)
        y = torch.cat([layer(chunk, cache) for chunk in x.split(sizes, dim=1)], dim=1)
        close(y, want)
        found = torch.autograd.grad((y * direction).sum(), [x, *layer.parameters()])
        for mine, theirs in zip(found, gradients):
            close(mine, theirs)


@KV_HEADS
def test_rows_of_a_batch_may_stand_at_different_lengths(kv_heads):
    layer, x, new = make(kv_heads), some_x(), some_x(3)
    cache = layer.new_cache(BATCH, 8)
    layer(x, cache)
    cache.truncate([1, 5, 3])
    y = torch.cat([layer(chunk, cache) for chunk in new.split([2, 1], dim=1)], dim=1)
    for row, length in enumerate([1, 5, 3]):
        close(y[row], layer(torch.cat((x[row, :length], new[row])).unsqueeze(0))[0, length:])


@KV_HEADS
def test_left_padded_texts_get_what_each_gets_alone(kv_heads):
    layer, x, lengths = make(kv_heads), some_x(), torch.tensor([5, 1, 3])
    mask = torch.arange(TIME) >= (TIME - lengths).unsqueeze(1)
    y = layer(x, positions=(mask.cumsum(1) - 1).clamp(min=0), mask=mask)
    for row, length in enumerate(lengths.tolist()):
        close(y[row, TIME - length :], layer(x[row : row + 1, TIME - length :])[0])


def test_no_token_sees_a_later_one():
    layer, x = make(2), some_x()
    other = torch.cat((x[:, :3], some_x(2)), dim=1)
    close(layer(other)[:, :3], layer(x)[:, :3])
    assert not torch.allclose(layer(other)[:, 3], layer(x)[:, 3])


def test_key_value_heads_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ValueError, match="num_kv_heads=4 does not divide num_heads=6"):
        make(4)


@given(*[st.integers(0, 4)] * 3, st.integers(0, 3))
def test_any_sizes_build_an_attention_that_works_or_a_value_error(dim, heads, kv_heads, half):
    try:
        layer = GroupedQueryAttention(dim, heads, kv_heads, 2 * half)
    except ValueError:
        assert min(dim, heads, kv_heads, half) < 1 or heads % kv_heads
        return
    assert layer(torch.randn(2, 3, dim)).isfinite().all()


def test_output_equals_transformers_llama():
    pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama as module
    from transformers.models.llama.configuration_llama import LlamaConfig

    config = LlamaConfig(
        hidden_size=24, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = module.LlamaAttention(config, layer_idx=0).double()
    rope = RotaryEmbedding(HEAD_DIM, theta=500.0, interleaved=False)
    ours = GroupedQueryAttention(24, HEADS, 2, HEAD_DIM, rope).double()
    for name, weight in ours.named_parameters():
        theirs.get_parameter(name.replace("out", "o").replace(".", "_proj.")).data.copy_(weight.data)
    x, positions = torch.randn(BATCH, TIME, 24, dtype=torch.float64), torch.arange(3, 3 + TIME)
    angles = module.LlamaRotaryEmbedding(config)(x, positions.unsqueeze(0))
    hidden = torch.full((TIME, TIME), -math.inf, dtype=torch.float64).triu(1).expand(BATCH, 1, -1, -1)
    close(ours(x, positions=positions), theirs(x, angles, hidden)[0])
