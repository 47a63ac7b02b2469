"""config.json as our config and back: published files, all options of every architecture, hostile edits."""

import dataclasses
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import AttentionConfig, Config, ModelConfig, MoEConfig, RopeConfig
from lm.hub.families import BLOCK, FAMILIES, ROPE, WHOLE
from lm.hub.translate import parts_of, relevant, to_ours, to_theirs
from lm.model import Transformer
from tests.helpers import refused
from tests.lm.hub.folders import REFERENCE
from tests.lm.hub.published import PUBLISHED, V3

MLA = ("deepseek_v3", "kimi_k2", "deepseek_v2", "glm4_moe_lite", "youtu")


def example(kind):
    """The config.json of a tiny checkpoint that transformers wrote."""
    return json.loads((REFERENCE / kind / "config.json").read_text())


# --- published files


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_configs_equal_the_presets(preset):
    ours, wanted = to_ours(PUBLISHED[preset]), Config.preset(preset).model
    wanted = dataclasses.replace(wanted, init_std=0.02)  # the files of V2 and V3 have transformers' default
    assert relevant(ours) == relevant(wanted)
    assert ours.max_length == PUBLISHED[preset]["max_position_embeddings"]


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_written_as_their_architecture(preset):
    kind = PUBLISHED[preset]["model_type"]
    written = to_theirs(Config.preset(preset).model)
    assert written["model_type"] == ("deepseek_v3" if kind == "kimi_k2" else kind)
    assert written["architectures"] == PUBLISHED[preset]["architectures"]
    assert written.get("num_nextn_predict_layers") == (0 if written["model_type"] == "deepseek_v3" else None)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_key_with_one_supported_value_may_state_it_and_nothing_else(kind):
    raw, family = example(kind), FAMILIES[kind]
    single = {"is_causal": True, "use_sliding_window": False, "mlp_bias": False, "moe_layer_freq": 1}
    for key, right in {
        **single,
        **{key: right for key, right in family.must.items() if right in (0, 1)},
    }.items():
        assert to_ours({**raw, key: right}) == to_ours(raw)
        for wrong in (not right, None if right is True else 7, "no", [], {}):
            refused(lambda key=key, wrong=wrong: to_ours({**raw, key: wrong}), key, "is not supported")


# --- round trips


