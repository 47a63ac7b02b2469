"""Grouped-query attention against a plain loop, and MHA, GQA and MQA against each other."""

import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mla import GroupedQueryAttention, Linear, Llama3, RotaryEmbedding, YaRN

BATCH, TIME, DIM, HEADS, HEAD_DIM = 3, 5, 11, 6, 4
KV_HEADS = pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])  # MHA, GQA twice, MQA


def make(kv_heads, dim=DIM, **options):
    """An attention in float64 with non-default biases and norms."""
    layer = GroupedQueryAttention(dim, HEADS, kv_heads, HEAD_DIM, **options).double()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
        elif "norm" in name:
            parameter.data.uniform_(0.5, 2)
    return layer


def some_x(time=TIME):
    return torch.randn(BATCH, time, DIM, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def by_hand(layer, sequence, positions, eps=None):
    """softmax(q k^T / sqrt(head_dim)) v for one sequence, token by token; eps: of q and k norm."""

    def part(linear, h, i):
        rows = linear.weight @ h if linear.bias is None else linear.weight @ h + linear.bias
        return rows[i * HEAD_DIM : (i + 1) * HEAD_DIM]

    def rotated(vector, p, norm):
        if eps is not None:
            vector = vector / (vector @ vector / HEAD_DIM + eps).sqrt() * norm.weight
        return layer.rope(vector.view(1, 1, -1), torch.tensor([p])).flatten()

    keys, values, outputs = [], [], []
    for h, p in zip(sequence, positions):
        keys.append([rotated(part(layer.k, h, i), p, layer.k_norm) for i in range(layer.num_kv_heads)])
        values.append([part(layer.v, h, i) for i in range(layer.num_kv_heads)])
        heads = []
        for i in range(HEADS):
            shared = i // (HEADS // layer.num_kv_heads)
            query = rotated(part(layer.q, h, i), p, layer.q_norm)
            weights = [(query @ key[shared] / math.sqrt(HEAD_DIM)).exp() for key in keys]
            heads.append(sum(w * v[shared] for w, v in zip(weights, values)) / sum(weights))
        y = layer.out.weight @ torch.cat(heads)
        outputs.append(y if layer.out.bias is None else y + layer.out.bias)
    return torch.stack(outputs)


@KV_HEADS
def test_output_equals_a_plain_loop(kv_heads):
    layer, x = make(kv_heads), some_x()
    want = torch.stack([by_hand(layer, sequence, range(3, 3 + TIME)) for sequence in x])
    close(layer(x, positions=torch.arange(3, 3 + TIME)), want)


YARN = RotaryEmbedding(HEAD_DIM, scaling=YaRN(32.0, 4096, mscale=1.0, mscale_all_dim=1.0))
OPTIONS = {
    "qkv_bias": ({"qkv_bias": True}, {"q.bias", "k.bias", "v.bias"}),
    "out_bias": ({"out_bias": True}, {"out.bias"}),
    "qk_norm": ({"qk_norm_eps": 0.1}, {"q_norm.weight", "k_norm.weight"}),
    "yarn, whose softmax factor only MLA uses": ({"rope": YARN}, set()),
    "all": (
        {"rope": YARN, "qkv_bias": True, "out_bias": True, "qk_norm_eps": 0.1},
        {"q.bias", "k.bias", "v.bias", "out.bias", "q_norm.weight", "k_norm.weight"},
    ),
}


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("options, names", OPTIONS.values(), ids=OPTIONS)
def test_biases_and_norms_are_as_in_a_plain_loop_also_through_a_cache(options, names, kv_heads):
    layer, x = make(kv_heads, **options), some_x()
    assert layer.state_dict().keys() == {"q.weight", "k.weight", "v.weight", "out.weight"} | names
    eps = options.get("qk_norm_eps")
    want = torch.stack([by_hand(layer, sequence, range(TIME), eps) for sequence in x])
    close(layer(x), want)
    cache = layer.new_cache(BATCH, TIME)
    close(torch.cat([layer(chunk, cache) for chunk in x.split([3, 1, 1], dim=1)], dim=1), want)


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
def test_left_padded_sequences_give_what_each_gives_alone(kv_heads):
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


LLAMA3, YARNS = Llama3(8.0, 64, 1.0, 4.0), {"rope_type": "yarn", "factor": 32.0}
PEERS = {  # transformers' model and options, our options, our scaling and transformers' parameters for it
    "Llama": ("Llama", {}, {}, None, {"rope_type": "default"}),
    "Llama with biases": (
        "Llama", {"attention_bias": True}, {"qkv_bias": True, "out_bias": True}, None,
        {"rope_type": "default"},
    ),
    "Llama 3.1": (
        "Llama", {}, {}, LLAMA3,
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "Llama, linear": ("Llama", {}, {}, Linear(3.0), {"rope_type": "linear", "factor": 3.0}),
    "Llama, YaRN with DeepSeek's mscale": (
        "Llama", {}, {}, YaRN(32.0, 64, mscale=1.0, mscale_all_dim=0.7),
        {**YARNS, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    "Qwen2": ("Qwen2", {}, {"qkv_bias": True}, YaRN(32.0, 64), YARNS),
    "Qwen2-MoE": ("Qwen2Moe", {"qkv_bias": True}, {"qkv_bias": True}, None, {"rope_type": "default"}),
    "Qwen3": ("Qwen3", {"rms_norm_eps": 0.1}, {"qk_norm_eps": 0.1}, YaRN(32.0, 64), YARNS),
    "Qwen3-MoE": (
        "Qwen3Moe", {"rms_norm_eps": 0.1, "attention_bias": True},
        {"qk_norm_eps": 0.1, "qkv_bias": True, "out_bias": True}, None, {"rope_type": "default"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("peer, numbers, options, scaling, theirs_of_it", PEERS.values(), ids=PEERS)
def test_output_equals_transformers(peer, numbers, options, scaling, theirs_of_it):
    transformers = pytest.importorskip("transformers")
    folder = {"Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe"}.get(peer, peer.lower())
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    if scaling is not None and not isinstance(scaling, Linear):
        theirs_of_it = {**theirs_of_it, "original_max_position_embeddings": 64}
    config = getattr(transformers, f"{peer}Config")(
        hidden_size=24, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=HEAD_DIM,
        rope_parameters={"rope_theta": 500.0, **theirs_of_it}, attn_implementation="sdpa",
        max_position_embeddings=2048, **numbers,
    )  # fmt: skip
    theirs = getattr(module, f"{peer}Attention")(config, layer_idx=0).double()
    rope = RotaryEmbedding(HEAD_DIM, theta=500.0, interleaved=False, scaling=scaling)
    ours = make(2, dim=24, rope=rope, **options)
    given = {}
    for name, tensor in ours.state_dict().items():
        part, kind = name.split(".")
        given[f"{part if 'norm' in part else part.replace('out', 'o') + '_proj'}.{kind}"] = tensor
    theirs.load_state_dict(given)
    for name in ("q_norm", "k_norm"):  # transformers rounds to fp32 inside
        if (norm := getattr(theirs, name, None)) is not None:
            wide = torch.nn.RMSNorm(HEAD_DIM, eps=norm.variance_epsilon, dtype=torch.float64)
            wide.weight.data.copy_(norm.weight)
            setattr(theirs, name, wide)
    x, positions = torch.randn(BATCH, TIME, 24, dtype=torch.float64), torch.tensor([0, 1, 3, 100, 2000])
    angles = getattr(module, f"{peer}RotaryEmbedding")(config)(x, positions.unsqueeze(0))
    hidden = torch.full((TIME, TIME), -math.inf, dtype=torch.float64).triu(1).expand(BATCH, 1, -1, -1)
    close(ours(x, positions=positions), theirs(x, position_embeddings=angles, attention_mask=hidden)[0])
