import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lm import count
from lm.config import Config, ModelConfig, build, preset_names
from lm.model import Transformer

# total, active, cache elements per token. DeepSeek: transformers' counts, which round to the papers' figures;
# Moonlight's active count is published without embeddings only, see below. Others: the models' pages.
PUBLISHED = {
    "deepseek-moe-16b": (16_375_728_128, 2_828_650_496, 114_688),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208, 15_552),
    "deepseek-v2": (235_741_434_880, 21_375_800_320, 34_560),
    "deepseek-v3": (671_026_419_200, 37_552_297_472, 35_136),
    "deepseek-r1": (671_026_419_200, 37_552_297_472, 35_136),
    "moonlight": (15_960_110_208, None, 15_552),
    "kimi-k2": (1_026_408_232_448, 32_861_500_928, 35_136),
    "llama-3.1-8b": (8_030_261_248, 8_030_261_248, 65_536),
    "llama-3.1-70b": (70_553_706_496, 70_553_706_496, 163_840),
    "llama-3.1-405b": (405_853_388_800, 405_853_388_800, 258_048),
    "qwen2.5-72b": (72_706_203_648, 72_706_203_648, 163_840),
    "qwen3-30b-a3b": (30_532_122_624, None, 48 * 2 * 4 * 128),
    "qwen3-235b-a22b": (235_093_634_560, None, 94 * 2 * 4 * 128),
    "mixtral-8x7b": (46_702_792_704, None, 32 * 2 * 8 * 128),
}
# in billions, as the papers and pages round them: total, active
ROUNDED = {
    "deepseek-moe-16b": (16.4, 2.8),
    "deepseek-v2": (236, 21),
    "deepseek-v3": (671, None),
    "qwen3-30b-a3b": (30.5, 3),
    "qwen3-235b-a22b": (235, 22),
    "mixtral-8x7b": (46.7, 12.9),
}


def preset(name):
    return Config.preset(name).model


