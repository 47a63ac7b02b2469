"""Where does position go, if not into the latent?"""

import torch

from exercises.grader.watch import backward

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
EXPECTS = {
    "q_rope": "(batch, time, heads, rope), fp32, bf16 or float64",
    "k_rope": "(batch, time, rope), one key for all heads",
    "positions": "int64 (time,), or (batch, time) if the rows differ; they need not start at 0",
    "returns": "the rotated q_rope and k_rope, the same shapes and dtype",
}
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
    (
        "self.rope(both, positions)",
        "self.rope(both, positions.to(both.dtype))",
        "the positions are cast to the dtype of the queries: bf16 has no 257; they stay integers",
    ),
    (
        "self.rope(both, positions)",
        "self.rope(both.float(), positions)",
        "the result is fp32: keep the dtype of the inputs; self.rope computes in fp32 inside",
    ),
    (
        "return q_rope, k_rope.squeeze(2)",
        "return q_rope, k_rope.squeeze(2).detach()",
        "the key is detached: no gradient reaches it",
    ),
    (
        "both = torch.cat((q_rope, k_rope.unsqueeze(2)), dim=2)",
        "both = torch.cat((q_rope, k_rope.unsqueeze(2)), dim=2)\n        positions.sub_(positions.min())",
        "positions is changed in place: the next layer gets it too",
    ),
    (
        "return q_rope, k_rope.squeeze(2)",
        "return q_rope.flip(2), k_rope.squeeze(2)",
        "the heads come back in a different order",
    ),
    (
        "self.rope(both, positions)",
        "self.rope(both, positions.squeeze())",
        "positions is squeezed: a single token has positions (1,) or (1, 1)",
    ),
    (
        "self.rope(both, positions)",
        "self.rope(both, positions.half())",
        "the positions are cast to fp16, which cannot represent 2049; they stay integers",
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
    """
    heads = [self.rope(q_rope[:, :, head], positions) for head in range(q_rope.shape[2])]
    return torch.stack(heads, dim=2), self.rope(k_rope, positions)
    """,
    """
    both = [self.rope(part, positions) for part in [*q_rope.unbind(2), k_rope]]
    return torch.stack(both[:-1], dim=2), both[-1]
    """,
    """
    if not self.rope.interleaved:
        return self.rope(q_rope, positions), self.rope(k_rope, positions)
    cos, sin = self.rope.cos_sin(positions)
    turns = torch.complex(cos, sin)
    q = torch.view_as_complex(q_rope.to(torch.promote_types(q_rope.dtype, torch.float32)).unflatten(-1, (-1, 2)).contiguous())
    k = torch.view_as_complex(k_rope.to(torch.promote_types(k_rope.dtype, torch.float32)).unflatten(-1, (-1, 2)).contiguous())
    q, k = torch.einsum("...thp,...tp->...thp", q, turns.to(q.dtype).expand(k.shape)), k * turns
    return torch.view_as_real(q).flatten(-2).type_as(q_rope), torch.view_as_real(k).flatten(-2).type_as(k_rope)
    """,
)


def probe(module, generator):
    """Positions that do not start at 0 and differ between rows, positions that bf16 and fp16 cannot hold, float64, one token."""
    made = module.MultiheadLatentAttention(11, 3, 7, 5, 4, 6)
    q_rope = torch.randn(2, 5, 3, 4, generator=generator, requires_grad=True)
    k_rope = torch.randn(2, 5, 4, generator=generator, requires_grad=True)
    positions = torch.tensor([[3, 4, 5, 6, 9], [0, 1, 7, 8, 11]])
    q, k = made.rotate(q_rope, k_rope, positions)
    found = {"query": q, "key": k}
    of_query = (q * torch.randn(q.shape, generator=generator)).sum()
    backward(of_query + (k * torch.randn(5, 4, generator=generator)).sum())
    found |= {"gradient of the query": q_rope.grad, "gradient of the key": k_rope.grad}
    q, k = made.rotate(q_rope, k_rope, torch.arange(2, 7))
    found |= {"query, one row of positions": q, "key, one row of positions": k}
    late = torch.tensor([257, 301, 2049, 771, 70001])
    q, k = made.rotate(q_rope.detach().bfloat16(), k_rope.detach().bfloat16(), late)
    found |= {"query of bf16": q, "key of bf16": k}
    q, k = made.rotate(q_rope.detach().double(), k_rope.detach().double(), late)
    found |= {"query of float64": q, "key of float64": k}
    q, k = made.rotate(q_rope[:1, :1], k_rope[:1, :1], torch.tensor([6]))
    return found | {"query of one token": q, "key of one token": k}
