import copy

import pytest
import torch
from torch import nn

from lm.config import Config
from lm.model import Output, Transformer
from lm.parts import build_attention
from mla import GroupedQueryAttention, Linear, Llama3, MultiheadLatentAttention, YaRN
from moe import Gated, MoE, Routing, SigmoidRouter, SoftmaxRouter, SwiGLU

OWN_PARTS = """
import torch
from torch import nn
from mla import MultiheadLatentAttention
from moe import Routing


class First(nn.Module):
    def __init__(self, dim, num_experts, top_k, weight=0.25, offset=0):
        super().__init__()
        self.num_experts, self.top_k, self.weight, self.offset = num_experts, top_k, weight, offset
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        experts = (torch.arange(self.top_k) + self.offset).expand(*x.shape[:-1], self.top_k)
        scores = torch.ones(*x.shape[:-1], self.num_experts, dtype=x.dtype)
        weights = (self.scale * self.weight).to(x.dtype).expand(*x.shape[:-1], self.top_k)
        return Routing(experts, weights, scores, scores)


class ByToken(First):
    def forward(self, x, tokens):
        routing = super().forward(x)
        return routing._replace(experts=(tokens.unsqueeze(-1) + torch.arange(self.top_k)) % self.num_experts)


class Doubled(MultiheadLatentAttention):
    def __init__(
        self, dim, num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, factor=2.0
    ):
        super().__init__(dim, num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
        self.factor = factor

    def forward(self, x, cache=None, positions=None, mask=None):
        return self.factor * super().forward(x, cache, positions, mask)


class NotAModule:
    pass


def function(dim):
    raise SystemExit("was called")
"""


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))


def draw_tokens(batch, time, vocab_size=256, seed=0):
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


CONFIGS = {
    "mla": {},
    "mla without query compression": {"attention": {"q_lora_rank": 0}},
    "gqa": {"attention": {"kind": "gqa"}},
    "softmax router": {"moe": {"router": "softmax", "normalize": False}},
    "no shared expert": {"moe": {"num_shared_experts": 0}},
    "two shared experts": {"moe": {"num_shared_experts": 2}},
    "tied": {"model": {"tie_embeddings": True}},
    "all dense": {"model": {"num_dense_layers": 3}},
    "no dense": {"model": {"num_dense_layers": 0}},
    "half rotation": {"rope": {"interleaved": False, "theta": 100.0}},
    "mla with biases, yarn, gated shared expert": {
        "attention": {"qkv_bias": True, "out_bias": True},
        "rope": {"scaling": "yarn", "factor": 4, "original_context": 64, "mscale_all_dim": 0.5},
        "moe": {"shared_gate": True},
    },
    "gqa with biases, norms, llama3's rope": {
        "attention": {"kind": "gqa", "qkv_bias": True, "out_bias": True, "qk_norm": True},
        "rope": {"scaling": "llama3", "factor": 4, "original_context": 8},
    },
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_output_has_logits_hidden_and_a_routing_for_each_moe_layer(tiny, make_model, changes):
    config = tiny(**changes).model
    out = make_model(config)(draw_tokens(2, 5))
    assert isinstance(out, Output)
    assert out.logits.shape == (2, 5, 256) and out.hidden.shape == (2, 5, 16)
    assert len(out.routings) == config.num_layers - config.num_dense_layers
    for routing in out.routings:
        assert routing.experts.shape == routing.weights.shape == (2, 5, 2)
        assert routing.scores.shape == routing.logits.shape == (2, 5, 8)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 7], [11, 1], [1, 11], [3, 1, 1, 6, 1], [12]], ids=str)
def test_any_chunking_through_the_caches_equals_one_call(tiny, make_model, changes, chunks):
    model, tokens = make_model(tiny(**changes).model), draw_tokens(3, 12)
    whole = model(tokens)
    caches = model.new_caches(3, 12)
    outs = [model(part, caches) for part in tokens.split(chunks, dim=1)]
    for name in ("logits", "hidden"):
        got = torch.cat([getattr(out, name) for out in outs], dim=1)
        want = getattr(whole, name)
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()
    for layer, routing in enumerate(whole.routings):
        assert torch.equal(torch.cat([out.routings[layer].experts for out in outs], dim=1), routing.experts)


