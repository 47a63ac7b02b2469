"""The toy transformer: DeepSeek-V3's block, from `mla` and `moe`. Only here does a part meet a config."""

import dataclasses
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla import (
    GroupedQueryAttention,
    Linear,
    Llama3,
    MultiheadLatentAttention,
    RMSNorm,
    RotaryEmbedding,
    YaRN,
)
from mla.pages import ROWS, Plan
from moe import (
    Capacity,
    ExpertChoiceRouter,
    Experts,
    Gated,
    GShardRouter,
    HashRouter,
    MixtralRouter,
    MoE,
    NoisyTopKRouter,
    RandomRouter,
    Routing,
    SigmoidRouter,
    SoftmaxRouter,
    SwiGLU,
    SwitchRouter,
)
from moe.zoo import check_ids

from .config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig, nearest

ROUTERS: dict[str, type[nn.Module]] = {
    "sigmoid": SigmoidRouter,
    "softmax": SoftmaxRouter,
    "noisy": NoisyTopKRouter,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "mixtral": MixtralRouter,
    "random": RandomRouter,
}
BUILT_IN = {"model.attention.kind": ("mla", "gqa"), "model.moe.router": tuple(ROUTERS)}


class Output(NamedTuple):
    """What one pass of the model gives."""

    logits: Tensor  # (batch, time, vocab)
    hidden: Tensor  # (batch, time, dim), the last block's output before the final norm
    routings: list[Routing]  # of each MoE layer, in order


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = build_attention(config.dim, config.attention, config.rope, config.norm_eps)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp: nn.Module
        if layer < config.num_dense_layers:
            self.mlp = SwiGLU(config.dim, config.hidden_dim)
        else:
            self.mlp = build_moe(config.dim, config.moe, config.vocab_size)

    def forward(
        self, x: Tensor, tokens: Tensor, cache: Any, positions: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.attention_norm(x), cache, positions, mask)
        normed = self.mlp_norm(x)
        y, routing = self.mlp(normed, tokens) if isinstance(self.mlp, MoE) else (self.mlp(normed), None)
        return x + y, routing

    def step(self, x: Tensor, tokens: Tensor, pool: Tensor, plan: Plan) -> Tensor:
        """`forward` for a step of many texts, x (filled, dim) -> the same; see `Transformer.step`."""
        attention: Any = self.attention
        x = x + attention.step(self.attention_norm(x), pool, plan)
        normed = self.mlp_norm(x)
        if isinstance(self.mlp, MoE):
            return x + self.mlp.step(normed, plan.tokens, tokens)[0]
        return x + self.mlp(normed)


