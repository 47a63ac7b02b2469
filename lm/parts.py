"""Build the parts that a config names; no other module passes a config to a part.

A built-in name stands for a class, as "package.module:Class" does: a new kind is one entry in one of the two
tables below. torch is imported when a part is built: counting needs only the tables.
"""

import copy
import dataclasses
import importlib
import inspect
import os
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import AttentionConfig, MoEConfig, RopeConfig, nearest

if TYPE_CHECKING:
    from torch import nn

    from mla import RotaryEmbedding
    from moe import MoE, Routing

FP8_BLOCK = 128  # numbers of an fp8 latent that share one fp32 scale


class AttentionCounts(NamedTuple):
    """The counts of one layer's attention."""

    weights: int  # in matrices
    biases: int
    norms: int
    per_key: int  # multiplications per query and key, value included, all heads
    cache: int  # numbers per token
    cache_fp8: int  # bytes per token
    value_dim: int  # per head


def count_mla(dim: int, a: AttentionConfig) -> AttentionCounts:
    """Counts of multi-head latent attention."""
    key, compressed = a.qk_nope_head_dim + a.qk_rope_head_dim, a.kv_lora_rank + a.qk_rope_head_dim
    query = a.q_lora_rank * (dim + a.num_heads * key) if a.q_lora_rank else dim * a.num_heads * key
    expansion = a.kv_lora_rank * a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    return AttentionCounts(
        weights=query + dim * compressed + expansion + a.num_heads * a.v_head_dim * dim,
        biases=(a.q_lora_rank + compressed if a.qkv_bias else 0) + (dim if a.out_bias else 0),
        norms=a.q_lora_rank + a.kv_lora_rank,
        per_key=a.num_heads * (key + a.v_head_dim),
        cache=compressed,
        cache_fp8=a.kv_lora_rank + 4 * -(-a.kv_lora_rank // FP8_BLOCK) + 2 * a.qk_rope_head_dim,
        value_dim=a.v_head_dim,
    )


def count_gqa(dim: int, a: AttentionConfig) -> AttentionCounts:
    """Counts of grouped-query attention."""
    query, cache = a.num_heads * a.head_dim, 2 * a.num_kv_heads * a.head_dim
    return AttentionCounts(
        weights=dim * (2 * query + cache),
        biases=(query + cache if a.qkv_bias else 0) + (dim if a.out_bias else 0),
        norms=2 * a.head_dim if a.qk_norm else 0,
        per_key=2 * query,
        cache=cache,
        cache_fp8=cache,
        value_dim=a.head_dim,
    )


@dataclass(frozen=True)
class AttentionKind:
    """A built-in attention."""

    path: str  # of the class
    count: Callable[[int, AttentionConfig], AttentionCounts]


@dataclass(frozen=True)
class RouterKind:
    """A built-in router."""

    path: str  # of the class
    gates: int = 1  # matrices of num_experts x dim
    has_bias: bool = False  # has a selection bias of num_experts numbers
    normalizes: bool = False  # always divides the weights by their sum
    renamed: dict[str, str] = field(default_factory=dict)  # config name -> argument it must be passed as


ATTENTIONS = {
    "mla": AttentionKind("mla:MultiheadLatentAttention", count_mla),
    "gqa": AttentionKind("mla:GroupedQueryAttention", count_gqa),
}
ROUTERS = {
    "sigmoid": RouterKind("moe:SigmoidRouter", has_bias=True),
    "softmax": RouterKind("moe:SoftmaxRouter"),
    "noisy": RouterKind("moe:NoisyTopKRouter", gates=2, normalizes=True),
    "switch": RouterKind("moe:SwitchRouter"),
    "gshard": RouterKind("moe:GShardRouter", normalizes=True),
    "expert_choice": RouterKind("moe:ExpertChoiceRouter", renamed={"capacity_factor": "top_k"}),
    "hash": RouterKind("moe:HashRouter", gates=0),
    "mixtral": RouterKind("moe:MixtralRouter", normalizes=True),
    "random": RouterKind("moe:RandomRouter", gates=0),
}
BUILT_IN: dict[str, dict[str, Any]] = {"model.attention.kind": ATTENTIONS, "model.moe.router": ROUTERS}


def build_attention(dim: int, config: AttentionConfig, rope: RopeConfig, norm_eps: float) -> "nn.Module":
    """The attention that a config names."""
    name, built_in = "model.attention.kind", config.kind in ATTENTIONS
    path = ATTENTIONS[config.kind].path if built_in else config.kind
    wanted = inspect.signature(find_class(name, path)).parameters
    sizes: dict[str, Any] = {**vars(config), "dim": dim, "q_lora_rank": config.q_lora_rank or None}
    sizes["qk_norm_eps"] = norm_eps if config.qk_norm else None
    if "rope" in wanted:
        turning = config.head_dim if "qk_rope_head_dim" not in wanted and "head_dim" in wanted else None
        sizes["rope"] = build_rope(turning or config.qk_rope_head_dim, rope)
    elif rope != RopeConfig():
        warnings.warn(f"{config.kind} takes no rope: model.rope is ignored", stacklevel=2)
    return build_part(name, path, config.arguments, sizes, built_in)


def build_rope(dim: int, config: RopeConfig) -> "RotaryEmbedding":
    """The rotary embedding that a config describes."""
    from mla import Linear, Llama3, RotaryEmbedding, YaRN

    kinds = {"linear": Linear, "yarn": YaRN, "llama3": Llama3}
    scaling = None
    if config.scaling != "none":
        kind: Any = kinds[config.scaling]
        scaling = kind(**{item.name: getattr(config, item.name) for item in dataclasses.fields(kind)})
    return RotaryEmbedding(dim, config.theta, config.interleaved, scaling)


def build_moe(dim: int, config: MoEConfig, vocab_size: int = 0) -> "MoE":
    """The router that a config names, its experts, and the shared experts as one MLP.

    vocab_size: for routers that use token ids.
    """
    from moe import Experts, Gated, MoE, SwiGLU

    shared: nn.Module | None = None
    if config.num_shared_experts:
        shared = SwiGLU(dim, config.num_shared_experts * config.hidden_dim)
        shared = Gated(shared, dim) if config.shared_gate else shared
    router = build_router(config, {**vars(config), "dim": dim, "vocab_size": vocab_size})
    return MoE(router, Experts(config.num_experts, dim, config.hidden_dim), shared)


def build_router(config: MoEConfig, sizes: dict[str, Any]) -> "nn.Module":
    """The router that a config names, with a capacity limit if capacity_factor is set."""
    from moe import Capacity
    from moe.router import described

    name, kind = "model.moe.router", ROUTERS.get(config.router)
    path = config.router if kind is None else kind.path
    wanted = inspect.signature(find_class(name, path)).parameters
    if kind is not None:
        if kind.normalizes and not config.normalize:
            raise ValueError(f"model.moe.normalize must be true: router {config.router!r} always does")
        for key in ("num_groups", "routed_scaling_factor"):
            if key not in wanted and sizes[key] != 1:
                raise ValueError(f"model.moe.{key} {sizes[key]} must be 1: router {config.router!r} has none")
        for ours, theirs in kind.renamed.items():
            if sizes[ours]:
                said = f"the router {config.router!r} uses {theirs}"
                raise ValueError(f"model.moe.{ours} must be 0: {said}")
            sizes = {**sizes, ours: sizes[theirs]}
    router = build_part(name, path, config.arguments, sizes, kind is not None)
    if config.capacity_factor and not isinstance(described(router).num_experts, int):
        needs = f"{config.capacity_factor} needs a router with num_experts"
        raise ValueError(f"model.moe.capacity_factor {needs}; {config.router} has none")
    return Capacity(router, config.capacity_factor) if config.capacity_factor else router


def build_part(
    name: str, path: str, arguments: dict[str, Any], sizes: dict[str, Any], built_in: bool
) -> "nn.Module":
    """Build a module from the sizes that its constructor takes and the extra arguments.

    Raises:
        ValueError: path is not an importable nn.Module class, or the arguments do not fit it.
    """
    cls = find_class(name, path)
    wanted = inspect.signature(cls).parameters
    section = name.rpartition(".")[0]
    for key in sorted(arguments.keys() & sizes.keys() & wanted.keys()):
        raise ValueError(f"{section}.arguments {key}: is a field of the config; set {section}.{key}")
    plain = {"num_groups": 1, "routed_scaling_factor": 1, "q_lora_rank": None}
    for key in plain.keys() & sizes.keys() - wanted.keys():
        if not built_in and sizes[key] != plain[key]:
            warnings.warn(f"{path} takes no {key}: {section}.{key} {sizes[key]} is ignored", stacklevel=2)
    given = {key: value for key, value in sizes.items() if key in wanted}
    try:
        return cls(**{**given, **arguments})
    except TypeError as error:
        raise ValueError(f"{name} {cls.__name__ if built_in else path}: {error}") from None


def find_class(name: str, path: str) -> "type[nn.Module]":
    """The nn.Module class that "package.module:Class" names. Its module is imported; nothing is called."""
    from torch import nn

    module_name, colon, class_name = path.partition(":")
    if not colon:
        near = nearest(path, list(BUILT_IN[name]))
        raise ValueError(f'{name} {path!r}: expected a built-in name or "module:Class"{near}')
    here = path not in {kind.path for kind in BUILT_IN[name].values()}
    try:
        module = import_here(module_name) if here else importlib.import_module(module_name)
        found = getattr(module, class_name, None)
    except Exception as error:
        raise ValueError(f"{name} {path!r}: {module_name} cannot be imported: {error}") from None
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise ValueError(f"{name} {path!r}: {class_name!r} in {module_name} is not an nn.Module class")
    return found


def import_here(module: str) -> types.ModuleType:
    """Import a module, also from the working folder: searched last, so that no file there hides a module."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the `lm` command starts without it
    return importlib.import_module(module)


def try_parts(model: Any) -> None:
    """Run a copy of the model on a few tokens if it has custom parts.

    Raises:
        ValueError: the forward pass fails, or its routings do not suit the losses and bias updates.
    """
    import torch

    own = model.config.own_parts()
    if not own:
        return
    tokens = torch.arange(4).remainder(model.config.vocab_size).expand(2, -1)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # leave the training's random state alone
        try:
            for routing in copy.deepcopy(model)(tokens).routings:  # a copy: a part may count its passes
                check_routing(routing, (*tokens.shape, model.config.moe.num_experts))
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise ValueError(f"{' and '.join(own.values())}: a first pass fails: {said}") from None


def check_routing(routing: "Routing", shape: tuple[int, ...]) -> None:
    """Raise ValueError unless scores and logits have this shape, (..., num_experts)."""
    for name in ("scores", "logits"):
        part: Any = getattr(routing, name)
        found = tuple(part.shape) if hasattr(part, "shape") else type(part).__name__
        if found != shape:
            raise ValueError(f"{name} are {found}; expected {shape}, one number per expert")
