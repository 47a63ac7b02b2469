"""A Hugging Face config.json and weights in our words, and back, along the tables of names.py."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig, build
from .families import (
    BIASES,
    BLOCK,
    DEFAULT,
    FAMILIES,
    FIRST_DENSE,
    GQA,
    HARMLESS,
    MIXTRAL,
    MLA,
    MUST,
    NULL,
    Q_NORM,
    ROPE,
    WHOLE,
    Family,
)

TAILS = {name.ours: name.theirs for name in BLOCK}


def to_ours(raw: dict[str, Any]) -> ModelConfig:
    """A config.json's object as our config.

    Raises:
        ValueError: an architecture or option that is not supported, or a key that is missing or unknown.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r:.80} is not supported; {', '.join(FAMILIES)} are")
    family = FAMILIES[model_type]
    refuse_unknown(raw, family)
    table: dict[str, Any] = {}
    for name in family.names:
        put(table, name.ours, value_of(raw, name.theirs, family))
    for ours, value in family.ours.items():
        put(table, ours, value)
    layers = whole_number(raw, "num_hidden_layers", 1, 1000)
    dense = num_dense_layers(raw, layers, family)
    put(table, "num_dense_layers", dense)
    if model_type == "deepseek_v2" and (raw.get("topk_method") or "greedy") == "greedy":
        table["moe"] |= {"num_groups": 1, "top_groups": 1}
    if model_type == "qwen2_moe" and dense < layers:
        key = "shared_expert_intermediate_size"
        width, one = whole_number({key: 5632, **raw}, key, 1), whole_number(raw, "moe_intermediate_size", 1)
        if width % one:
            raise ValueError(f"{key} {width} is no multiple of moe_intermediate_size {one}")
        table["moe"]["num_shared_experts"] = width // one
    if dense == layers:
        table.pop("moe", None)
    table["rope"] = read_rope(raw, family)
    return build(ModelConfig, table)


def put(table: dict[str, Any], dotted: str, value: Any) -> None:
    """table["a"]["b"] = value, for "a.b" """
    *sections, last = dotted.split(".")
    for section in sections:
        table = table.setdefault(section, {})
    table[last] = value


def value_of(raw: dict[str, Any], key: str, family: Family) -> Any:
    """What a config.json says, or means by saying nothing or null; nothing is guessed."""
    if raw.get(key) is not None:
        return raw[key]
    if key == "num_experts" and "num_local_experts" in raw:
        return raw["num_local_experts"]
    if key == "num_key_value_heads" and (key in raw or key in family.default):
        return raw.get("num_attention_heads")
    if key in NULL and key in raw:
        return NULL[key]
    if key in family.default or key in DEFAULT:
        return family.default.get(key, DEFAULT.get(key))
    if key == "head_dim":
        return whole_number(raw, "hidden_size", 1) // whole_number(raw, "num_attention_heads", 1)
    raise ValueError(f"lacks {key}")


def whole_number(raw: dict[str, Any], key: str, least: int, most: int = 2**31 - 1) -> int:
    """raw[key], or ValueError unless it is a whole number in least..most."""
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{key} {value!r:.80} is not a whole number in {least}..{most}")
    return value


def refuse_unknown(raw: dict[str, Any], family: Family) -> None:
    """Raise ValueError for an option that would change what the model computes and that we do not have."""
    for key, right in {**MUST, **family.must}.items():
        value = raw.get(key)
        allowed = ("greedy", "group_limited_greedy") if right == "group-limited" else (right,)
        if value is not None and value not in allowed:
            raise ValueError(f"{key} {value!r:.80} is not supported; {right!r} is")
    known = {name.theirs for name in family.names} | MUST.keys() | family.must.keys() | HARMLESS
    for key, value in raw.items():
        if key not in known and value not in (None, False, 0, "", [], {}):
            raise ValueError(f"{key} {value!r:.80} is not known here, and may change what the model computes")
    layout = raw.get("rope_interleave")
    if layout is not None and layout != interleaved(raw, family):
        raise ValueError(f"rope_interleave {layout!r:.80} is not supported here; {not layout} is")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"layer_types {kinds!r:.80}: only full_attention is supported")
    if family.ours["attention.kind"] == "mla":
        rope, nope = raw.get("qk_rope_head_dim"), raw.get("qk_nope_head_dim")
        both = rope + nope if isinstance(rope, int) and isinstance(nope, int) else None
        heads = raw.get("num_attention_heads")
        for key, right in {"head_dim": rope, "qk_head_dim": both, "num_key_value_heads": heads}.items():
            if right is not None and raw.get(key) not in (None, right):
                raise ValueError(f"{key} {raw[key]!r:.80}: for this attention it must be {right!r:.80}")