def options(config):
    """All options of a config by their dotted names."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{field.name}.{name}", inner) for name, inner in options(value))
        else:
            yield field.name, value


sizes, some = st.integers(1, 300), st.integers(1, 6)
numbers = st.floats(1e-3, 1e3)


@st.composite
def ropes(draw, interleaved):
    scaling = draw(st.sampled_from(list(ROPE)))
    more = {}
    if scaling != "none":
        more["factor"] = draw(st.floats(1, 100))
    if scaling in ("yarn", "llama3"):
        more["original_context"] = draw(sizes)
    if scaling == "yarn":
        more |= {"beta_fast": draw(numbers), "beta_slow": draw(numbers)}
        if draw(st.booleans()):
            more |= {"mscale": draw(numbers), "mscale_all_dim": draw(numbers)}
    if scaling == "llama3":
        more |= {"low_freq_factor": draw(numbers), "high_freq_factor": draw(numbers)}
    return RopeConfig(theta=draw(st.floats(1, 1e7)), interleaved=interleaved, scaling=scaling, **more)


@st.composite
def configs(draw, kind):
    """Any config that an architecture can have; options it does not use stay at their defaults."""
    dense_only = kind in ("youtu", "llama", "qwen2", "qwen3")
    layers = draw(some)
    dense = layers if dense_only else 0 if kind == "mixtral" else draw(st.integers(0, layers - 1))
    heads = draw(some)
    if kind in MLA:
        bias = draw(st.booleans())
        attention = AttentionConfig(
            num_heads=heads,
            q_lora_rank=draw(st.integers(0, 9)),
            kv_lora_rank=draw(sizes),
            qk_nope_head_dim=draw(sizes),
            qk_rope_head_dim=draw(sizes) + 1,
            v_head_dim=draw(sizes),
            qkv_bias=bias,
            out_bias=bias,
        )
        rope = draw(ropes(True if kind == "deepseek_v2" else draw(st.booleans())))
    else:
        bias = draw(st.booleans())
        attention = AttentionConfig(
            kind="gqa",
            num_heads=heads,
            num_kv_heads=draw(some),
            head_dim=draw(sizes) + 1,
            qkv_bias=True if kind == "qwen2" else False if kind == "mixtral" else bias,
            out_bias=bias if kind in ("llama", "qwen3", "qwen3_moe") else False,
            qk_norm=kind in ("qwen3", "qwen3_moe"),
        )
        rope = draw(ropes(False))
    moe = MoEConfig()
    if not dense_only:
        groups = draw(some) if kind in MLA else 1
        kept = draw(st.integers(1, groups))
        each = draw(some)
        shared = draw(some) if kind == "qwen2_moe" else draw(st.integers(0, 3)) if kind in MLA else 0
        moe = MoEConfig(
            router="sigmoid" if kind in MLA and kind != "deepseek_v2" else "softmax",
            num_experts=groups * each,
            top_k=draw(st.integers(1, each * kept)),
            hidden_dim=draw(sizes),
            num_groups=groups,
            top_groups=kept,
            num_shared_experts=shared,
            shared_gate=kind == "qwen2_moe",
            normalize={"deepseek_v2": False, "mixtral": True}.get(kind, draw(st.booleans())),
            routed_scaling_factor=draw(numbers) if kind in MLA else 1.0,
        )
    return ModelConfig(
        vocab_size=draw(sizes),
        dim=draw(sizes),
        num_layers=layers,
        num_dense_layers=dense,
        hidden_dim=moe.hidden_dim if kind == "mixtral" else draw(sizes),
        norm_eps=draw(st.floats(0, 1e-2)),
        tie_embeddings=draw(st.booleans()),
        init_std=draw(st.floats(1e-4, 1)),
        max_length=draw(sizes),
        attention=attention,
        rope=rope,
        moe=moe,
    )


@pytest.mark.parametrize("kind", FAMILIES)
@settings(max_examples=60)
@given(data=st.data())
def test_a_written_config_is_read_back_unchanged(kind, data):
    config = data.draw(configs(kind))
    written = json.loads(json.dumps(to_theirs(config), allow_nan=False))
    meant = {"kimi_k2": "deepseek_v3", "glm4_moe_lite": "deepseek_v3", "youtu": "deepseek_v3"}.get(kind, kind)
    assert written["model_type"] == meant
    found, wanted = dict(options(to_ours(written))), dict(options(config))
    assert found == wanted


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_config_of_transformers_survives_a_round_trip(kind):
    config = to_ours(example(kind))
    assert to_ours(to_theirs(config)) == config


def other_value(kind, key, value):
    """A different value of a key, and the other keys that must change with it."""
    if key == "first_k_dense_replace":
        return 0, {}
    if key == "num_hidden_layers":
        return value + 1, {"layer_types": None, "mlp_layer_types": None}
    if key == "n_group":
        return 2, {"topk_group": 2, "topk_method": None if kind != "deepseek_v2" else "group_limited_greedy"}
    if key == "topk_group":
        return 3, {"n_group": 3}  # of 12 experts
    if key == "num_experts_per_tok":
        return value + 1, {"n_group": 1, "topk_group": 1} if kind in MLA else {}
    if key == "num_attention_heads" and kind in MLA:
        return value * 2, {"num_key_value_heads": value * 2}
    if key in ("qk_rope_head_dim", "qk_nope_head_dim"):
        return value * 2, {"head_dim": None, "qk_head_dim": None}
    if key == "moe_intermediate_size" and kind == "qwen2_moe":
        return value * 2, {"shared_expert_intermediate_size": value * 4}
    return not value if isinstance(value, bool) else value * 2 or 1, {}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_row_of_a_family_is_read(kind):
    """Changing a key that a family's table names changes our option in the same row."""
    raw = example(kind)
    before = dict(options(to_ours(raw)))
    for name in FAMILIES[kind].names:
        if kind == "deepseek_v2" and name.theirs == "norm_topk_prob":
            continue  # rejected if true
        other, along = other_value(kind, name.theirs, before[name.ours])
        found = dict(options(to_ours({**raw, **along, name.theirs: other})))
        assert found[name.ours] == other != before[name.ours], name


