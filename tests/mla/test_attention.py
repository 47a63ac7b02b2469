"""Multi-head latent attention against V3 eq. 1-11 in plain loops, in all its forms."""

import importlib
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mla import (
    GroupedQueryAttention,
    KVCache,
    LatentCache,
    MultiheadLatentAttention,
    RMSNorm,
    RotaryEmbedding,
    YaRN,
)

# All different, so that a transposed axis or a confused width cannot go unnoticed.
BATCH, TIME, DIM, HEADS, LATENT, NOPE, ROPE, VALUE, QUERY = 3, 6, 19, 5, 13, 7, 4, 3, 11
QUERIES = pytest.mark.parametrize("q_lora_rank", [None, QUERY])
FORMS = pytest.mark.parametrize("form", ["expanded", "absorbed", "cheaper"])
CHUNKINGS = [[6], [1] * 6, [5, 1], [1, 5], [2, 3, 1], [3, 3], [4, 1, 1], [1, 2, 2, 1]]


def make(q_lora_rank=None, form="cheaper", value=VALUE, dim=DIM, **options):
    """An attention in float64 with non-default weights, which uses the given form or the cheaper one."""
    layer = MultiheadLatentAttention(dim, HEADS, LATENT, NOPE, ROPE, value, q_lora_rank, **options).double()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    for norm in (layer.kv_norm, getattr(layer, "q_norm", None)):
        if norm is not None:
            norm.weight.data.uniform_(0.5, 2)
    layer.kv_a.weight.data.mul_(3)
    if form != "cheaper":
        layer.absorbed_is_cheaper = lambda time, total: form == "absorbed"
    return layer


def some_x(time=TIME):
    return torch.randn(BATCH, time, DIM, dtype=torch.float64)


def once(layer, x, form, **options):
    """One call for all of x; the absorbed form needs a cache."""
    return layer(x, None if form == "expanded" else layer.new_cache(len(x), x.shape[1]), **options)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def in_chunks(layer, x, sizes):
    cache = layer.new_cache(len(x), sum(sizes))
    return torch.cat([layer(chunk, cache) for chunk in x.split(sizes, dim=1)], dim=1)


def rotate(vector, position):
    """Pairs (2i, 2i+1) by position x 10000^(-2i/dim); angles in fp32, as in the checkpoints' training."""
    out = []
    for i in range(0, len(vector), 2):
        frequency = 1 / 10000 ** (torch.tensor(i, dtype=torch.float32) / len(vector))
        angle = torch.tensor(position, dtype=torch.float32) * frequency
        cos, sin = angle.cos().double(), angle.sin().double()
        out += [vector[i] * cos - vector[i + 1] * sin, vector[i] * sin + vector[i + 1] * cos]
    return torch.stack(out)


def rms_norm(vector, weight):
    return vector / (sum(v * v for v in vector) / len(vector) + 1e-6).sqrt() * weight


def affine(linear, vector):
    y = linear.weight @ vector
    return y if linear.bias is None else y + linear.bias


def by_hand(layer, sequence, positions, softmax_factor=1.0):
    """V3 eq. 1-11 for one sequence, token by token, head by head."""
    width = NOPE + layer.v_head_dim
    keys, values, outputs = [], [], []
    for h, position in zip(sequence, positions):
        row = affine(layer.kv_a, h)
        c_kv = rms_norm(row[:LATENT], layer.kv_norm.weight)  # eq. 1
        k_rope = rotate(row[LATENT:], position)  # eq. 3
        kv = layer.kv_b.weight @ c_kv
        head_rows = [kv[i * width : (i + 1) * width] for i in range(HEADS)]
        keys.append([torch.cat((rows[:NOPE], k_rope)) for rows in head_rows])  # eq. 2, 4
        values.append([rows[NOPE:] for rows in head_rows])  # eq. 5
        if layer.q_lora_rank is None:
            q = layer.q.weight @ h
        else:
            q = layer.q_b.weight @ rms_norm(affine(layer.q_a, h), layer.q_norm.weight)  # eq. 6, 7
        heads = []
        for i in range(HEADS):
            q_nope, q_rope = q[i * (NOPE + ROPE) : (i + 1) * (NOPE + ROPE)].split([NOPE, ROPE])
            query = torch.cat((q_nope, rotate(q_rope, position)))  # eq. 8, 9
            scale = softmax_factor / math.sqrt(NOPE + ROPE)
            weights = [(query @ key[i] * scale).exp() for key in keys]
            heads.append(sum(w * v[i] for w, v in zip(weights, values)) / sum(weights))  # eq. 10
        outputs.append(affine(layer.out, torch.cat(heads)))  # eq. 11
    return torch.stack(outputs)


