import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lm import count
from lm.config import Config, ModelConfig, build, preset_names
from lm.model import Transformer


def published(
    layers,
    dense,
    width,
    heads,
    hidden,
    expert,
    experts,
    shared,
    top_k,
    vocab,
    q_rank=0,
    groups=(1, 1),
    **other,
):
    """A row of the papers' tables as a ModelConfig: V3's router, MLA of 512, 128, 64 and 128, unless told."""
    mla = {
        "q_lora_rank": q_rank,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    return build(
        ModelConfig,
        {
            "vocab_size": vocab,
            "dim": width,
            "num_layers": layers,
            "num_dense_layers": dense,
            "hidden_dim": hidden,
            "attention": {"num_heads": heads, **other.get("attention", mla)},
            "moe": {
                "router": other.get("router", "sigmoid"),
                "num_experts": experts,
                "num_shared_experts": shared,
                "top_k": top_k,
                "hidden_dim": expert,
                "num_groups": groups[0],
                "top_groups": groups[1],
            },
        },
    )


MHA = {"kind": "gqa", "num_kv_heads": 16, "head_dim": 128}
CONFIGS = {
    "DeepSeekMoE 16B": published(
        28, 1, 2048, 16, 10944, 1408, 64, 2, 6, 102400, router="softmax", attention=MHA
    ),
    "V2-Lite": published(27, 1, 2048, 16, 10944, 1408, 64, 2, 6, 102400, router="softmax"),
    "V2": published(60, 1, 5120, 128, 12288, 1536, 160, 2, 6, 102400, 1536, (8, 3), router="softmax"),
    "V3": published(61, 3, 7168, 128, 18432, 2048, 256, 1, 8, 129280, 1536, (8, 4)),
    "Moonlight": published(27, 1, 2048, 16, 11264, 1408, 64, 2, 6, 163840),
    "Kimi K2": published(61, 1, 7168, 64, 18432, 2048, 384, 1, 8, 163840, 1536),
}
# total, active, cache elements a token; active None: published without embeddings only, see below
PUBLISHED = {
    "DeepSeekMoE 16B": (16_375_728_128, 2_828_650_496, 114_688),
    "V2-Lite": (15_706_484_224, 2_661_150_208, 15_552),
    "V2": (235_741_434_880, 21_375_800_320, 34_560),
    "V3": (671_026_419_200, 37_552_297_472, 35_136),
    "Moonlight": (15_960_110_208, None, 15_552),
    "Kimi K2": (1_026_408_232_448, 32_861_500_928, 35_136),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_counted_to_the_last_digit(name):
    config, (total, active, cache) = CONFIGS[name], PUBLISHED[name]
    assert count.total_parameters(config) == total
    assert active is None or count.active_parameters(config) == active
    assert count.cache_elements_per_token(config) == cache


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_that_many_when_built(name):
    assert instantiated(CONFIGS[name])[1] == PUBLISHED[name][0]


def test_figures_of_the_papers_that_are_rounded():
    v3, lite, moonlight = (CONFIGS[name] for name in ("V3", "V2-Lite", "Moonlight"))
    assert round((count.active_parameters(v3) - 129280 * 7168) / 1e9, 2) == 36.63  # without input embedding
    assert round((count.active_parameters(lite) - 102400 * 2048) / 1e9, 2) == 2.45
    assert round((count.total_parameters(moonlight) - 2 * 163840 * 2048) / 1e9, 2) == 15.29  # without both
    assert round((count.active_parameters(moonlight) - 2 * 163840 * 2048) / 1e9, 2) == 2.24
    assert count.total_parameters(v3) - 58 * 256 == 671_026_404_352  # as transformers counts, without biases
    flops = count.training_flops_per_token(v3, 4096)
    assert 245e9 < flops < 255e9  # "about 250 GFLOP a token"
    assert round(flops * 14.8e12 / 1e24, 1) == 3.7
    llama = dataclasses.replace(
        v3,
        num_layers=126,
        attention=dataclasses.replace(v3.attention, kind="gqa", num_kv_heads=8, head_dim=128),
    )
    assert count.cache_elements_per_token(llama) == 258_048  # Llama 3.1 405B
    assert round(258_048 / count.cache_elements_per_token(v3), 1) == 7.3


SMALL = st.integers(1, 5)


@st.composite
def models(draw):
    groups, size = draw(SMALL), draw(st.integers(2, 4))
    kv_heads = draw(st.integers(1, 3))
    layers = draw(SMALL)
    table = {
        "vocab_size": draw(st.integers(1, 40)),
        "dim": draw(st.integers(1, 20)),
        "num_layers": layers,
        "num_dense_layers": draw(st.integers(0, layers)),
        "hidden_dim": draw(st.integers(1, 20)),
        "tie_embeddings": draw(st.booleans()),
        "attention": {
            "kind": draw(st.sampled_from(["mla", "gqa"])),
            "num_heads": kv_heads * draw(st.integers(1, 3)),
            "num_kv_heads": kv_heads,
            "head_dim": 2 * draw(SMALL),
            "q_lora_rank": draw(st.integers(0, 6)),
            "kv_lora_rank": draw(SMALL),
            "qk_nope_head_dim": draw(SMALL),
            "qk_rope_head_dim": 2 * draw(SMALL),
            "v_head_dim": draw(SMALL),
        },
        "moe": {
            "router": draw(st.sampled_from(["sigmoid", "softmax"])),
            "num_experts": groups * size,
            "num_groups": groups,
            "top_groups": groups,
            "top_k": draw(st.integers(1, groups * size)),
            "hidden_dim": draw(st.integers(1, 20)),
            "num_shared_experts": draw(st.integers(0, 3)),
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
    assert parts["dense MLPs"] == numbers(lambda name: ".mlp.gate_up." in name or ".mlp.down." in name)


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
        {"kind": "gqa", "num_kv_heads": 2},
    ],
    ids=["mla", "mla with query compression", "mha"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_pytorch_counts_for_a_dense_model(tiny, attention, tied):
    config = tiny(model={"num_dense_layers": 3, "tie_embeddings": tied}, attention=attention).model
    model = Transformer(config)
    batch, time = 2, 12
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(batch, time, dtype=torch.int64)).logits.sum().backward()
    # PyTorch counts all pairs of tokens, so as many a query as the causal half of a context of 2 time - 1
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
    pairs = context * (context + 1) // 2  # of query and key in one sequence
    attention = 3 * 2 * config.num_layers * a.num_heads * widths * pairs
    products = 6 * (count.active_parameters(config) - lookup - idle) * context
    assert count.training_flops_per_token(config, context) * context == products + attention


@pytest.mark.parametrize("section, key", [("moe", "router"), ("attention", "kind")])
def test_parts_of_ones_own_cannot_be_counted(tiny, section, key):
    config = tiny(**{section: {key: "mine:Own"}}).model
    with pytest.raises(ValueError, match=f"model.{section}.{key} 'mine:Own'"):
        count.total_parameters(config)


def test_summary_and_its_text_agree(tiny):
    config = tiny(attention={"num_heads": 8}).model
    facts = count.summary(config, 1000)
    assert facts["parameters"]["total"] == count.total_parameters(config)
    assert facts["parameters"]["active_without_input_embedding"] == count.active_parameters(config) - 256 * 16
    assert facts["cache_elements_per_token"]["this model"] == 3 * (8 + 4)
    assert facts["cache_elements_per_token"]["MHA"] == 3 * 2 * 8 * 6
    assert facts["cache_elements_per_token"]["MQA"] == 3 * 2 * 6
    text = count.as_text(facts)
    for number in (
        facts["parameters"]["total"],
        facts["parameters"]["active"],
        facts["training_flops_per_token"],
    ):
        assert f"{number:,}" in text
    assert f"{2 * 3 * 12 * 1000 / 2**20:,.2f} MiB" in text
    assert math.isclose(sum(facts["parameters"]["by_part"].values()), facts["parameters"]["total"], rel_tol=0)