@pytest.mark.parametrize("kind", [kind for kind, table in ROPE.items() if table])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama"])
def test_every_row_of_a_rope_scaling_is_read_under_both_names(kind, model_type):
    raw = {key: value for key, value in example(model_type).items() if key != "rope_parameters"}
    theirs = {key: 3.0 + number for number, key in enumerate(ROPE[kind].values())}
    for key in ("beta_fast", "high_freq_factor", "original_max_position_embeddings"):
        theirs |= {key: 64} if key in theirs else {}
    wanted = {ours: theirs[key] for ours, key in ROPE[kind].items()} | {"scaling": kind, "theta": 77.0}
    for spelled in (
        {"rope_theta": 77, "rope_scaling": {"type": kind, **theirs}},
        {"rope_theta": 77, "rope_scaling": {"rope_type": kind, **theirs}},
        {"rope_theta": 77, "rope_scaling": {"rope_type": kind, "type": kind, **theirs}},
        {"rope_parameters": {"rope_type": kind, "rope_theta": 77, **theirs}},
        {"rope_theta": 5, "rope_parameters": {"rope_type": kind, "rope_theta": 77, **theirs}},
    ):
        rope = to_ours({**raw, **spelled}).rope
        assert {ours: getattr(rope, ours) for ours in wanted} == wanted
    for spelled in ({"rope_theta": 77}, {"rope_theta": 77, "rope_scaling": None}):
        rope = to_ours({**raw, **spelled}).rope
        assert (rope.scaling, rope.theta) == ("none", 77.0)


def test_yarn_without_original_length_uses_the_maximum_length():
    raw = {**V3, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    rope = to_ours(raw).rope
    assert rope.original_context == 163840
    # as transformers and the authors: without mscale, cos and sin are scaled and the softmax is not
    assert (rope.beta_fast, rope.beta_slow, rope.mscale, rope.mscale_all_dim) == (32.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_an_attention_factor_equal_to_the_default_is_accepted(model_type):
    raw, log = example(model_type), 0.1 * math.log(40.0)
    for mscales, factor in (
        ({}, log + 1),
        ({"mscale": 1.5, "mscale_all_dim": 0.5}, (1.5 * log + 1) / (0.5 * log + 1)),
    ):
        scaling = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 8, **mscales}
        plain = {**raw, "rope_parameters": {**scaling, "rope_theta": 100.0}}
        said = {**raw, "rope_parameters": {**scaling, "rope_theta": 100.0, "attention_factor": factor}}
        assert to_ours(said) == to_ours(plain)
        said["rope_parameters"]["attention_factor"] = factor * 1.001
        with pytest.raises(ValueError, match="attention_factor"):
            to_ours(said)


def test_greedy_v2_ignores_its_group_options():
    raw = example("deepseek_v2")
    assert (raw["n_group"], raw["topk_group"]) == (4, 1)
    moe = to_ours({**raw, "topk_method": "greedy"}).moe
    assert (moe.num_groups, moe.top_groups) == (1, 1)
    assert to_ours({**raw, "topk_method": "greedy", "n_group": None, "topk_group": None}).moe == moe
    assert to_ours({key: value for key, value in raw.items() if key != "topk_method"}).moe == moe


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in MLA])
def test_without_a_number_of_key_heads_every_head_has_its_own(kind):
    raw = {**example(kind), "num_key_value_heads": None}
    assert to_ours(raw).attention.num_kv_heads == raw["num_attention_heads"]