@pytest.mark.parametrize("value", [VALUE, 17])  # narrower and wider than a key
@QUERIES
@FORMS
def test_output_equals_the_papers_equations(form, q_lora_rank, value):
    layer, x = make(q_lora_rank, form, value), some_x()
    start = 5
    want = torch.stack([by_hand(layer, sequence, range(start, start + TIME)) for sequence in x])
    close(once(layer, x, form, positions=torch.arange(start, start + TIME)), want)


@QUERIES
@FORMS
@pytest.mark.parametrize("qkv_bias, out_bias", [(True, True), (True, False), (False, True)])
def test_biases_are_in_compressions_and_output_only(qkv_bias, out_bias, form, q_lora_rank):
    layer, x = make(q_lora_rank, form, qkv_bias=qkv_bias, out_bias=out_bias), some_x()
    names = {"out.bias"} if out_bias else set()
    if qkv_bias:
        names |= {"kv_a.bias"} if q_lora_rank is None else {"kv_a.bias", "q_a.bias"}
    assert {name for name in layer.state_dict() if name.endswith("bias")} == names
    want = torch.stack([by_hand(layer, sequence, range(TIME)) for sequence in x])
    close(once(layer, x, form), want)
    close(in_chunks(layer, x, [2, 3, 1]), want)


@FORMS
@pytest.mark.parametrize("mscale, factor", [(1.0, 1.8739), (0.707, 1.5896)])
def test_yarn_sharpens_attention_also_where_rope_rotates_nothing(mscale, factor, form):
    scaling = YaRN(40.0, 4096, mscale=mscale, mscale_all_dim=mscale)
    layer, x = make(QUERY, form, rope=RotaryEmbedding(ROPE, scaling=scaling)), some_x()
    plain = make_like(layer, form)
    assert layer.scale / plain.scale == pytest.approx(factor, abs=5e-5)
    still = [0] * TIME
    exact = (0.1 * mscale * math.log(40) + 1) ** 2
    y = once(layer, x, form, positions=torch.tensor(still))
    close(y, torch.stack([by_hand(layer, sequence, still, exact) for sequence in x]))
    assert (y - once(plain, x, form, positions=torch.tensor(still))).abs().max() > 0.01


@QUERIES
@FORMS
def test_every_chunking_gives_what_one_call_gives(form, q_lora_rank):
    layer, x = make(q_lora_rank, form), some_x()
    want = make_like(layer, "expanded")(x)
    for sizes in CHUNKINGS:
        close(in_chunks(layer, x, sizes), want)


def make_like(layer, form):
    other = make(layer.q_lora_rank, form)
    other.load_state_dict(layer.state_dict())
    return other


@QUERIES
@FORMS
@pytest.mark.parametrize("sizes", [[6], [2, 3, 1], [1] * 6])
def test_gradients_are_the_same_in_every_form_and_through_the_cache(sizes, form, q_lora_rank):
    layer, x = make(q_lora_rank, form), some_x().requires_grad_()
    plain = make_like(layer, "expanded")
    direction = some_x()
    found = torch.autograd.grad((in_chunks(layer, x, sizes) * direction).sum(), [x, *layer.parameters()])
    want = torch.autograd.grad((plain(x) * direction).sum(), [x, *plain.parameters()])
    for mine, theirs in zip(found, want):
        close(mine, theirs)


def test_gradients_equal_finite_differences():
    layer = make(QUERY)
    x = torch.randn(1, 3, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: in_chunks(layer, x, [2, 1]), x)


@FORMS
def test_rows_of_a_batch_may_stand_at_different_lengths(form):
    layer, x, new = make(QUERY, form), some_x(), some_x(4)
    cache = layer.new_cache(BATCH, 12)
    layer(x, cache)
    kept = [2, 6, 4]
    cache.truncate(kept)
    y = torch.cat([layer(chunk, cache) for chunk in new.split([3, 1], dim=1)], dim=1)
    for row, length in enumerate(kept):
        sequence = torch.cat((x[row, :length], new[row])).unsqueeze(0)
        close(y[row], layer(sequence)[0, length:])
    assert cache.length.tolist() == [6, 10, 8]


