"""Where does position go, if not into the latent?"""

import torch

TARGET = "mla.attention:MultiheadLatentAttention.rotate"
TESTS = ("tests/mla/test_attention.py",)
WHICH = "position or relative or equation"
EQUATION = "DeepSeek-V3 eq. 3, 8; DeepSeek-V2 section 2.1.3"
LEARN = "Only a few separate dims of the query and the shared key are rotated, so everything else can be absorbed."
HINTS = (
    "If the key is expanded from the latent later, where can the rotation go? Do the query and the key both rotate?",
    "Rotate q_rope (batch, time, heads, rope) and k_rope (batch, time, rope) by the positions, the key like one "
    "more head, and return both in their original shapes.",
    "self.rope(x, positions), unsqueeze, squeeze, cat, split",
)
MISTAKES = (
    (
        "return q_rope, k_rope.squeeze(2)",
        "return q_rope, both[:, :, -1]",
        "the key is not rotated: scores would depend on the query's position, not on the distance to the key",
    ),
    (
        "return q_rope, k_rope.squeeze(2)",
        "return both[:, :, :-1], k_rope.squeeze(2)",
        "the query is not rotated: scores would depend on the key's position, not on the distance to it",
    ),
    (
        "self.rope(both, positions)",
        "self.rope(both, positions * 0 + torch.arange(both.shape[1]))",
        "positions restart at 0 in every call: with a cache they continue where the last call ended",
    ),
    (
        "self.rope(both, positions)",
        "self.rope(both, positions + 1)",
        "positions are shifted by 1: scores agree, but each cached key belongs to the next position",
    ),
    (
        "self.rope(both, positions)",
        "self.rope(self.rope(both, positions), positions)",
        "rotated twice",
    ),
    (
        "return q_rope, k_rope.squeeze(2)",
        "return q_rope, k_rope.expand(-1, -1, self.num_heads, -1)",
        "the rope key is repeated for each head: all heads share one, and it is stored once",
    ),
)
RIGHT = (
    """
    return self.rope(q_rope, positions), self.rope(k_rope, positions)
    """,
    """
    turned = self.rope(torch.cat((k_rope.unsqueeze(2), q_rope), dim=2), positions)
    return turned[:, :, 1:], turned[:, :, 0]
    """,
    """
    cos, sin = self.rope.cos_sin(positions)
    k_rope = self.rope.turn(k_rope, cos, sin)
    q_rope = self.rope.turn(q_rope, cos.unsqueeze(-2), sin.unsqueeze(-2))
    return q_rope, k_rope
    """,
)


def probe(module, generator):
    """Positions that do not start at 0 and differ between rows."""
    made = module.MultiheadLatentAttention(11, 3, 7, 5, 4, 6).double()
    q_rope = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    k_rope = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[3, 4, 5, 6, 9], [0, 1, 7, 8, 11]])
    q, k = made.rotate(q_rope, k_rope, positions)
    found = {"query": q, "key": k}
    of_query = (q * torch.randn(q.shape, generator=generator, dtype=torch.float64)).sum()
    (of_query + (k * torch.randn(5, 4, generator=generator, dtype=torch.float64)).sum()).backward()
    found |= {"gradient of the query": q_rope.grad, "gradient of the key": k_rope.grad}
    q, k = made.rotate(q_rope, k_rope, torch.arange(2, 7))
    return found | {"query, one row of positions": q, "key, one row of positions": k}