def test_llama_has_a_key_per_head_by_default():
    raw = {key: value for key, value in example("llama").items() if key != "num_key_value_heads"}
    for said in ({}, {"num_key_value_heads": None}):
        assert to_ours({**raw, **said}).attention.num_kv_heads == raw["num_attention_heads"] == 4
    assert to_ours({**raw, "head_dim": None, "hidden_size": 24}).attention.head_dim == 6


# --- models that have no architecture


def changed(config, **changes):
    """A config with changes by dotted name, with `__` for the dot."""
    sections = {}
    for dotted, value in changes.items():
        section, _, name = dotted.rpartition("__")
        sections.setdefault(section, {})[name] = value
    whole = sections.pop("", {})
    whole |= {name: dataclasses.replace(getattr(config, name), **inner) for name, inner in sections.items()}
    return dataclasses.replace(config, **whole)


FOREIGN = [  # an architecture, a change that it does not have, the option that the error names
    ("deepseek_v3", {"moe__router": "moe:SigmoidRouter"}, "moe.router"),
    ("deepseek_v3", {"attention__kind": "mla:MultiheadLatentAttention"}, "attention.kind"),
    ("deepseek_v3", {"attention__out_bias": False}, "attention.qkv_bias|attention.out_bias"),
    ("deepseek_v3", {"attention__qkv_bias": False}, "attention.qkv_bias|attention.out_bias"),
    ("deepseek_v3", {"moe__shared_gate": True}, "moe.shared_gate"),
    ("deepseek_v3", {"rope__mscale_all_dim": 0.0, "rope__mscale": 2.0}, "mscale"),
    ("deepseek_v3", {"rope__mscale": 0.0}, "mscale"),
    ("deepseek_v3", {"moe__arguments": {"a": 1}}, "moe.arguments"),
    ("deepseek_v2", {"rope__interleaved": False}, "rope.interleaved"),
    ("deepseek_v2", {"moe__normalize": True}, "moe.normalize|norm_topk_prob"),
    ("llama", {"rope__interleaved": True}, "rope.interleaved"),
    ("llama", {"attention__qkv_bias": False}, "attention.qkv_bias|attention.out_bias"),
    ("qwen2", {"rope__interleaved": True}, "rope.interleaved"),
    ("qwen3", {"attention__qkv_bias": True}, "attention.qkv_bias|attention.out_bias"),
    ("mixtral", {"moe__router": "sigmoid"}, "moe.router"),
    ("mixtral", {"moe__normalize": False}, "moe.normalize"),
    ("mixtral", {"moe__num_shared_experts": 1}, "moe.num_shared_experts"),
    ("mixtral", {"moe__routed_scaling_factor": 2.5}, "moe.routed_scaling_factor"),
    ("mixtral", {"moe__num_groups": 5, "moe__top_groups": 2}, "moe.num_groups|moe.top_groups"),
    ("mixtral", {"num_dense_layers": 1}, "num_dense_layers"),
    ("mixtral", {"attention__qkv_bias": True}, "attention.qkv_bias"),
    ("qwen2_moe", {"attention__out_bias": True}, "attention.out_bias"),
    ("qwen2_moe", {"moe__routed_scaling_factor": 2.5}, "moe.routed_scaling_factor"),
    ("qwen3_moe", {"moe__num_shared_experts": 1}, "moe.num_shared_experts"),
    ("qwen3_moe", {"attention__qkv_bias": True}, "attention.qkv_bias|attention.out_bias"),
    ("qwen3_moe", {"moe__router": "sigmoid"}, "moe.router"),
]