def changed(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_counted_to_the_last_digit(name):
    config, (total, active, cache) = preset(name), PUBLISHED[name]
    assert count.total_parameters(config) == total
    assert active is None or count.active_parameters(config) == active
    assert count.cache_elements_per_token(config) == cache


@pytest.mark.parametrize("name", ROUNDED)
def test_published_models_have_the_rounded_sizes_of_their_papers(name):
    counted = count.total_parameters(preset(name)), count.active_parameters(preset(name))
    for number, billions in zip(counted, ROUNDED[name]):
        assert billions is None or round(number / 1e9, 1 if isinstance(billions, float) else None) == billions


def test_every_published_preset_is_in_the_table():
    assert set(PUBLISHED) == {name for name in preset_names() if preset(name).vocab_size > 256}


def test_figures_of_the_papers_without_embeddings():
    v3, lite, moonlight = (preset(name) for name in ("deepseek-v3", "deepseek-v2-lite", "moonlight"))
    assert round((count.active_parameters(v3) - 129280 * 7168) / 1e9, 2) == 36.63  # without input embedding
    assert round((count.active_parameters(lite) - 102400 * 2048) / 1e9, 2) == 2.45
    assert round((count.total_parameters(moonlight) - 2 * 163840 * 2048) / 1e9, 2) == 15.29  # without both
    assert round((count.active_parameters(moonlight) - 2 * 163840 * 2048) / 1e9, 2) == 2.24
    assert count.total_parameters(v3) - 58 * 256 == 671_026_404_352  # as transformers counts, without biases


def test_v3_with_its_prediction_module_is_the_685_b_of_the_checkpoint():
    v3 = preset("deepseek-v3")
    block = count.total_parameters(v3) - count.total_parameters(dataclasses.replace(v3, num_layers=60))
    norms, projection, copies = 3 * 7168, 2 * 7168**2, 2 * 129280 * 7168
    assert round((block + norms) / 1e9, 2) == 11.51
    assert round((block + norms + projection) / 1e9, 2) == 11.61
    total = count.total_parameters(v3) + block + norms + projection + copies
    assert round(total / 1e9, 2) == 684.49


def test_presets_have_the_numbers_that_transformers_has_by_default():
    import transformers  # slow to import and used only here

    v3, theirs = preset("deepseek-v3"), transformers.DeepseekV3Config()
    pairs = [
        (v3.vocab_size, theirs.vocab_size),
        (v3.dim, theirs.hidden_size),
        (v3.num_layers, theirs.num_hidden_layers),
        (v3.num_dense_layers, theirs.first_k_dense_replace),
        (v3.hidden_dim, theirs.intermediate_size),
        (v3.norm_eps, theirs.rms_norm_eps),
        (v3.attention.q_lora_rank, theirs.q_lora_rank),
        (v3.attention.qk_rope_head_dim, theirs.qk_rope_head_dim),
        (v3.moe.num_experts, theirs.n_routed_experts),
        (v3.moe.num_groups, theirs.n_group),
        (v3.moe.top_groups, theirs.topk_group),
        (v3.moe.normalize, theirs.norm_topk_prob),
        (v3.moe.routed_scaling_factor, theirs.routed_scaling_factor),
    ]
    mixtral, theirs = preset("mixtral-8x7b"), transformers.MixtralConfig()
    pairs += [
        (mixtral.dim, theirs.hidden_size),
        (mixtral.num_layers, theirs.num_hidden_layers),
        (mixtral.attention.num_kv_heads, theirs.num_key_value_heads),
        (mixtral.moe.hidden_dim, theirs.intermediate_size),
        (mixtral.moe.num_experts, theirs.num_local_experts),
        (mixtral.moe.top_k, theirs.num_experts_per_tok),
        (mixtral.norm_eps, theirs.rms_norm_eps),
    ]
    assert [ours for ours, _ in pairs] == [other for _, other in pairs]
    assert preset("deepseek-r1") == v3


# --- caches


def as_mha(config, **values):
    """The same model with multi-head attention, whose heads are as wide as the values."""
    width = config.attention.v_head_dim
    heads = {"num_kv_heads": config.attention.num_heads, "head_dim": width, **values}
    return changed(config, "attention", kind="gqa", **heads)


def test_caches_shrink_by_the_factors_in_the_papers():
    numbers = {name: count.cache_elements_per_token(preset(name)) for name in PUBLISHED}
    mla = preset("deepseek-v3").attention
    assert mla.kv_lora_rank + mla.qk_rope_head_dim == 4.5 * mla.v_head_dim  # V2 table 1; GQA of 2.25 groups
    assert round(count.cache_elements_per_token(as_mha(preset("deepseek-v3"))) / 35_136, 1) == 56.9
    assert round(numbers["llama-3.1-405b"] / numbers["deepseek-v3"], 1) == 7.3
    lite = count.cache_elements_per_token(as_mha(preset("deepseek-v2-lite")))
    assert (lite, round(15_552 / lite, 4)) == (110_592, 0.1406)  # V2 table 9: 110.6K -> 15.6K
    large = as_mha(preset("deepseek-v2"), num_heads=56, num_kv_heads=56)
    assert count.cache_elements_per_token(large) == 860_160  # V2 table 9: 860.2K -> 34.6K, 4 %
    assert round(numbers["deepseek-v2"] / 860_160, 2) == 0.04


def test_v2_has_a_cache_that_is_93_percent_smaller_than_that_of_deepseek_67b():
    dense = dataclasses.replace(preset("llama-3.1-70b"), num_layers=95, num_dense_layers=95)
    ours, theirs = (count.cache_elements_per_token(config) for config in (preset("deepseek-v2"), dense))
    assert theirs == 194_560
    assert round(1 - ours / theirs, 3) == 0.822
    assert round(1 - ours * 6 / (theirs * 16), 3) == 0.933  # V2 quantises its cache to 6 bits


@pytest.mark.parametrize(
    "name, dtype, a_layer",
    [
        ("deepseek-v3", "bf16", 1152),
        ("deepseek-v3", "fp16", 1152),
        ("deepseek-v3", "fp32", 2304),
        ("deepseek-v3", "fp8", 656),  # FlashMLA: 512 + 4 scales of 4 bytes + 64 in bf16
        ("llama-3.1-405b", "bf16", 4096),
        ("llama-3.1-405b", "fp8", 2048),
    ],
)
def test_bytes_of_a_cache(name, dtype, a_layer):
    assert count.cache_bytes_per_token(preset(name), dtype) == preset(name).num_layers * a_layer


def test_a_partial_fp8_block_of_a_latent_has_its_own_scale():
    config = changed(preset("deepseek-v3"), "attention", kv_lora_rank=129)
    assert count.cache_bytes_per_token(config, "fp8") == 61 * (129 + 2 * 4 + 2 * 64)


def test_an_unknown_dtype_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"dtype 'fp9' \(did you mean 'fp8'\?\); there are bf16, fp16, "):
        count.cache_bytes_per_token(preset("toy"), "fp9")


# --- training FLOPs