@FORMS
def test_left_padded_sequences_give_what_each_gives_alone(form):
    layer, x = make(QUERY, form), some_x()
    lengths = torch.tensor([6, 2, 4])
    mask = torch.arange(TIME) >= (TIME - lengths).unsqueeze(1)  # padding first
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = layer.new_cache(BATCH, 9)
    parts = [(x, mask, positions)]
    for step in range(3):
        mask = torch.cat((mask, torch.ones(BATCH, 1, dtype=torch.bool)), dim=1)
        parts.append((some_x(1), mask, (lengths + step).unsqueeze(1)))
    y = torch.cat([layer(x, cache, positions, mask) for x, mask, positions in parts], dim=1)
    sequence = torch.cat([x for x, *_ in parts], dim=1)
    for row, length in enumerate(lengths.tolist()):
        close(y[row, TIME - length :], layer(sequence[row : row + 1, TIME - length :])[0])


@FORMS
def test_no_token_sees_a_later_one(form):
    layer, x = make(QUERY, form), some_x()
    y = once(layer, x, form)
    for t in range(1, TIME):
        other = x.clone()
        other[:, t:] = some_x()[:, t:]
        changed = once(layer, other, form)
        close(changed[:, :t], y[:, :t])
        assert not torch.allclose(changed[:, t], y[:, t])


@FORMS
def test_a_mask_hides_keys_by_row_or_by_query(form):
    layer, x = make(QUERY, form), some_x()
    alone = make_like(layer, "expanded")
    without_3 = torch.arange(TIME) != 3
    by_row = without_3.expand(BATCH, TIME)
    y = once(layer, x, form, mask=by_row)
    close(y, once(layer, x, form, mask=by_row.unsqueeze(1).expand(-1, TIME, -1)))
    keep = [0, 1, 2, 4, 5]
    close(y[:, keep], alone(x[:, keep], positions=torch.tensor(keep)))
    close(once(layer, x, form, mask=torch.ones(BATCH, TIME, dtype=torch.bool)), alone(x))
    nothing = once(layer, x, form, mask=torch.zeros(BATCH, TIME, TIME, dtype=torch.bool))
    for t in range(TIME):  # a token always attends to itself
        close(nothing[:, t : t + 1], alone(x[:, t : t + 1], positions=torch.tensor([t])))
    cache = layer.new_cache(BATCH, TIME)
    layer(x[:, :4], cache)
    close(layer(x[:, 4:], cache, mask=by_row), y[:, 4:])


@FORMS
def test_positions_continue_or_are_given_by_token_or_by_row(form):
    layer, x = make(QUERY, form), some_x()
    steps, y = torch.arange(TIME), once(layer, x, form)
    close(once(layer, x, form, positions=steps), y)
    close(once(layer, x, form, positions=steps.expand(BATCH, TIME)), y)
    shifted, stretched = (once(layer, x, form, positions=p) for p in (steps + 100, 2 * steps))
    torch.testing.assert_close(shifted, y, rtol=0, atol=1e-4)  # only differences of positions count
    assert not torch.allclose(stretched, y, rtol=0, atol=1e-3)
    own = torch.stack((steps, 2 * steps, 9 - steps))
    y = once(layer, x, form, positions=own)
    for row in range(BATCH):
        close(y[row : row + 1], layer(x[row : row + 1], positions=own[row]))


def test_the_cache_holds_the_normed_latent_and_the_turned_rope_key_and_nothing_else():
    layer, x = make(), some_x()
    cache = layer.new_cache(BATCH, 8)
    layer(x[:, :4], cache)
    layer(x[:, 4:], cache)
    assert cache.entries.shape == (BATCH, 8, LATENT + ROPE)
    for row in range(BATCH):
        for t in range(TIME):
            raw = layer.kv_a.weight @ x[row, t]
            latent = rms_norm(raw[:LATENT], layer.kv_norm.weight)
            close(cache.entries[row, t], torch.cat((latent, rotate(raw[LATENT:], t))))
    example = MultiheadLatentAttention(64, 4, 16, 16, 8, 16).new_cache(batch=2, max_length=32)
    assert example.nbytes == 2 * 32 * 24 * 4 and example.entries.numel() == 2 * 32 * 24