@pytest.mark.parametrize("kind, changes, option", FOREIGN, ids=str)
def test_a_model_that_fits_no_architecture_is_rejected_by_option(kind, changes, option):
    config = changed(to_ours(example(kind)), **changes)
    message = refused(lambda: to_theirs(config))
    assert re.search(option, message) and len(message) < 300


def test_unused_options_do_not_prevent_export():
    dense = to_ours(example("youtu"))
    assert to_theirs(changed(dense, moe__router="softmax"))["model_type"] == "deepseek_v3"
    assert to_ours(to_theirs(changed(dense, moe__router="no.such:Router", moe__shared_gate=True))) == dense
    gqa = to_ours(example("llama"))
    found = to_ours(to_theirs(changed(gqa, attention__q_lora_rank=7, attention__kv_lora_rank=7)))
    assert found == gqa
    mixtral = to_ours(example("mixtral"))
    assert to_ours(to_theirs(changed(mixtral, hidden_dim=999))) == mixtral
    plain = to_ours(example("youtu"))
    assert to_ours(to_theirs(changed(plain, rope__factor=7.0, rope__beta_fast=9.0))) == plain


# --- names of weights


def small(kind, **changes):
    with torch.device("meta"):
        return Transformer(changed(to_ours(example(kind)), **changes))


def test_every_row_of_the_weight_table_is_used():
    used = set()
    for kind in FAMILIES:
        bias = {"attention__qkv_bias": True, "attention__out_bias": True}
        variants = [{}, bias, {"attention__q_lora_rank": 0}, {"attention__q_lora_rank": 3}]
        for changes in variants if kind in MLA else variants[:2]:
            model = small(kind, **changes)
            for ours in model.state_dict():
                rest = ours.split(".", 2)[2] if ours.startswith("blocks.") else ours
                used |= {rest, rest.rpartition(".")[0]}
    for name in [*WHOLE, *BLOCK]:
        assert name.ours in used, name
    assert "attention.q_norm.weight" in used


@pytest.mark.parametrize("kind", FAMILIES)
def test_names_and_shapes_equal_transformers(kind):
    from safetensors import safe_open

    model = small(kind)
    found = {
        name: tuple(view.shape)
        for ours, tensor in model.state_dict().items()
        if not (model.config.tie_embeddings and ours == "head.weight")
        for name, view in parts_of(ours, tensor, kind)
    }
    with safe_open(REFERENCE / kind / "model.safetensors", framework="pt") as file:
        assert found == {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_parts_are_views_in_row_order():
    tensor = torch.arange(24.0).reshape(6, 4)
    parts = dict(parts_of("blocks.7.mlp.gate_up.weight", tensor, "llama"))
    assert list(parts) == ["model.layers.7.mlp.gate_proj.weight", "model.layers.7.mlp.up_proj.weight"]
    assert torch.equal(torch.cat(list(parts.values())), tensor)
    next(iter(parts.values()))[0, 0] = -1
    assert tensor[0, 0] == -1
    experts = torch.arange(24.0).reshape(2, 4, 3)
    parts = dict(parts_of("blocks.0.mlp.experts.gate_up", experts, "mixtral"))
    assert {name: int(view[0, 0]) for name, view in parts.items()} == {
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": 0,
        "model.layers.0.block_sparse_moe.experts.0.w3.weight": 6,
        "model.layers.0.block_sparse_moe.experts.1.w1.weight": 12,
        "model.layers.0.block_sparse_moe.experts.1.w3.weight": 18,
    }


# --- which layers have experts

LAYERS = [  # an architecture, its keys, how many of 4 layers are dense; None: rejected
    ("qwen3_moe", {"mlp_only_layers": []}, 0),
    ("qwen3_moe", {"mlp_only_layers": [0, 1]}, 2),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, 4),
    ("qwen3_moe", {"mlp_only_layers": [1]}, None),
    ("qwen3_moe", {"mlp_only_layers": [0, 2]}, None),
    ("qwen3_moe", {"mlp_only_layers": None, "decoder_sparse_step": 1}, 0),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}, None),
    ("qwen3_moe", {"decoder_sparse_step": 4, "mlp_only_layers": []}, 3),
    ("qwen3_moe", {"decoder_sparse_step": 9, "mlp_only_layers": []}, 4),
    ("qwen3_moe", {"num_experts": 0}, 4),
    ("deepseek_v3", {"first_k_dense_replace": 0}, 0),
    ("deepseek_v3", {"first_k_dense_replace": 3}, 3),
    ("deepseek_v3", {"first_k_dense_replace": 9}, 4),
    ("glm4_moe_lite", {}, 1),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}, 2),
    ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "sparse", "sparse", "sparse"]}, 0),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}, None),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse"]}, None),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense", "thin", "sparse", "sparse"]}, None),
    ("mixtral", {}, 0),
    ("llama", {}, 4),
]