@pytest.mark.parametrize(
    "layers, dim, vocab, context, feed_forwards, teraflops",
    [
        (30, 4096, 102400, 4096, 1, 183.5),  # DeepSeek 7B; the first three rows: DeepSeekMoE tables 3 and 4
        (32, 4096, 32000, 4096, 1, 187.9),  # Llama 2 7B
        (28, 2048, 102400, 4096, 2, 74.4),  # DeepSeekMoE 16B: 8 quarter-size experts
        (9, 1280, 8192, 2048, 1, 2.9),  # the 2B study, tables 1 and 2: dense, Hash and Switch
        (9, 1280, 8192, 2048, 2, 4.3),  # GShard, DeepSeekMoE
        (9, 1280, 8192, 2048, 3, 5.8),  # GShard x 1.5
        (9, 1280, 8192, 2048, 16, 24.6),  # dense x 16
    ],
)
def test_deepseeks_formula_gives_every_figure_that_the_paper_prints(
    layers, dim, vocab, context, feed_forwards, teraflops
):
    flops = count.deepseek_training_flops(layers, dim, vocab, context, feed_forwards)
    assert round(flops / 1e12, 1) == teraflops
    if feed_forwards == 1:
        written_out = context * (72 * layers * dim**2 + 12 * layers * dim * context + 6 * vocab * dim)
        assert flops == written_out


@pytest.mark.parametrize(
    "dim, hidden, expert, active, expected",
    [
        (4096, 11008, 1, 0, 1),  # DeepSeek 7B, Llama 2 7B
        (2048, 10944, 1408, 8, 2),  # DeepSeekMoE 16B
        (1280, 3413, 853, 8, 2),  # DeepSeekMoE 2B
        (1280, 3413, 5120, 2, 3),  # GShard x 1.5
        (1280, 54613, 1, 0, 16),
    ],
)
def test_widths_are_counted_in_quarters_of_a_feed_forward(dim, hidden, expert, active, expected):
    dense = {"num_layers": 20, "num_dense_layers": 1 if active else 20, "hidden_dim": hidden, "dim": dim}
    moe = {"num_experts": 16, "hidden_dim": expert, "top_k": max(1, active - 1), "num_shared_experts": 1}
    assert count.feed_forwards(build(ModelConfig, {**dense, "moe": moe})) == expected


def test_training_v3_takes_the_hours_and_dollars_of_the_paper():
    flops = count.training_flops_per_token(preset("deepseek-v3"), 4096)
    assert round(flops / 1e9, -1) == 250  # 6 x 36.6 B and attention
    cost = count.training_cost(flops, 14.8e12, 2.664e6, 2.788e6, 2.0, 989.5e12)
    assert round(cost["flops"] / 1e24, 1) == 3.7
    assert round(cost["flops_per_second_and_gpu"] / 1e12) == 387
    assert round(cost["utilisation"], 2) == 0.39
    assert cost["dollars"] == 5_576_000


# --- counts against built models


SMALL = st.integers(1, 5)


@st.composite
def models(draw):
    groups, size = draw(SMALL), draw(st.integers(2, 4))
    kv_heads = draw(st.integers(1, 3))
    layers = draw(SMALL)
    kind, shared = draw(st.sampled_from(["mla", "gqa"])), draw(st.integers(0, 3))
    table = {
        "vocab_size": draw(st.integers(1, 40)),
        "dim": draw(st.integers(1, 20)),
        "num_layers": layers,
        "num_dense_layers": draw(st.integers(0, layers)),
        "hidden_dim": draw(st.integers(1, 20)),
        "tie_embeddings": draw(st.booleans()),
        "attention": {
            "kind": kind,
            "num_heads": kv_heads * draw(st.integers(1, 3)),
            "num_kv_heads": kv_heads,
            "head_dim": 2 * draw(SMALL),
            "q_lora_rank": draw(st.integers(0, 6)),
            "kv_lora_rank": draw(SMALL),
            "qk_nope_head_dim": draw(SMALL),
            "qk_rope_head_dim": 2 * draw(SMALL),
            "v_head_dim": draw(SMALL),
            "qkv_bias": draw(st.booleans()),
            "out_bias": draw(st.booleans()),
            "qk_norm": kind == "gqa" and draw(st.booleans()),
        },
        "moe": {
            "router": draw(st.sampled_from(["sigmoid", "softmax"])),
            "num_experts": groups * size,
            "num_groups": groups,
            "top_groups": groups,
            "top_k": draw(st.integers(1, groups * size)),
            "hidden_dim": draw(st.integers(1, 20)),
            "num_shared_experts": shared,
            "shared_gate": shared > 0 and draw(st.booleans()),
        },
    }
    return build(ModelConfig, table)