def macs(form, time, total, latent, nope, rope, value):
    """Multiply-adds of one head, product by product: rows x inner x columns."""
    products = {
        "expanded": [
            (total, latent, nope + value),  # keys and values from latents
            (time, nope + rope, total),  # scores
            (time, total, value),  # context
        ],
        "absorbed": [
            (time, nope, latent),  # queries into the latent space
            (time, latent, total),
            (time, rope, total),
            (time, total, latent),  # context, still latent
            (time, latent, value),
        ],
    }
    return sum(rows * inner * columns for rows, inner, columns in products[form])


@given(*[st.integers(1, 40)] * 4, st.integers(1, 20), st.integers(0, 60))
def test_the_cheaper_form_is_the_one_with_fewer_multiply_adds(latent, nope, half_rope, value, time, past):
    layer = MultiheadLatentAttention(2, 1, latent, nope, 2 * half_rope, value)
    sizes = (time, time + past, latent, nope, 2 * half_rope, value)
    want = past > 0 and macs("absorbed", *sizes) < macs("expanded", *sizes)
    assert layer.absorbed_is_cheaper(time, time + past) == want


def test_v3_absorbs_below_about_170_queries_over_a_long_past():
    with torch.device("meta"):
        layer = MultiheadLatentAttention(7168, 128, 512, 128, 64, 128, q_lora_rank=1536)
    assert layer.absorbed_is_cheaper(1, 2) and layer.absorbed_is_cheaper(1, 128_000)
    last = max(time for time in range(1, 1000) if layer.absorbed_is_cheaper(time, 128_000))
    assert 165 < last < 175
    assert not layer.absorbed_is_cheaper(4096, 4096)


def test_a_whole_sequence_is_expanded_however_small_the_latent():
    layer = MultiheadLatentAttention(2, 1, 1, qk_nope_head_dim=9, qk_rope_head_dim=2, v_head_dim=9)
    assert layer.absorbed_is_cheaper(4, 5) and not layer.absorbed_is_cheaper(4, 4)


def test_the_absorbed_form_does_the_multiply_adds_that_were_counted():
    layer = make(form="absorbed")
    cache = layer.new_cache(BATCH, 30)
    layer(some_x(28), cache)
    x = some_x(2)
    with FlopCounterMode(display=False) as counter:
        layer(x, cache)
    linears = 2 * DIM * (HEADS * (NOPE + ROPE) + LATENT + ROPE) + 2 * HEADS * VALUE * DIM
    want = BATCH * (HEADS * macs("absorbed", 2, 30, LATENT, NOPE, ROPE, VALUE) + linears)
    assert counter.get_total_flops() == 2 * want


def test_the_default_uses_both_forms(monkeypatch):
    layer, used = make(), []
    for form in ("expanded", "absorbed"):
        run = getattr(layer, form)
        monkeypatch.setattr(layer, form, lambda *args, run=run, form=form: used.append(form) or run(*args))
    cache = layer.new_cache(BATCH, 40)
    layer(some_x(39), cache)
    layer(some_x(1), cache)
    assert used == ["expanded", "absorbed"]


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_bf16_is_fp32_within_rounding(form):
    layer, x = make(QUERY, form).float(), some_x().float()
    y = in_chunks(layer, x, [4, 1, 1])
    layer.bfloat16()
    low = in_chunks(layer, x.bfloat16(), [4, 1, 1])
    assert low.dtype == torch.bfloat16
    assert (low.float() - y).norm() < 0.03 * y.norm()


def test_an_empty_batch_gives_an_empty_output():
    assert make()(torch.empty(0, 4, DIM, dtype=torch.float64)).shape == (0, 4, DIM)


def test_the_given_rope_is_used():
    rope = RotaryEmbedding(ROPE, theta=50.0, interleaved=False)
    layer = MultiheadLatentAttention(DIM, HEADS, LATENT, NOPE, ROPE, VALUE, rope=rope).double()
    standard = make()
    standard.load_state_dict(layer.state_dict())
    x = some_x()
    assert layer.rope is rope and not torch.allclose(layer(x), standard(x))
    standard.rope = RotaryEmbedding(ROPE, theta=50.0, interleaved=False)
    assert torch.equal(layer(x), standard(x))


class NoRope(torch.nn.Module):
    """A custom rope without a softmax_factor."""

    def forward(self, x, positions):
        return x