def num_dense_layers(raw: dict[str, Any], layers: int, family: Family) -> int:
    """How many layers, the first ones, have a plain MLP.

    Raises:
        ValueError: dense layers stand elsewhere too.
    """
    has_experts = any(name.ours == "moe.num_experts" for name in family.names)
    if not has_experts or 0 in (raw.get("num_experts"), raw.get("num_local_experts")):
        return layers
    kinds, first = raw.get("mlp_layer_types"), FIRST_DENSE.theirs
    if FIRST_DENSE in family.names or (kinds is None and raw.get(first) is not None):
        return min(whole_number({first: value_of(raw, first, family)}, first, 0), layers)
    if kinds is None and raw["model_type"] == "glm4_moe_lite":
        return 1
    step = whole_number({"decoder_sparse_step": 1, **raw}, "decoder_sparse_step", 1)
    only = raw.get("mlp_only_layers") or []
    for key, value in {"mlp_only_layers": only, "mlp_layer_types": kinds or []}.items():
        if not isinstance(value, list):
            raise ValueError(f"{key} {value!r:.80} is not a list")
    if kinds and (len(kinds) != layers or any(kind not in ("dense", "sparse") for kind in kinds)):
        raise ValueError(f"mlp_layer_types {kinds!r:.80} must say dense or sparse of all {layers} layers")
    sparse = [
        kinds[i] == "sparse" if kinds else i not in only and (i + 1) % step == 0 for i in range(layers)
    ]
    dense = sparse.index(True) if True in sparse else layers
    if not all(sparse[dense:]):
        raise ValueError("a layer without experts stands behind one with them; only first layers may")
    return dense


def read_rope(raw: dict[str, Any], family: Family) -> dict[str, Any]:
    """Our [model.rope] from theirs, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ValueError(f"rope_scaling {given!r:.80} is not an object")
    theirs = {key: value for key, value in given.items() if value is not None}
    nested = [key for key, value in theirs.items() if isinstance(value, dict | list)]
    if nested:
        raise ValueError(f"rope_scaling: {nested[0]!r:.80} holds more than one; one for all is supported")
    theta = theirs.pop("rope_theta", raw.get("rope_theta"))
    old = theirs.pop("type", "default")
    kind = theirs.pop("rope_type", old)
    if theirs.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("rope_parameters: partial_rotary_factor other than 1 is not supported")
    kind = "none" if kind == "default" else kind
    if kind not in ROPE:
        raise ValueError(f"rope_type {kind!r:.80} is not supported; default, {', '.join([*ROPE][1:])} are")
    table: dict[str, Any] = {"scaling": kind, "interleaved": interleaved(raw, family)}
    if theta is not None or "rope_theta" in family.default:
        table["theta"] = family.default.get("rope_theta") if theta is None else theta
    if kind in ("yarn", "llama3"):
        theirs.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    if kind == "yarn":
        check_yarn(theirs)
    for ours, key in ROPE[kind].items():
        if key in theirs:
            table[ours] = theirs.pop(key)
    if "factor" in ROPE[kind] and "factor" not in table:
        raise ValueError(f"rope_scaling: {kind} lacks its factor")
    left = {key: value for key, value in theirs.items() if value and kind != "none"}
    if left:
        raise ValueError(f"rope_scaling: {', '.join(left)} is not supported with {kind}")
    return table


def check_yarn(theirs: dict[str, Any]) -> None:
    """Leave of YaRN's options those that we have; raise ValueError for one that says something else."""
    for key in ("factor", "mscale", "mscale_all_dim", "attention_factor"):
        value = theirs.get(key, 1)
        if not isinstance(value, int | float) or isinstance(value, bool) or not -1e9 < value < 1e9:
            raise ValueError(f"rope_scaling: {key} {value!r:.80} is not a number, or beyond any sense")
    mscale, of_all = theirs.get("mscale"), theirs.get("mscale_all_dim")
    if bool(mscale) != bool(of_all):
        raise ValueError("rope_scaling: mscale and mscale_all_dim are supported together or not at all")
    if not mscale:
        theirs.pop("mscale", None)
        theirs.pop("mscale_all_dim", None)
    if theirs.pop("truncate", True) is not True:
        raise ValueError("rope_scaling: truncate false is not supported")
    factor = theirs.get("factor")
    if "attention_factor" in theirs and factor is not None and factor >= 1:
        log = 0.1 * math.log(factor)
        meant = (log * mscale + 1) / (log * of_all + 1) if mscale and of_all else log + 1
        if not math.isclose(theirs.pop("attention_factor"), meant, rel_tol=1e-6):
            raise ValueError(f"rope_scaling: attention_factor other than {meant:.6g} is not supported")


def interleaved(raw: dict[str, Any], family: Family) -> bool:
    """Which layout: V2 has no choice, V3 and its kin have one, the others have the halves."""
    if "rope_interleave" in family.default:
        value = raw.get("rope_interleave")
        return True if value is None else value
    return family.ours["attention.kind"] == "mla"