class Transformer(nn.Module):
    """Embedding, blocks, norm, head. Under torch.device("meta") it is built without memory.

    tokens (batch, time) int64 -> Output

    Raises:
        ValueError: numbers in the config do not fit each other, or tokens are not ids below vocab_size.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        caches: Sequence[Any] | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Output:
        """caches from `new_caches`; positions and mask as in `MultiheadLatentAttention.forward`."""
        x, routings = self.trunk(tokens, caches, positions, mask)
        return Output(self.head(self.norm(x)), x, routings)

    def trunk(
        self,
        tokens: Tensor,
        caches: Sequence[Any] | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        run: Callable[..., tuple[Tensor, Routing | None]] = Block.__call__,
    ) -> tuple[Tensor, list[Routing]]:
        """All but the final norm and the head -> hidden (batch, time, dim), a Routing for each MoE layer.

        Args:
            run: calls a block with its arguments; `lm.train.run_block` makes one that compiles or recomputes.
        """
        self.check(tokens, caches)
        x = self.embedding(tokens)  # (batch, time, dim)
        routings = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x, routing = run(block, x, tokens, cache, positions, mask)
            if routing is not None:
                routings.append(routing)
        return x, routings

    @torch.no_grad()
    def step(self, tokens: Tensor, pools: Sequence[Tensor], plan: Plan) -> Tensor:
        """Read `plan.time` tokens more of each of many texts -> (rows, vocab), the logits after each's last.

        tokens (rows x time,) int64; pools as from `attention.new_pool`, one a layer
        """
        tokens = F.pad(tokens, (0, plan.filled - plan.tokens))
        x = self.embedding(tokens)  # (filled, dim)
        blocks: list[Any] = list(self.blocks)
        for block, pool in zip(blocks, pools):
            x = block.step(x, tokens, pool, plan)
        if plan.time > 1:
            x = x[: plan.tokens].view(plan.rows, plan.time, -1)[:, -1]
            x = F.pad(x, (0, 0, 0, -len(x) % ROWS))
        return self.head(self.norm(x))[: plan.rows]

    def check(self, tokens: Tensor, caches: Sequence[Any] | None) -> None:
        """Raise ValueError for what is not a batch of token ids, or not one cache a layer."""
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.shape[1] < 1:
            raise ValueError(
                f"tokens are {tokens.dtype} {tuple(tokens.shape)}; expected int64 (batch, time >= 1)"
            )
        check_ids("token", tokens, self.config.vocab_size)
        if caches is not None and len(caches) != len(self.blocks):
            raise ValueError(f"{len(caches)} caches for {len(self.blocks)} layers")

    def new_caches(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> list[Any]:
        """An empty cache for each layer."""
        attentions: list[Any] = [block.attention for block in self.blocks]
        return [attention.new_cache(batch, max_length, dtype) for attention in attentions]

    def routers(self) -> list[nn.Module]:
        """The routers of the MoE layers, in the order of `Output.routings`."""
        return [block.mlp.router for block in self.blocks if isinstance(block.mlp, MoE)]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw every weight matrix from a normal of std init_std (V3 section 4.2; there 0.006), biases 0."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, self.config.init_std, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()


def build_attention(dim: int, config: AttentionConfig, rope: RopeConfig, norm_eps: float) -> nn.Module:
    """The attention that a config names."""
    if config.kind == "mla":
        return MultiheadLatentAttention(
            dim,
            config.num_heads,
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            config.q_lora_rank or None,
            build_rope(config.qk_rope_head_dim, rope),
            config.qkv_bias,
            config.out_bias,
        )
    if config.kind == "gqa":
        return GroupedQueryAttention(
            dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            build_rope(config.head_dim, rope),
            config.qkv_bias,
            config.out_bias,
            norm_eps if config.qk_norm else None,
        )
    sizes = {**vars(config), "dim": dim, "q_lora_rank": config.q_lora_rank or None}
    if "rope" in inspect.signature(find_class("model.attention.kind", config.kind)).parameters:
        sizes["rope"] = build_rope(config.qk_rope_head_dim, rope)
    elif rope != RopeConfig():
        warnings.warn(f"{config.kind} takes no rope: model.rope is not heeded", stacklevel=2)
    return build_own("model.attention.kind", config.kind, config.arguments, sizes)


def build_rope(dim: int, config: RopeConfig) -> RotaryEmbedding:
    """The rotary embedding that a config describes."""
    kinds = {"linear": Linear, "yarn": YaRN, "llama3": Llama3}
    scaling = None
    if config.scaling != "none":
        kind = kinds[config.scaling]
        scaling = kind(**{field.name: getattr(config, field.name) for field in dataclasses.fields(kind)})
    return RotaryEmbedding(dim, config.theta, config.interleaved, scaling)


def build_moe(dim: int, config: MoEConfig, vocab_size: int = 0) -> MoE:
    """The router that a config names, its experts, and the shared experts as one MLP.

    vocab_size: for a router that goes by token ids.
    """
    shared: nn.Module | None = None
    if config.num_shared_experts:
        shared = SwiGLU(dim, config.num_shared_experts * config.hidden_dim)
        shared = Gated(shared, dim) if config.shared_gate else shared
    router = build_router(config, {**vars(config), "dim": dim, "vocab_size": vocab_size})
    return MoE(router, Experts(config.num_experts, dim, config.hidden_dim), shared)


def build_router(config: MoEConfig, sizes: dict[str, Any]) -> nn.Module:
    """The router that a config names, with limited room if capacity_factor says so."""
    kind = ROUTERS.get(config.router, config.router)
    known = inspect.signature(ROUTERS.get(config.router, SoftmaxRouter)).parameters
    if not config.normalize and kind in (NoisyTopKRouter, GShardRouter, MixtralRouter):
        raise ValueError(f"model.moe.normalize must be true: router {config.router!r} always does")
    for name in ("num_groups", "routed_scaling_factor"):
        if name not in known and sizes[name] != 1:
            raise ValueError(f"model.moe.{name} {sizes[name]} must be 1: router {config.router!r} has none")
    if kind is ExpertChoiceRouter:
        if config.capacity_factor:
            raise ValueError("model.moe.capacity_factor must be 0: the router 'expert_choice' goes by top_k")
        sizes = {**sizes, "capacity_factor": config.top_k}  # experts a token, on average
    router = build_own("model.moe.router", kind, config.arguments, sizes)
    if config.capacity_factor and not isinstance(getattr(router, "num_experts", None), int):
        needs = f"{config.capacity_factor} needs a router with num_experts"
        raise ValueError(f"model.moe.capacity_factor {needs}; {config.router} has none")
    return Capacity(router, config.capacity_factor) if config.capacity_factor else router


def build_own(name: str, kind: str | type, arguments: dict[str, Any], sizes: dict[str, Any]) -> nn.Module:
    """Make a module, given those of the config's numbers that its constructor names, and its own arguments.

    Raises:
        ValueError: `kind` is no importable "module:Class" that is an nn.Module, or arguments do not fit.
    """
    cls = find_class(name, kind) if isinstance(kind, str) else kind
    wanted = inspect.signature(cls).parameters
    section = name.rpartition(".")[0]
    for key in sorted(arguments.keys() & sizes.keys() & wanted.keys()):
        raise ValueError(f"{section}.arguments {key}: is a number of the config; set {section}.{key}")
    plain = {"num_groups": 1, "routed_scaling_factor": 1, "q_lora_rank": None}
    for key in plain.keys() & sizes.keys() - wanted.keys():
        if isinstance(kind, str) and sizes[key] != plain[key]:
            warnings.warn(f"{kind} takes no {key}: {section}.{key} {sizes[key]} is not heeded", stacklevel=2)
    given = {key: value for key, value in sizes.items() if key in wanted}
    try:
        return cls(**{**given, **arguments})
    except TypeError as error:
        raise ValueError(f"{name} {getattr(kind, '__name__', kind)}: {error}") from None


def find_class(name: str, path: str) -> type[nn.Module]:
    """The nn.Module class that "package.module:Class" names; it is imported, and nothing else is called."""
    module_name, colon, class_name = path.partition(":")
    if not colon:
        near = nearest(path, BUILT_IN[name])
        raise ValueError(f'{name} {path!r}: expected a built-in name or "module:Class"{near}')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where your own file is; the path of the `lm` command begins elsewhere
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except Exception as error:
        raise ValueError(f"{name} {path!r}: {module_name} cannot be imported: {error}") from None
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise ValueError(f"{name} {path!r}: {class_name!r} in {module_name} is not an nn.Module class")
    return found