def test_a_custom_rope_needs_only_a_forward():
    layer, x = make(rope=NoRope()), some_x()
    standard = make_like(layer, "cheaper")
    close(layer(x), standard(x, positions=torch.zeros(TIME, dtype=torch.int64)))


LAYERS = {
    "MLA": lambda: MultiheadLatentAttention(DIM, HEADS, LATENT, NOPE, ROPE, VALUE),
    "GQA": lambda: GroupedQueryAttention(DIM, num_heads=6, num_kv_heads=3, head_dim=4),
}
GOOD = torch.zeros(3, 2, DIM)


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.zeros(3, 2, 18), {}, "(3, 2, 18); expected floating-point (batch, time >= 1, dim=19)"),
        (torch.zeros(2, DIM), {}, "expected floating-point (batch, time >= 1"),
        (torch.zeros(3, 0, DIM), {}, "expected floating-point (batch, time >= 1"),
        (GOOD.long(), {}, "x is torch.int64"),
        (GOOD, {"positions": torch.arange(3)}, "positions have shape (3,); expected (2,) or (3, 2)"),
        (GOOD, {"mask": torch.ones(3, 2)}, "torch.float32 (3, 2); expected torch.bool (3, 2) or (3, 2, 2)"),
        (GOOD, {"mask": torch.ones(2, 2, dtype=torch.bool)}, "expected torch.bool (3, 2)"),
        (GOOD, {"mask": torch.ones(3, 3, 2, dtype=torch.bool)}, "expected torch.bool (3, 2)"),
        (torch.zeros(2, 2, DIM), {"cache": (3, 8)}, "x has batch 2; the cache was made for batch 3"),
        (GOOD, {"cache": (3, 1)}, "cache full: position 1 does not fit, max_length=1 ends at 0"),
        (GOOD, {"cache": (3, 8, torch.float64)}, "torch.float32 on cpu; the cache is torch.float64 on cpu"),
        (GOOD, {"cache": LatentCache(3, 8, LATENT - 1, ROPE + 1)}, "the cache was made for"),
        (GOOD, {"cache": KVCache(3, 8, 6, 2)}, "the cache was made for"),
        (GOOD, {"cache": LatentCache(3, 8, LATENT, ROPE, device="meta")}, "the cache"),
    ],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_wrong_call_is_refused_and_leaves_the_cache_unchanged(kind, x, options, message):
    layer, options = LAYERS[kind](), dict(options)
    if isinstance(options.get("cache"), tuple):
        options["cache"] = layer.new_cache(*options["cache"])
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(x, **options)
    if "cache" in options:
        assert not any(options["cache"].lengths)


@given(*[st.integers(0, 5)] * 6, st.one_of(st.none(), st.integers(-1, 4)))
def test_any_sizes_build_an_attention_that_works_or_a_value_error(dim, heads, latent, nope, half, value, q):
    sizes = (dim, heads, latent, nope, 2 * half, value)
    try:
        layer = MultiheadLatentAttention(*sizes, q).double()
    except ValueError:
        assert min(*sizes, 1 if q is None else q) < 1
        return
    x = torch.randn(2, 3, dim, dtype=torch.float64)
    close(in_chunks(layer, x, [1, 1, 1]), layer(x))


def test_rms_norm_divides_by_the_root_of_the_mean_square_and_does_not_centre():
    norm = RMSNorm(7, eps=0.01).double()
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(4, 5, 7, dtype=torch.float64) * 0.1 + 0.3
    for vector, y in zip(x.flatten(0, 1).tolist(), norm(x).flatten(0, 1).tolist()):
        root = math.sqrt(sum(v * v for v in vector) / 7 + 0.01)
        assert y == pytest.approx([v / root * w for v, w in zip(vector, norm.weight.tolist())], rel=1e-12)
    assert RMSNorm(7).eps == 1e-6
    with pytest.raises(ValueError, match="dim=0 must be at least 1"):
        RMSNorm(0)


def test_rms_norm_computes_in_fp32_whatever_comes_in():
    norm = RMSNorm(300).bfloat16()
    x = (torch.randn(4, 300) * 1e17).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).double(), exact, rtol=2**-8, atol=0)  # half a bf16 ulp
    assert norm(torch.full((300,), 3e4).half()).isfinite().all()  # its square overflows fp16


