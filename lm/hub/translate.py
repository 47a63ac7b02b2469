"""A Hugging Face config.json and weights as ours, and back, by the tables of families.py."""

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
    MLA,
    NULL,
    Q_NORM,
    ROPE,
    SYNONYMS,
    WHOLE,
    Family,
    has_experts,
    whole_number,
)
from .keys import HARMLESS, MUST, ROPE_HARMLESS

TAILS = {name.ours: name.theirs for name in BLOCK}


def to_ours(raw: dict[str, Any]) -> ModelConfig:
    """The contents of a config.json as our config.

    Raises:
        ValueError: the architecture or an option is not supported, or a key is missing or unknown.
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
    if dense < layers:
        table["moe"] |= family.read_moe(raw)
    else:
        table.pop("moe")
    table["rope"] = read_rope(raw, family)
    return build(ModelConfig, table)


def put(table: dict[str, Any], dotted: str, value: Any) -> None:
    """Set an option by its dotted name: table["a"]["b"] = value for "a.b"."""
    *sections, last = dotted.split(".")
    for section in sections:
        table = table.setdefault(section, {})
    table[last] = value


def value_of(raw: dict[str, Any], key: str, family: Family) -> Any:
    """The value of a key, or what it means when it is null or missing.

    Raises:
        ValueError: the key is missing and has no default.
    """
    if raw.get(key) is not None:
        return raw[key]
    if SYNONYMS.get(key) in raw:
        return raw[SYNONYMS[key]]
    for meaning in (NULL if key in raw else {}, family.default, DEFAULT):
        if key in meaning:
            return meaning[key](raw) if callable(meaning[key]) else meaning[key]
    raise ValueError(f"{key} is missing")


def refuse_unknown(raw: dict[str, Any], family: Family) -> None:
    """Raise ValueError for an option that may change what the model computes and that we do not support."""
    for key, right in {**MUST, **family.must}.items():
        allowed = right if isinstance(right, tuple) else (right,)
        value = raw.get(key, allowed[0])
        by_default = value is None and right is not True  # null is false, so it cannot mean True
        if value not in allowed and not by_default:
            expected = " or ".join("null" if one is None else repr(one) for one in allowed)
            raise ValueError(f"{key} {value!r:.80} is not supported; {expected} is")
    known = {name.theirs for name in family.names} | MUST.keys() | family.must.keys() | HARMLESS
    for key, value in raw.items():
        if key not in known and value is not None:
            raise ValueError(f"{key} {value!r:.80} is unknown and may change what the model computes")
    layout = raw.get("rope_interleave")
    if layout is not None and layout != interleaved(raw, family):
        raise ValueError(f"rope_interleave {layout!r:.80} is not supported here; {not layout} is")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"layer_types {kinds!r:.80}: only full_attention is supported")
    if family.is_mla and raw.get("q_lora_rank") == 0:
        raise ValueError("q_lora_rank 0 is not supported; null is")
    if family.is_mla:  # these keys follow from others
        rope, nope = raw.get("qk_rope_head_dim"), raw.get("qk_nope_head_dim")
        both = rope + nope if isinstance(rope, int) and isinstance(nope, int) else None
        heads = raw.get("num_attention_heads")
        for key, right in {"head_dim": rope, "qk_head_dim": both, "num_key_value_heads": heads}.items():
            if right is not None and raw.get(key) not in (None, right):
                raise ValueError(f"{key} {raw[key]!r:.80} must be {right!r:.80} for this attention")


def num_dense_layers(raw: dict[str, Any], layers: int, family: Family) -> int:
    """The number of dense layers, which must be the first ones.

    Raises:
        ValueError: a dense layer follows one with experts.
    """
    if not family.has_experts or 0 in (raw.get("num_experts"), raw.get("num_local_experts")):
        return layers
    kinds, first = raw.get("mlp_layer_types"), FIRST_DENSE.theirs
    counted = raw.get(first) is not None or first in family.default
    if FIRST_DENSE in family.names or (kinds is None and counted):
        return min(whole_number({first: value_of(raw, first, family)}, first, 0), layers)
    step = whole_number({"decoder_sparse_step": 1, **raw}, "decoder_sparse_step", 1)
    only = raw.get("mlp_only_layers") or []
    for key, value in {"mlp_only_layers": only, "mlp_layer_types": kinds or []}.items():
        if not isinstance(value, list):
            raise ValueError(f"{key} {value!r:.80} is not a list")
    if kinds and (len(kinds) != layers or any(kind not in ("dense", "sparse") for kind in kinds)):
        raise ValueError(f"mlp_layer_types {kinds!r:.80} must be dense or sparse for each of {layers} layers")
    sparse = [kinds[i] == "sparse" if kinds else i not in only and (i + 1) % step == 0 for i in range(layers)]
    dense = sparse.index(True) if True in sparse else layers
    if not all(sparse[dense:]):
        raise ValueError("a dense layer follows a layer with experts; only the first layers may be dense")
    return dense


def read_rope(raw: dict[str, Any], family: Family) -> dict[str, Any]:
    """[model.rope] from the keys of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ValueError(f"rope_scaling {given!r:.80} is not an object")
    theirs = {key: value for key, value in given.items() if value is not None}
    nested = [key for key, value in theirs.items() if isinstance(value, dict | list)]
    if nested:
        raise ValueError(
            f"rope_scaling: {nested[0]!r:.80} is an object; one scaling for all layers is needed"
        )
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
        raise ValueError(f"rope_scaling: factor is missing; {kind} needs it")
    left = theirs.keys() - ROPE_HARMLESS
    if left and kind != "none":
        raise ValueError(f"rope_scaling: {', '.join(sorted(left))} is not supported with {kind}")
    return table


