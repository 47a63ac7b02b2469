"""Why does MLA rotate only a few of each head's dims?

lm experiment rope [--quick]  ->  experiments/results/rope.json and .png

Claim: a key that is rotated after expansion cannot be absorbed (W_UK moved to the query, so that the cache
holds only the latent): the cache would have to hold every head's key. A few separate dims are enough to carry
position (DeepSeek-V2, arXiv 2405.04434 section 2.1.3). Prediction: with all dims rotated the absorbed form
differs from the expanded one; with none rotated the loss is higher; with 16 of 48 dims rotated it equals that
of all 48. "Turned" means rotated.
"""

import torch
from torch import Tensor

from lm.config import Config
from lm.model import Transformer
from mla import MultiheadLatentAttention, RotaryEmbedding
from mla.attention import softmax_attention

from . import command, common


class NothingTurns(MultiheadLatentAttention):
    """MLA without rotation: only the causal mask tells a token its position."""

    def rotate(self, q_rope: Tensor, k_rope: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return q_rope, k_rope


class AllTurns(MultiheadLatentAttention):
    """MLA with each head's whole query and key rotated, including the part from the latent.

    Only `expanded` is exact: between W_UQ and W_UK there is a rotation that depends on the two positions.
    """

    def expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, visible: Tensor | None
    ) -> Tensor:
        """As in MLA, for a sequence from its start."""
        kv = self.kv_b(latent).unflatten(-1, (self.num_heads, -1))  # (batch, time, heads, nope + value)
        k_nope, value = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        positions = torch.arange(latent.shape[1], device=latent.device)
        rope = RotaryEmbedding(self.qk_nope_head_dim)
        q_nope, k_nope = rope(q_nope, positions), rope(k_nope, positions)
        query = torch.cat((q_nope, q_rope), dim=-1)
        key = torch.cat((k_nope, k_rope.unsqueeze(2).expand_as(q_rope)), dim=-1)
        return softmax_attention(query, key, value, self.scale, visible)


KINDS = {
    "16 of 48 dims turned": "mla",
    "none turned": "experiments.rope:NothingTurns",
    "all turned": "experiments.rope:AllTurns",
}


@torch.no_grad()
def absorbed_is_off(model: Transformer, config: Config) -> dict[str, float]:
    """Distance of the absorbed from the expanded form, relative to the expanded one, in the worst layer."""
    tokens = common.validation(config)[0][:-1].unsqueeze(0)
    hidden = model.embedding(tokens)
    positions = torch.arange(tokens.shape[1])
    off = 0.0
    for block in model.blocks:
        attention = block.attention
        x = block.attention_norm(hidden)
        q_nope, q_rope = attention.query(x)
        latent, k_rope = attention.compress(x)
        q_rope, k_rope = attention.rotate(q_rope, k_rope, positions)
        right = attention.expanded(q_nope, q_rope, latent, k_rope, None)
        absorbed = attention.absorbed(q_nope, q_rope, torch.cat((latent, k_rope), dim=-1), None)
        off = max(off, float((absorbed - right).norm() / right.norm()))
        hidden, _ = block(hidden, tokens, None, None, None)
    return {"absorbed_is_off": off}


def numbers_kept(config: Config) -> dict[str, int]:
    """Numbers per token and layer in a cache that keeps keys as they are used."""
    a = config.model.attention
    heads = a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    return {name: a.qk_rope_head_dim + (heads if name == "all turned" else a.kv_lora_rank) for name in KINDS}


def main(arguments: list[str] | None = None) -> None:
    """Train with each kind and compare its absorbed form."""
    given = command.options("rope", __doc__, 600, arguments)
    config = common.base(given)
    if not given.quick:
        config = common.changed(config, attention={"qk_nope_head_dim": 32, "qk_rope_head_dim": 16})
    configs = {name: common.changed(config, attention={"kind": kind}) for name, kind in KINDS.items()}
    rows = common.train_all(configs, given, measure=absorbed_is_off)
    losses, off, kept = common.last(rows), common.last(rows, "absorbed_is_off"), numbers_kept(config)
    few, none, every = KINDS
    hurt, rest = (common.shown(common.paired(rows, *pair), 4) for pair in ((none, few), (few, every)))
    least, most = (f"{end(off[every]):.0%}" for end in (min, max))
    answer = [
        f"With all dims turned, the absorbed form is off by {least} to {most} of the output's size; with "
        f"{few}, by {max(off[few]):.0e} at most.",
        f"With none turned the loss is {hurt} above that with {few}, which is {rest} above all turned.",
    ]
    table = [["", "held-out loss", "absorbed is off by (worst seed)", "numbers cached a token and layer"]]
    table += [[name, common.shown(losses[name]), f"{max(off[name]):.1e}", f"{kept[name]}"] for name in KINDS]
    broken = [value - 1e-3 for value in off[every]]  # far above rounding ...
    exact = [1e-5 - value for value in off[few]]  # ... and within it
    claimed = common.as_claimed(broken, exact, common.paired(rows, none, few))
    common.write("rope", given, claimed, answer, table, rows, configs)
    common.draw_losses("rope", given, losses)


if __name__ == "__main__":
    main()