@QUERIES
@FORMS
@pytest.mark.parametrize(
    "version, scaling, interleaved, bias",
    [
        ("V3", None, True, False),
        ("V3", None, True, True),
        ("V3", YaRN(32.0, 4096, mscale=1.0, mscale_all_dim=1.0), True, False),
        ("V3", YaRN(32.0, 4096, 1.0, 1.0, mscale=1.0, mscale_all_dim=1.0), False, False),
        ("V3", YaRN(32.0, 4096, mscale=1.0, mscale_all_dim=0.707), True, True),
        ("V3", YaRN(32.0, 4096), True, False),
        ("V2", YaRN(40.0, 4096, mscale=0.707, mscale_all_dim=0.707), True, True),
    ],
)
def test_output_equals_transformers(version, scaling, interleaved, bias, form, q_lora_rank):
    pytest.importorskip("transformers")
    folder = f"transformers.models.deepseek_{version.lower()}"
    module = importlib.import_module(f"{folder}.modeling_deepseek_{version.lower()}")
    settings = importlib.import_module(f"{folder}.configuration_deepseek_{version.lower()}")
    numbers = {"rope_type": "default"}
    if scaling is not None:
        numbers = {"rope_type": "yarn", **{name: value for name, value in vars(scaling).items() if value}}
        numbers["original_max_position_embeddings"] = numbers.pop("original_context")
    config = getattr(settings, f"Deepseek{version}Config")(
        hidden_size=HEADS * 4, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=q_lora_rank,
        kv_lora_rank=LATENT, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE,
        rope_parameters={"rope_theta": 10000.0, **numbers}, attn_implementation="sdpa",
        rope_interleave=interleaved, attention_bias=bias, max_position_embeddings=4096 * 40,
    )  # fmt: skip
    theirs = getattr(module, f"Deepseek{version}Attention")(config, layer_idx=0).double()
    rope = RotaryEmbedding(ROPE, 10000.0, interleaved, scaling)
    ours = make(q_lora_rank, form, dim=HEADS * 4, rope=rope, qkv_bias=bias, out_bias=bias)
    names = {"kv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_b": "kv_b_proj", "out": "o_proj"}
    names |= {"q": "q_proj", "q_a": "q_a_proj", "q_norm": "q_a_layernorm", "q_b": "q_b_proj"}
    given = {}
    for name, tensor in ours.state_dict().items():
        part, kind = name.split(".")
        given[f"{names[part]}.{kind}"] = tensor
    theirs.load_state_dict(given)
    for name in ("kv_a_layernorm", "q_a_layernorm"):  # transformers rounds to fp32 inside
        if (norm := getattr(theirs, name)) is not None:
            wide = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
            wide.weight.data.copy_(norm.weight)
            setattr(theirs, name, wide)
    x = torch.randn(BATCH, TIME, HEADS * 4, dtype=torch.float64)
    hidden = torch.full((TIME, TIME), -math.inf, dtype=torch.float64).triu(1).expand(BATCH, 1, -1, -1)
    positions = torch.tensor([0, 1, 3, 100, 5000, 5001]).unsqueeze(0)
    angles = getattr(module, f"Deepseek{version}RotaryEmbedding")(config)(x, positions)
    want, _ = theirs(x, position_embeddings=angles, attention_mask=hidden)
    y = once(ours, x, form, positions=positions[0])
    if version == "V3":
        close(y, want)
    else:  # rotated in fp32
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def test_cache_under_autocast_has_autocasts_dtype():
    attention = MultiheadLatentAttention(24, 2, 8, 6, 4, 5)
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = attention.new_cache(2, 9)
        chunks = torch.cat([attention(x[:, :6], cache), attention(x[:, 6:], cache)], dim=1)
        torch.testing.assert_close(chunks, attention(x), rtol=0.05, atol=0.02)
    assert cache.entries.dtype == torch.bfloat16


def test_gradients_flow_through_the_cache_where_only_the_query_is_trained():
    attention = MultiheadLatentAttention(24, 2, 8, 6, 4, 5)
    attention = attention.double().requires_grad_(False)
    attention.q.weight.requires_grad_(True)
    x = torch.randn(2, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cache = attention.new_cache(2, 9)
    sum(attention(part, cache).square().sum() for part in x.split([4, 1, 4], dim=1)).backward()
    through_the_cache = attention.q.weight.grad.clone()
    attention.q.weight.grad = None
    attention(x).square().sum().backward()
    torch.testing.assert_close(through_the_cache, attention.q.weight.grad, rtol=1e-10, atol=1e-12)