def test_hidden_is_the_input_of_the_final_norm_and_the_head(tiny, make_model):
    model = make_model(tiny().model)
    out = model(draw_tokens(2, 5))
    scale = (out.hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    want = (out.hidden * scale * model.norm.weight) @ model.head.weight.T
    torch.testing.assert_close(out.logits, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_later_tokens_do_not_change_earlier_outputs(tiny, make_model, changes):
    model, tokens = make_model(tiny(**changes).model), draw_tokens(1, 10)
    other = torch.cat([tokens[:, :6], draw_tokens(1, 4, seed=1)], dim=1)
    torch.testing.assert_close(model(other).logits[:, :6], model(tokens).logits[:, :6], rtol=0, atol=1e-12)
    assert not torch.equal(model(other).logits[:, 6:], model(tokens).logits[:, 6:])


def test_batch_rows_are_independent(tiny, make_model):
    model, tokens = make_model(tiny().model), draw_tokens(4, 9)
    alone = torch.cat([model(row.unsqueeze(0)).logits for row in tokens])
    torch.testing.assert_close(model(tokens).logits, alone, rtol=0, atol=1e-12)


def test_mask_hides_padding_on_the_left(tiny, make_model):
    model, tokens = make_model(tiny().model), draw_tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens], dim=1)
    mask = torch.arange(9).unsqueeze(0) >= 3
    positions = (torch.arange(9) - 3).clamp(min=0)
    torch.testing.assert_close(
        model(padded, positions=positions, mask=mask).logits[:, 3:], model(tokens).logits, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "tokens, said",
    [
        (torch.zeros(2, 3), "tokens are torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int32), "tokens are torch.int32"),
        (torch.zeros(3, dtype=torch.int64), r"tokens are torch.int64 \(3,\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"tokens are torch.int64 \(1, 2, 3\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"\(2, 0\); expected int64 \(batch, time >= 1\)"),
        (torch.tensor([[0, -1]]), r"token -1 is not in the vocabulary, 0..255"),
        (torch.tensor([[0, 256]]), r"token 256 is not in the vocabulary, 0..255"),
    ],
)
def test_what_is_not_a_batch_of_tokens_is_rejected(tiny, make_model, tokens, said):
    with pytest.raises(ValueError, match=said):
        make_model(tiny().model)(tokens)


def test_more_tokens_than_the_caches_hold_are_rejected(tiny, make_model):
    model = make_model(tiny().model)
    caches = model.new_caches(1, 4)
    model(draw_tokens(1, 3), caches)
    with pytest.raises(ValueError, match="max_length=4"):
        model(draw_tokens(1, 2), caches)


def test_caches_must_be_one_a_layer_and_of_this_batch(tiny, make_model):
    model = make_model(tiny().model)
    with pytest.raises(ValueError, match="2 caches for 3 layers"):
        model(draw_tokens(1, 3), model.new_caches(1, 8)[:2])
    with pytest.raises(ValueError, match="0 caches for 3 layers"):
        model(draw_tokens(1, 3), [])
    with pytest.raises(ValueError, match="batch"):
        model(draw_tokens(1, 3), model.new_caches(2, 8))


def test_an_empty_batch_gives_an_empty_output(tiny, make_model):
    out = make_model(tiny().model)(torch.zeros(0, 4, dtype=torch.int64))
    assert out.logits.shape == (0, 4, 256)


def test_a_dense_layer_has_one_mlp_and_the_others_have_experts(tiny):
    model = Transformer(tiny(model={"num_dense_layers": 2}).model)
    assert [isinstance(block.mlp, MoE) for block in model.blocks] == [False, False, True]
    assert model.blocks[0].mlp.gate_up.weight.shape == (2 * 24, 16)
    assert model.blocks[2].mlp.experts.gate_up.shape == (8, 2 * 8, 16)
    assert model.routers() == [model.blocks[2].mlp.router]


def test_shared_experts_are_one_mlp_of_their_width_together(tiny):
    shared = Transformer(tiny(moe={"num_shared_experts": 3}).model).blocks[1].mlp.shared
    assert shared.gate_up.weight.shape == (2 * 3 * 8, 16)
    assert Transformer(tiny(moe={"num_shared_experts": 0}).model).blocks[1].mlp.shared is None


@pytest.mark.parametrize("name, kind", [("sigmoid", SigmoidRouter), ("softmax", SoftmaxRouter)])
def test_the_router_gets_the_values_of_the_config(tiny, name, kind):
    moe = {
        "router": name,
        "top_k": 3,
        "num_groups": 2,
        "top_groups": 1,
        "normalize": False,
        "routed_scaling_factor": 2.5,
    }
    router = Transformer(tiny(moe=moe).model).routers()[0]
    assert type(router) is kind
    for key in ("top_k", "num_groups", "top_groups", "normalize", "routed_scaling_factor"):
        assert getattr(router, key) == moe[key]


def test_attention_gets_the_values_of_the_config(tiny):
    rope = {"theta": 500.0, "interleaved": False}
    mla = Transformer(tiny(rope=rope).model).blocks[0].attention
    assert isinstance(mla, MultiheadLatentAttention)
    assert (mla.num_heads, mla.q_lora_rank, mla.kv_lora_rank, mla.qk_nope_head_dim) == (2, 8, 8, 6)
    assert (mla.qk_rope_head_dim, mla.v_head_dim, mla.rope.theta, mla.rope.interleaved) == (
        4,
        6,
        500.0,
        False,
    )
    gqa = Transformer(tiny(attention={"kind": "gqa"}, rope=rope).model).blocks[0].attention
    assert isinstance(gqa, GroupedQueryAttention)
    assert (gqa.num_heads, gqa.num_kv_heads, gqa.head_dim, gqa.rope.dim) == (2, 1, 8, 8)
    assert (gqa.rope.theta, gqa.rope.interleaved) == (500.0, False)


SCALINGS = {
    "none": None,
    "linear": Linear(3.0),
    "yarn": YaRN(3.0, 100, beta_fast=20.0, beta_slow=2.0, mscale=0.5, mscale_all_dim=0.25),
    "llama3": Llama3(3.0, 100, low_freq_factor=2.5, high_freq_factor=5.0),
}


@pytest.mark.parametrize("kind", ["mla", "gqa"])
@pytest.mark.parametrize("scaling, want", SCALINGS.items())
def test_rope_scaling_gets_the_values_of_the_config(tiny, scaling, want, kind):
    numbers = {"factor": 3.0, "original_context": 100, "beta_fast": 20.0, "beta_slow": 2.0, "mscale": 0.5}
    numbers |= {"mscale_all_dim": 0.25, "low_freq_factor": 2.5, "high_freq_factor": 5.0, "theta": 7.0}
    config = tiny(attention={"kind": kind}, rope={"scaling": scaling, "interleaved": False, **numbers}).model
    for block in Transformer(config).blocks:
        rope = block.attention.rope
        assert rope.scaling == want and type(rope.scaling) is type(want)
        assert (rope.theta, rope.interleaved, rope.dim) == (7.0, False, 4 if kind == "mla" else 8)


@pytest.mark.parametrize(
    "preset, factor", [("v3", 1.8739), ("r1", 1.8739), ("v2", 1.5896), ("v2-lite", 1.5896)]
)
def test_deepseeks_presets_grow_the_softmax_scale_and_not_cos_and_sin(preset, factor):
    config = Config.preset(f"deepseek-{preset}").model
    with torch.device("meta"):
        attention = build_attention(config.dim, config.attention, config.rope, config.norm_eps)
    assert attention.scale * 192**0.5 == pytest.approx(factor, abs=5e-5)
    assert attention.rope.cos_sin_factor == 1.0


PARTS = {  # options of model.attention, and the parameters that they add
    "mla": (
        {"qkv_bias": ["q_a.bias", "kv_a.bias"], "out_bias": ["out.bias"]},
        {"kind": "mla"},
    ),
    "mla without query compression": (
        {"qkv_bias": ["kv_a.bias"], "out_bias": ["out.bias"]},
        {"kind": "mla", "q_lora_rank": 0},
    ),
    "gqa": (
        {
            "qkv_bias": ["q.bias", "k.bias", "v.bias"],
            "out_bias": ["out.bias"],
            "qk_norm": ["q_norm.weight", "k_norm.weight"],
        },
        {"kind": "gqa"},
    ),
}


@pytest.mark.parametrize("parts, attention", PARTS.values(), ids=PARTS)
def test_each_option_of_attention_adds_its_biases_or_norms_to_every_layer(tiny, parts, attention):
    names = lambda **options: [  # noqa: E731
        set(block.attention.state_dict())
        for block in Transformer(tiny(attention={**attention, **options}).model).blocks
    ]
    for option, added in parts.items():
        for plain, more in zip(names(), names(**{option: True})):
            assert more - plain == set(added) and plain < more


def test_shared_gate_weighs_the_shared_experts_of_every_moe_layer(tiny):
    for gate in (False, True):
        moe = {"shared_gate": gate, "num_shared_experts": 3}
        shared = [block.mlp.shared for block in Transformer(tiny(moe=moe).model).blocks[1:]]
        assert {type(module) for module in shared} == {Gated if gate else SwiGLU}
    assert shared[0].gate.weight.shape == (1, 16) and shared[0].mlp.gate_up.weight.shape == (2 * 3 * 8, 16)


def test_q_lora_rank_0_means_no_query_compression(tiny):
    attention = Transformer(tiny(attention={"q_lora_rank": 0}).model).blocks[0].attention
    assert attention.q_lora_rank is None and attention.q.weight.shape == (2 * (6 + 4), 16)


def test_norm_eps_reaches_the_block_norms_and_never_the_latent_ones(tiny):
    model = Transformer(tiny(model={"norm_eps": 0.01}).model)
    assert model.norm.eps == model.blocks[1].attention_norm.eps == model.blocks[1].mlp_norm.eps == 0.01
    assert model.blocks[1].attention.kv_norm.eps == 1e-6
    gqa = tiny(model={"norm_eps": 0.01}, attention={"kind": "gqa", "qk_norm": True}).model
    attention = Transformer(gqa).blocks[1].attention
    assert attention.q_norm.eps == attention.k_norm.eps == 0.01


@pytest.mark.usefixtures("own_parts")
def test_a_custom_router_gets_the_config_values_it_names_and_its_arguments(tiny, make_model):
    config = tiny(moe={"router": "own_parts:First", "arguments": {"weight": 0.5, "offset": 3}}).model
    model = make_model(config)
    routing = model(draw_tokens(2, 4)).routings[0]
    assert type(model.routers()[0]).__name__ == "First"
    assert routing.experts.eq(torch.tensor([3, 4])).all() and routing.weights.eq(0.5).all()


@pytest.mark.usefixtures("own_parts")
def test_a_router_with_a_tokens_argument_gets_the_token_ids(tiny, make_model):
    tokens = draw_tokens(2, 4)
    model = make_model(tiny(moe={"router": "own_parts:ByToken"}).model)
    caches = model.new_caches(2, 4)
    for out in (model(tokens), model(tokens, caches)):
        assert torch.equal(out.routings[1].experts, torch.stack([tokens % 8, (tokens + 1) % 8], dim=-1))


@pytest.mark.usefixtures("own_parts")
def test_a_custom_attention_is_used(tiny, make_model):
    config = tiny(attention={"kind": "own_parts:Doubled", "arguments": {"factor": 0.0}}).model
    tokens = draw_tokens(1, 6)
    silent = make_model(config)
    torch.testing.assert_close(  # attention adds nothing, so a token's output depends only on that token
        silent(tokens).logits[:, -1:], silent(tokens[:, -1:]).logits, rtol=0, atol=1e-12
    )
    assert make_model(tiny(attention={"kind": "own_parts:Doubled"}).model).blocks[0].attention.factor == 2.0


@pytest.mark.usefixtures("own_parts")
def test_a_custom_attention_gets_the_configured_rope_if_it_takes_one(tiny, recwarn):
    kind = "exercises.projects.sliding_window:SlidingWindowMLA"
    changes = {"rope": {"theta": 77.0, "interleaved": False}, "attention": {"kind": kind, "q_lora_rank": 6}}
    attention = Transformer(tiny(**changes).model).blocks[1].attention
    assert (attention.rope.theta, attention.rope.interleaved) == (77.0, False)
    assert attention.q_lora_rank == 6 and not recwarn
    with pytest.warns(UserWarning, match="own_parts:Doubled takes no rope: model.rope is ignored"):
        own = {"kind": "own_parts:Doubled", "q_lora_rank": 0}
        Transformer(tiny(rope={"theta": 77.0}, attention=own).model)
    with pytest.warns(UserWarning, match="takes no q_lora_rank: model.attention.q_lora_rank 6 is ignored"):
        Transformer(tiny(attention={"kind": "own_parts:Doubled", "q_lora_rank": 6}).model)


@pytest.mark.usefixtures("own_parts")
@pytest.mark.parametrize("section, key", [("moe", "router"), ("attention", "kind")])
@pytest.mark.parametrize(
    "path, said",
    [
        ("nocolon", 'expected a built-in name or "module:Class"'),
        ("", 'expected a built-in name or "module:Class"'),
        ("no_module_of_this_name:X", "no_module_of_this_name cannot be imported"),
        (":X", "cannot be imported"),
        ("os:getcwd", "'getcwd' in os is not an nn.Module class"),
        ("os:nothing", "'nothing' in os is not an nn.Module class"),
        ("own_parts:NotAModule", "'NotAModule' in own_parts is not an nn.Module class"),
        ("own_parts:function", "'function' in own_parts is not an nn.Module class"),
        ("own_parts:", "is not an nn.Module class"),
        ("..own_parts:X", "cannot be imported"),
    ],
)
def test_a_path_that_is_not_a_module_class_is_rejected_and_never_called(tiny, section, key, path, said):
    with pytest.raises(ValueError, match=said) as caught:
        Transformer(tiny(**{section: {key: path}}).model)
    assert f"model.{section}.{key} {path!r}" in str(caught.value)


@pytest.mark.usefixtures("own_parts")
@pytest.mark.parametrize(
    "moe, said",
    [
        (
            {"router": "own_parts:First", "arguments": {"unknown": 1}},
            "model.moe.router own_parts:First: .*unknown",
        ),
        ({"router": "torch.nn:Linear"}, "model.moe.router torch.nn:Linear: .*in_features"),
    ],
)
def test_arguments_that_a_class_does_not_take_are_rejected(tiny, moe, said):
    with pytest.raises(ValueError, match=said):
        Transformer(tiny(moe=moe).model)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"moe": {"num_groups": 8, "top_groups": 4, "top_k": 2}}, "needs 2 a group"),
        ({"moe": {"routed_scaling_factor": 0.0}}, "routed_scaling_factor=0.0 must be positive"),
        ({"attention": {"qk_rope_head_dim": 5}}, "dim=5 must be even"),
        (
            {"attention": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 3}},
            "num_kv_heads=3 does not divide num_heads=4",
        ),
        ({"attention": {"kind": "gqa", "head_dim": 7}}, "dim=7 must be even"),
        ({"rope": {"scaling": "yarn", "beta_fast": 0.5}}, "beta_fast=0.5 is below beta_slow=1.0"),
        (
            {"rope": {"scaling": "llama3", "high_freq_factor": 1}},
            "high_freq_factor=1.0 must be above low_freq_factor=1.0",
        ),
        ({"rope": {"scaling": "yarn", "theta": 1}}, "theta=1.0 must be above 1 for YaRN"),
    ],
)
def test_values_that_a_part_cannot_use_are_rejected_when_built(tiny, changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        Transformer(tiny(**changes).model)
    assert "\n" not in str(caught.value)


def test_the_largest_model_is_built_on_meta_without_memory():
    v3 = {
        "vocab_size": 129280,
        "dim": 7168,
        "num_layers": 61,
        "num_dense_layers": 3,
        "hidden_dim": 18432,
        "attention": {
            "num_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        "moe": {"num_experts": 256, "top_k": 8, "hidden_dim": 2048, "num_groups": 8, "top_groups": 4},
    }
    with torch.device("meta"):
        model = Transformer(Config.from_dict({"model": v3}).model)
    assert sum(parameter.numel() for parameter in model.parameters()) == 671_026_404_352
    assert sum(buffer.numel() for buffer in model.buffers()) == 58 * 256


def test_meta_models_run_on_meta_tokens(tiny):
    with torch.device("meta"):
        model = Transformer(tiny(model={"num_dense_layers": 3}).model)
        assert model(torch.zeros(2, 3, dtype=torch.int64)).logits.shape == (2, 3, 256)


def test_tied_embeddings_are_one_parameter_that_learns_from_both_ends(tiny, make_model):
    model = make_model(tiny(model={"tie_embeddings": True}).model)
    assert model.head.weight is model.embedding.weight
    free = make_model(tiny().model)
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in model.parameters()) == 256 * 16
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    model(tokens).logits[..., 7].sum().backward()
    assert model.embedding.weight.grad[0].abs().sum() > 0  # token 0 is an input
    assert model.embedding.weight.grad[7].abs().sum() > 0  # token 7 is a target
    assert model.embedding.weight.grad[9].abs().sum() == 0


@pytest.mark.parametrize("std", [0.006, 0.02, 0.5])
def test_initialize_draws_every_matrix_with_init_std_and_leaves_norms(tiny, std):
    changes = {"attention": {"qkv_bias": True, "out_bias": True}, "moe": {"hidden_dim": 64}}
    config = tiny(model={"init_std": std, "dim": 64, "vocab_size": 300}, **changes).model
    model = Transformer(config)
    model.initialize(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            error = std / (2 * parameter.numel()) ** 0.5  # standard error of a sample's standard deviation
            assert abs(parameter.std().item() - std) < 5 * error, name
            assert abs(parameter.mean().item()) < 5 * std / parameter.numel() ** 0.5, name
        else:
            assert parameter.eq(0 if name.endswith("bias") else 1).all(), name


def test_initialize_repeats_with_its_seed_alone(tiny):
    weights = []
    for seed, noise in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(noise)
        model = Transformer(tiny(attention={"qkv_bias": True, "out_bias": True}).model)
        model.initialize(torch.Generator().manual_seed(seed))
        weights.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_narrow_model_keeps_selection_biases_in_fp32(tiny, make_model, dtype):
    model = make_model(tiny().model, dtype)
    biases = [router.bias for router in model.routers()]
    assert {bias.dtype for bias in biases} == {torch.float32}
    assert biases[0].unique().numel() == 8
    assert model(draw_tokens(2, 5)).logits.dtype == dtype


PEERS = {
    "v3": {
        "moe": {"num_experts": 8, "top_k": 3, "num_groups": 4, "top_groups": 2, "routed_scaling_factor": 2.5}
    },
    "v2-lite's attention": {"attention": {"q_lora_rank": 0}},
    "one group, two shared": {"moe": {"num_groups": 1, "top_groups": 1, "top_k": 4, "num_shared_experts": 2}},
    "not normalized": {"moe": {"normalize": False}},
    "wide value": {"attention": {"v_head_dim": 12}},
    "tied, half rotation": {
        "model": {"tie_embeddings": True},
        "rope": {"interleaved": False, "theta": 1000.0},
    },
}


@pytest.mark.parametrize("changes", PEERS.values(), ids=PEERS.keys())
def test_logits_equal_those_of_transformers(tiny, make_model, peers, monkeypatch, changes):
    ours = make_model(tiny(**changes).model)
    theirs = peers.deepseek_v3(ours, "eager", "eager").eval()
    tokens = draw_tokens(3, 40)
    with torch.no_grad():
        got, plain = ours(tokens).logits, theirs(tokens).logits
        monkeypatch.setattr(
            torch, "float32", torch.float64
        )  # only the fp32 rounding in transformers' router and norms
        want = theirs(tokens).logits
    assert want.dtype == got.dtype == torch.float64
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()
    assert (got - plain).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("changes", [PEERS["v3"], PEERS["not normalized"]], ids=["v3", "not normalized"])
def test_gradients_equal_those_of_transformers(tiny, make_model, peers, monkeypatch, changes):
    ours = make_model(tiny(**changes).model)
    theirs = peers.deepseek_v3(ours, "eager", "eager").train()
    tokens = draw_tokens(2, 24)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with monkeypatch.context() as patched:
        patched.setattr(torch, "float32", torch.float64)
        theirs_out = theirs(inputs)
    for logits in (ours(inputs).logits, theirs_out.logits):
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    layers = zip(ours.blocks[1:], theirs.model.layers[1:])
    for block, layer in layers:
        for got, want in (
            (block.mlp.experts.gate_up.grad, layer.mlp.experts.gate_up_proj.grad),
            (block.mlp.experts.down.grad, layer.mlp.experts.down_proj.grad),
            (block.mlp.router.weight.grad, layer.mlp.gate.weight.grad),
            (block.attention.kv_b.weight.grad, layer.self_attn.kv_b_proj.weight.grad),
            (block.attention.q_a.weight.grad, layer.self_attn.q_a_proj.weight.grad),
        ):
            assert want.abs().max() > 0
            assert (got - want).abs().max() <= 1e-12 * want.abs().max()


def test_routings_are_returned_and_nothing_is_kept_on_the_modules(tiny, make_model):
    model = make_model(tiny().model)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    out = model(draw_tokens(2, 5))
    assert all(isinstance(routing, Routing) for routing in out.routings)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