@pytest.mark.parametrize("kind, changes, dense", LAYERS, ids=str)
def test_dense_layers_are_the_first_ones(kind, changes, dense):
    raw = {**example(kind), "num_hidden_layers": 4, "layer_types": None}
    raw.pop("mlp_layer_types", None)
    if dense is None:
        with pytest.raises(ValueError, match="layer"):
            to_ours({**raw, **changes})
    else:
        assert to_ours({**raw, **changes}).num_dense_layers == dense


# --- hostile configs

JUNK = (
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            1,
            2,
            3,
            -1,
            7,
            10**9,
            10**18,
            10**400,
            1e308,
            0.5,
            "",
            "48",
            "yarn",
            "silu",
            "dense",
        ]
    )
    | st.integers(-3, 12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3)
    | st.recursive(
        st.sampled_from([0, 1, "sparse", "dense", "full_attention", None]),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["factor", "rope_type"]), inner)
        ),
        max_leaves=5,
    )
)
EXTRA = (
    *("decoder_sparse_step", "mlp_only_layers", "mlp_layer_types", "layer_types", "num_local_experts"),
    *("rope_theta", "rope_scaling", "head_dim", "qk_head_dim", "topk_method", "scoring_func"),
    *("sliding_window", "magic", "first_k_dense_replace", "shared_expert_intermediate_size"),
)


@pytest.mark.parametrize("kind", FAMILIES)
@settings(max_examples=250)
@given(data=st.data())
def test_any_edited_config_is_read_or_a_one_line_error(kind, data):
    raw = example(kind)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted({*raw, *EXTRA})))
        if data.draw(st.booleans()) and key in raw:
            del raw[key]
        else:
            raw[key] = data.draw(JUNK)
    if isinstance(raw.get("rope_parameters"), dict) and data.draw(st.booleans()):
        raw["rope_parameters"][
            data.draw(st.sampled_from(sorted({*raw["rope_parameters"], "attention_factor"})))
        ] = data.draw(JUNK)
    try:
        config = to_ours(raw)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert isinstance(config, ModelConfig) and config.num_layers == raw["num_hidden_layers"]


@pytest.mark.long
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "kimi_k2"])
def test_a_missing_key_means_what_it_means_to_transformers(kind):
    """Or it is an error: nothing is guessed."""
    from transformers import AutoConfig

    raw, required = example(kind), []
    for key in sorted({*raw} - {"model_type"} - ({"num_key_value_heads"} if kind in MLA else set())):
        without = {name: value for name, value in raw.items() if name != key}
        try:
            ours = to_ours(without)
        except ValueError:
            required.append(key)
            continue
        theirs = json.loads(AutoConfig.for_model(**without).to_json_string())
        found, meant = dict(options(ours)), dict(options(to_ours(theirs)))
        assert {**found, "init_std": 0} == {**meant, "init_std": 0}, key  # only for new weights
    assert {"hidden_size", "vocab_size", "num_hidden_layers"} <= set(required)