def instantiated(config):
    with torch.device("meta"):
        model = Transformer(config)
    return model, sum(t.numel() for t in (*model.parameters(), *model.buffers()))


@settings(max_examples=60)
@given(config=models())
def test_total_is_what_is_instantiated(config):
    model, total = instantiated(config)
    assert count.total_parameters(config) == total == sum(count.parameters_by_part(config).values())
    assert count.built_parameters(model) == total
    experts = sum(
        block.mlp.experts.gate_up[0].numel() + block.mlp.experts.down[0].numel()
        for block in model.blocks[config.num_dense_layers :]
    )
    assert count.active_parameters(config) == total - (config.moe.num_experts - config.moe.top_k) * experts


@settings(max_examples=40)
@given(config=models())
def test_each_part_is_what_is_instantiated(config):
    model, _ = instantiated(config)

    def numbers(chosen):
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        return sum(tensor.numel() for name, tensor in tensors.items() if chosen(name))

    parts = count.parameters_by_part(config)
    assert parts["embedding"] == numbers(lambda name: name.startswith("embedding."))
    assert parts["head"] == numbers(lambda name: name.startswith("head."))
    assert parts["norms"] == numbers(lambda name: "norm" in name)
    assert parts["attention"] == numbers(lambda name: ".attention." in name and "norm" not in name)
    assert parts["routers"] == numbers(lambda name: ".router." in name)
    assert parts["routed experts"] == numbers(lambda name: ".experts." in name)
    assert parts["shared experts"] == numbers(lambda name: ".shared." in name)
    dense = tuple(f"blocks.{layer}.mlp." for layer in range(config.num_dense_layers))
    assert parts["dense MLPs"] == numbers(lambda name: name.startswith(dense))


@settings(max_examples=40)
@given(config=models(), length=st.integers(1, 9))
def test_cache_elements_are_those_of_live_caches(config, length):
    caches = Transformer(config).new_caches(1, length)
    assert sum(cache.entries.numel() for cache in caches) == length * count.cache_elements_per_token(config)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_counted_as_they_are_built(name):
    config = Config.preset(name).model
    model, total = instantiated(config)
    assert count.total_parameters(config) == total
    caches = model.new_caches(1, 3)
    assert sum(cache.entries.numel() for cache in caches) == 3 * count.cache_elements_per_token(config)


@pytest.mark.parametrize(
    "attention",
    [
        {"q_lora_rank": 0, "v_head_dim": 10},
        {"q_lora_rank": 8, "v_head_dim": 10},
        {"q_lora_rank": 8, "v_head_dim": 10, "qkv_bias": True, "out_bias": True},
        {"kind": "gqa", "num_kv_heads": 2},
        {"kind": "gqa", "num_kv_heads": 1, "qkv_bias": True, "out_bias": True, "qk_norm": True},
    ],
    ids=["mla", "mla with query compression", "mla with biases", "mha", "mqa with biases and norms"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_pytorch_counts_for_a_dense_model(tiny, attention, tied):
    config = tiny(model={"num_dense_layers": 3, "tie_embeddings": tied}, attention=attention).model
    model = Transformer(config)
    batch, time = 2, 12
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(batch, time, dtype=torch.int64)).logits.sum().backward()
    # PyTorch counts all pairs: as many per query as the causal half of a context of 2 * time - 1
    assert counter.get_total_flops() == batch * time * count.training_flops_per_token(config, 2 * time - 1)


@settings(max_examples=30)
@given(config=models(), context=st.integers(1, 5000))
def test_flops_are_six_a_weight_and_attention_over_the_causal_half(config, context):
    assume(not config.tie_embeddings)
    lookup = config.vocab_size * config.dim
    model, _ = instantiated(config)
    idle = sum(t.numel() for name, t in model.named_parameters() if t.ndim == 1)
    idle += sum(t.numel() for t in model.buffers())
    a = config.attention
    widths = 2 * a.head_dim if a.kind == "gqa" else a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
    pairs = context * (context + 1) // 2  # (query, key) pairs in one sequence
    attention = 3 * 2 * config.num_layers * a.num_heads * widths * pairs
    products = 6 * (count.active_parameters(config) - lookup - idle) * context
    assert count.training_flops_per_token(config, context) * context == products + attention


@pytest.mark.parametrize("section, key", [("moe", "router"), ("attention", "kind")])
def test_custom_parts_cannot_be_counted(tiny, section, key):
    config = tiny(**{section: {key: "mine:Own"}}).model
    with pytest.raises(ValueError, match=f"model.{section}.{key} 'mine:Own'"):
        count.total_parameters(config)
