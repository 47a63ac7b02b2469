"""The toy transformer: DeepSeek-V3's block, from `mla` and `moe`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla import RMSNorm
from moe import Experts, MoE, Routing, SwiGLU
from moe.router import check_ids

from .config import ModelConfig
from .parts import build_attention, build_moe


class Output(NamedTuple):
    """The result of a forward pass."""

    logits: Tensor  # (batch, time, vocab)
    hidden: Tensor  # (batch, time, dim), the last block's output before the final norm
    routings: list[Routing]  # one per MoE layer, in order


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


class Transformer(nn.Module):
    """Embedding, blocks, norm, head. Under torch.device("meta") no memory is allocated.

    tokens (batch, time) int64 -> Output

    Raises:
        ValueError: inconsistent numbers in the config, or tokens outside 0..vocab_size - 1.
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
        embeddings: Tensor | None = None,
    ) -> Output:
        """caches: from `new_caches`; positions and mask: as in `MultiheadLatentAttention.forward`.

        embeddings (batch, time, dim): the blocks' input instead of `embed(tokens)`, such as an image's.
        """
        x, routings = self.trunk(tokens, caches, positions, mask, embeddings=embeddings)
        return Output(self.logits(x), x, routings)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (batch, time) int64 -> (batch, time, dim), the input of the first block"""
        return self.embedding(tokens)

    def logits(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """hidden (..., dim) of the last block -> (..., vocab), by the final norm and `head` (None: ours)"""
        return (self.head if head is None else head)(self.norm(hidden))

    def trunk(
        self,
        tokens: Tensor,
        caches: Sequence[Any] | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        run: Callable[..., tuple[Tensor, Routing | None]] = Block.__call__,
        embeddings: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Embedding and blocks -> hidden (batch, time, dim), a Routing for each MoE layer.

        Args:
            run: calls a block; `lm.train.run_block` returns one that compiles or recomputes it.
            embeddings: see `forward`.
        """
        self.check(tokens, caches, embeddings)
        x = self.embed(tokens) if embeddings is None else embeddings  # (batch, time, dim)
        routings = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x, routing = run(block, x, tokens, cache, positions, mask)
            if routing is not None:
                routings.append(routing)
        return x, routings

    def check(
        self, tokens: Tensor, caches: Sequence[Any] | None = None, embeddings: Tensor | None = None
    ) -> None:
        """Raise ValueError unless tokens are ids, with one cache per layer and one embedding per token."""
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.shape[1] < 1:
            raise ValueError(
                f"tokens are {tokens.dtype} {tuple(tokens.shape)}; expected int64 (batch, time >= 1)"
            )
        check_ids("token", tokens, self.config.vocab_size)
        if caches is not None and len(caches) != len(self.blocks):
            raise ValueError(f"{len(caches)} caches for {len(self.blocks)} layers")
        shape = (*tokens.shape, self.config.dim)
        if embeddings is not None and embeddings.shape != shape:
            raise ValueError(f"embeddings are {tuple(embeddings.shape)}; expected {shape}")

    def new_caches(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> list[Any]:
        """An empty cache for each layer."""
        attentions: list[Any] = [block.attention for block in self.blocks]
        return [attention.new_cache(batch, max_length, dtype) for attention in attentions]

    def routers(self) -> list[nn.Module]:
        """The routers of the MoE layers, in the order of `Output.routings`."""
        return [block.mlp.router for block in self.blocks if isinstance(block.mlp, MoE)]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Weight matrices from a normal with std init_std (V3 section 4.2: 0.006), biases 0."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, self.config.init_std, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()


class ProductLinear(nn.Linear):
    """A linear layer that computes its product by a function of rows (..., in) and weight (out, in)."""

    product: Callable[[Tensor, Tensor], Tensor] = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, self.weight)
        return y if self.bias is None else y + self.bias


def use_product(model: Transformer, product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Compute every matrix product of the blocks by `product`, to quantise, count or distribute it.

    product: rows (..., in), weight (out, in) -> (..., out). Embedding, head, router gates and the scores of
    absorbed attention are not replaced. Weights, names and the state dict stay the same.
    """
    for parent in list(model.blocks.modules()):
        if isinstance(parent, Experts):
            parent.product = product
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and type(child) in (nn.Linear, ProductLinear):
                made = ProductLinear(child.in_features, child.out_features, False, device="meta")
                made.weight, made.bias, made.product = child.weight, child.bias, product
                setattr(parent, name, made.train(child.training))