def to_theirs(config: ModelConfig) -> dict[str, Any]:
    """Our config as a config.json's object.

    Raises:
        ValueError: no architecture of theirs is this model; names the option that stands in the way.
    """
    model_type = nearest_family(config)
    family = FAMILIES[model_type]
    raw: dict[str, Any] = {"architectures": [family.architecture], "model_type": model_type}
    raw |= {"hidden_act": "silu", **{k: v for k, v in family.must.items() if v is not None}}
    for name in family.names:
        section: Any = config
        for word in name.ours.split("."):
            section = getattr(section, word)
        raw[name.theirs] = section
    raw["max_position_embeddings"] = config.max_length or 4096
    raw |= write_rope(config.rope)
    if "rope_interleave" in family.default:
        raw["rope_interleave"] = config.rope.interleaved
    if "q_lora_rank" in raw:
        raw["q_lora_rank"] = raw["q_lora_rank"] or None
    if family.ours["attention.kind"] == "mla":
        raw["num_key_value_heads"] = config.attention.num_heads
    if model_type == "deepseek_v2":
        raw["topk_method"] = "greedy" if config.moe.num_groups == 1 else "group_limited_greedy"
    if model_type == "deepseek_v3":
        raw["num_nextn_predict_layers"] = 0
    if model_type in ("qwen2_moe", "qwen3_moe"):
        raw["mlp_only_layers"] = list(range(config.num_dense_layers))
    if model_type == "qwen2_moe":
        raw["shared_expert_intermediate_size"] = config.moe.num_shared_experts * config.moe.hidden_dim
    ours, read = flat(relevant(config)), flat(relevant(to_ours(raw)))
    kinds = ("attention.kind", "moe.router")  # where these differ, others do as a consequence
    for option, value in sorted(ours.items(), key=lambda item: item[0] not in kinds):
        if read[option] != value:
            other = read[option]
            raise ValueError(f"model.{option} {value!r} has no word in {model_type}; there it is {other!r}")
    return raw


def nearest_family(config: ModelConfig) -> str:
    """The architecture of theirs that a config may be."""
    attention, moe = config.attention, config.moe
    experts = config.num_dense_layers < config.num_layers
    if attention.kind == "mla":
        return "deepseek_v2" if experts and moe.router == "softmax" else "deepseek_v3"
    if experts:
        return "qwen3_moe" if attention.qk_norm else "qwen2_moe" if moe.shared_gate else "mixtral"
    if attention.qk_norm:
        return "qwen3"
    return "qwen2" if attention.qkv_bias and not attention.out_bias else "llama"


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Their rope_theta and rope_scaling, as every version reads them."""
    scaling: dict[str, Any] = {key: getattr(rope, ours) for ours, key in ROPE[rope.scaling].items()}
    if not scaling.get("mscale_all_dim", 1):
        del scaling["mscale"], scaling["mscale_all_dim"]
    named = {"type": rope.scaling, "rope_type": rope.scaling, **scaling}
    return {"rope_theta": rope.theta, "rope_scaling": None if rope.scaling == "none" else named}


def relevant(config: ModelConfig) -> ModelConfig:
    """The config with what it does not use, and what computes nothing, at its defaults."""
    attention, rope = config.attention, config.rope
    unused = [n.ours for n in (GQA if attention.kind == "mla" else MLA) if n not in BIASES]
    names = [name.removeprefix("attention.") for name in unused]
    defaults = AttentionConfig()
    attention = dataclasses.replace(attention, **{name: getattr(defaults, name) for name in names})
    used = {ours: getattr(rope, ours) for ours in ("theta", "interleaved", "scaling", *ROPE[rope.scaling])}
    rope = RopeConfig(**used)
    changes: dict[str, Any] = {"attention": attention, "rope": rope, "max_length": 0}
    if config.num_dense_layers == config.num_layers:
        changes["moe"] = MoEConfig()
    elif config.num_dense_layers == 0:
        changes["hidden_dim"] = 1
    return dataclasses.replace(config, **changes)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """All options of a config by their dotted names."""
    found: dict[str, Any] = {}
    for option in dataclasses.fields(config):
        value, name = getattr(config, option.name), prefix + option.name
        found |= flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def parts_of(ours: str, tensor: Tensor, model_type: str) -> Iterator[tuple[str, Tensor]]:
    """One of our tensors as a checkpoint has it -> their name, the rows of ours that it is"""
    for name in WHOLE:
        if name.ours == ours:
            yield name.theirs, tensor
            return
    _, layer, rest = ours.split(".", 2)
    if rest == "attention.q_norm.weight":
        theirs = Q_NORM["gqa" if FAMILIES[model_type].ours["attention.kind"] == "gqa" else "mla"]
    elif rest in TAILS:
        theirs = TAILS[rest]
    else:
        stem, _, kind = rest.rpartition(".")
        theirs = " ".join(f"{name}.{kind}" for name in TAILS[stem].split())
    if model_type == "mixtral" and theirs.startswith("mlp."):
        for word, other in MIXTRAL.items():
            theirs = theirs.replace(word, other)
    names = [f"model.layers.{layer}.{name}" for name in theirs.split()]
    if "{e}" in theirs:
        for expert, matrix in enumerate(tensor):
            yield from zip((name.format(e=expert) for name in names), matrix.chunk(len(names)))
    else:
        yield from zip(names, tensor.chunk(len(names)))