def check_yarn(theirs: dict[str, Any]) -> None:
    """Remove the YaRN options that change nothing; raise ValueError for those that we do not support."""
    for key in ("factor", "mscale", "mscale_all_dim", "attention_factor"):
        value = theirs.get(key, 1)
        if not isinstance(value, int | float) or isinstance(value, bool) or not -1e9 < value < 1e9:
            raise ValueError(f"rope_scaling: {key} {value!r:.80} is not a number between -1e9 and 1e9")
    mscale, of_all = theirs.get("mscale"), theirs.get("mscale_all_dim")
    if bool(mscale) != bool(of_all):
        raise ValueError("rope_scaling: mscale and mscale_all_dim are supported only together")
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
    """Whether RoPE rotates neighbouring columns (else the two halves)."""
    if family.interleaved is not None:
        return family.interleaved
    value = raw.get("rope_interleave", True)
    return False if value is None else value


def to_theirs(config: ModelConfig) -> dict[str, Any]:
    """Our config as the contents of a config.json.

    Raises:
        ValueError: no supported architecture is this model; names the option that differs.
    """
    model_type = nearest_family(config)
    family = FAMILIES[model_type]
    raw: dict[str, Any] = {"architectures": [family.architecture], "model_type": model_type}
    raw |= {"hidden_act": "silu", **{key: value for key, value in family.must.items() if value is not None}}
    for name in family.names:
        section: Any = config
        for word in name.ours.split("."):
            section = getattr(section, word)
        raw[name.theirs] = section
    raw["max_position_embeddings"] = config.max_length or 4096
    raw |= write_rope(config.rope)
    if family.interleaved is None:
        raw["rope_interleave"] = config.rope.interleaved
    if family.is_mla:
        raw |= {"q_lora_rank": raw["q_lora_rank"] or None, "num_key_value_heads": config.attention.num_heads}
    raw |= family.extra_keys(config)
    ours, read = flat(relevant(config)), flat(relevant(to_ours(raw)))
    kinds = ("attention.kind", "moe.router")  # reported first: other differences follow from them
    for option, value in sorted(ours.items(), key=lambda item: item[0] not in kinds):
        if read[option] != value:
            reason = f"{model_type}, the nearest architecture, has {read[option]!r}"
            raise ValueError(f"model.{option} {value!r} cannot be written: {reason}")
    return raw


def nearest_family(config: ModelConfig) -> str:
    """The model_type that a config is written as, if it can be written at all."""
    return [model_type for model_type, family in FAMILIES.items() if family.matches(config)][-1]


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """rope_theta and rope_scaling, which all versions of transformers read."""
    scaling: dict[str, Any] = {key: getattr(rope, ours) for ours, key in ROPE[rope.scaling].items()}
    if not scaling.get("mscale_all_dim", 1):
        del scaling["mscale"], scaling["mscale_all_dim"]
    named = {"type": rope.scaling, "rope_type": rope.scaling, **scaling}
    return {"rope_theta": rope.theta, "rope_scaling": None if rope.scaling == "none" else named}


def relevant(config: ModelConfig) -> ModelConfig:
    """The config with all options that do not change what it computes at their defaults."""
    attention, rope = config.attention, config.rope
    unused = [n.ours for n in (GQA if attention.kind == "mla" else MLA) if n not in BIASES]
    names = [name.removeprefix("attention.") for name in unused]
    defaults = AttentionConfig()
    attention = dataclasses.replace(attention, **{name: getattr(defaults, name) for name in names})
    used = {ours: getattr(rope, ours) for ours in ("theta", "interleaved", "scaling", *ROPE[rope.scaling])}
    rope = RopeConfig(**used)
    changes: dict[str, Any] = {"attention": attention, "rope": rope, "max_length": 0}
    if not has_experts(config):
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
    """One of our tensors as a checkpoint stores it -> its name there, a view of our rows"""
    for name in WHOLE:
        if name.ours == ours:
            yield name.theirs, tensor
            return
    family = FAMILIES[model_type]
    _, layer, rest = ours.split(".", 2)
    if rest == "attention.q_norm.weight":
        theirs = Q_NORM[family.ours["attention.kind"]]
    elif rest in TAILS:
        theirs = TAILS[rest]
    else:
        stem, _, kind = rest.rpartition(".")
        theirs = " ".join(f"{name}.{kind}" for name in TAILS[stem].split())
    if theirs.startswith("mlp."):
        for word, other in family.mlp_words.items():
            theirs = theirs.replace(word, other)
    names = [f"model.layers.{layer}.{name}" for name in theirs.split()]
    if "{e}" in theirs:
        for expert, matrix in enumerate(tensor):
            yield from zip((name.format(e=expert) for name in names), matrix.chunk(len(names)))
    else:
        yield from zip(names, tensor.chunk(len(names)))
