"""Attention as in the paper: how are a head's key and value computed from the latent?"""

import torch

from exercises.grader.watch import backward

TARGET = "mla.attention:MultiheadLatentAttention.expanded"
TESTS = ("tests/mla/test_attention.py",)
WHICH = "expanded and not transformers"
EQUATION = "DeepSeek-V3 eq. 2, 4, 5, 9, 10"
LEARN = (
    "Each head's key is its own rows of W_UK times the latent, followed by the rope key that all heads share."
)
HINTS = (
    "kv_b computes a key part and a value part for each head. How wide are they, and which comes first?",
    "kv is (batch, total, heads, nope + value). The rope key (batch, total, rope) is the same for every head. Query "
    "and key are the concatenation [nope, rope]; the softmax scale is self.scale.",
    "self.kv_b, unflatten or rearrange, split, unsqueeze, expand, cat, softmax_attention",
)
EXPECTS = {
    "q_nope, q_rope": "(batch, time, heads, nope) and (batch, time, heads, rope), fp32, bf16 or float64",
    "latent, k_rope": "(batch, total, latent), already normed, and (batch, total, rope), already rotated",
    "visible": "None: causal, and total = time unless time is 1; or bool, (time, total) or (batch, time, total), True where a query may look",
    "self.scale": "the softmax scale, which YaRN can change; softmax_attention(query, key, value, scale, visible) applies it and handles visible",
    "returns": "(batch, time, heads, value), the dtype of the query",
}
MISTAKES = (
    (
        "k_nope, value = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)",
        "value, k_nope = kv.split([self.v_head_dim, self.qk_nope_head_dim], dim=-1)",
        "the key and value rows of kv_b are swapped: in each head the key rows come first",
    ),
    (
        '"batch total (heads width) -> batch total heads width"',
        '"batch total (width heads) -> batch total heads width"',
        "the rows of kv_b are strided: each head's rows are consecutive",
    ),
    (
        "self.scale, visible)",
        "self.qk_nope_head_dim**-0.5, visible)",
        "the scale uses the nope width only: query and key have nope + rope dims",
    ),
    (
        "self.scale, visible)",
        "self.scale, None)",
        "the mask is missing",
    ),
    (
        "query = torch.cat((q_nope, q_rope), dim=-1)",
        "query = torch.cat((q_nope, q_rope * 0), dim=-1)",
        "the rope part of the query is missing: the scores would not depend on position",
    ),
    (
        "key = torch.cat((k_nope, k_rope), dim=-1)",
        "key = torch.cat((k_nope, k_rope / self.num_heads), dim=-1)",
        "the rope key is divided by the number of heads: every head uses it as it is",
    ),
    (
        "kv = self.kv_b(latent)",
        "kv = self.kv_b(self.kv_norm(latent))",
        "the latent is normed again: it is already normed",
    ),
    (
        "k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.num_heads, -1)",
        "k_rope = k_rope.repeat_interleave(self.num_heads, dim=-1).unflatten(-1, (self.num_heads, -1))",
        "the rope key is repeated in the wrong order: every head needs the whole key; repeat it along a new head axis",
    ),
    (
        "kv = self.kv_b(latent)",
        "kv = self.kv_b(latent.detach())",
        "the latent is detached: no gradient reaches it through the keys and values",
    ),
    (
        "kv = self.kv_b(latent)",
        "kv = self.kv_b(latent).bfloat16().to(latent.dtype)",
        "keys and values are rounded to bf16: keep the dtype of the latent",
    ),
    (
        "self.scale, visible)",
        "self.scale, visible if visible is None else visible.logical_not_().logical_not_() & visible.tril_())",
        "visible is changed in place: the next layer gets it too",
    ),
    (
        "self.scale, visible)",
        "self.scale, visible).float()",
        "the result is fp32: keep the dtype of the query",
    ),
    (
        "self.scale, visible)",
        "(self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5, visible)",
        "the scale is recomputed: use self.scale, which YaRN can change",
    ),
    (
        "self.scale, visible)",
        "self.scale, torch.ones(query.shape[1], key.shape[1]).tril().bool() if visible is None else visible)",
        "a single query sees only the first key: without visible it sees itself and all earlier tokens",
    ),
)
RIGHT = (
    """
    kv = self.kv_b(latent).unflatten(-1, (self.num_heads, -1))
    k_nope, value = kv[..., : self.qk_nope_head_dim], kv[..., self.qk_nope_head_dim :]
    k_rope = k_rope[:, :, None].repeat(1, 1, self.num_heads, 1)
    key = torch.cat((k_nope, k_rope), -1)
    return softmax_attention(torch.cat((q_nope, q_rope), -1), key, value, self.scale, visible)
    """,
    """
    w_key, w_value = self.split_kv_b()
    k_nope = torch.einsum("btl,hnl->bthn", latent, w_key)
    value = torch.einsum("btl,hvl->bthv", latent, w_value)
    shared = k_rope.unsqueeze(2).expand(*k_nope.shape[:3], k_rope.shape[-1])
    query, key = torch.cat((q_rope, q_nope), dim=-1), torch.cat((shared, k_nope), dim=-1)
    return softmax_attention(query, key, value, self.scale, visible)
    """,
    """
    kv = self.kv_b(latent).unflatten(-1, (self.num_heads, -1))
    k_nope, value = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
    scores = torch.einsum("bqhn,bkhn->bhqk", q_nope, k_nope) + torch.einsum("bqhr,bkr->bhqk", q_rope, k_rope)
    scores = scores * self.scale
    time, total = scores.shape[-2:]
    if visible is None:
        visible = torch.ones(time, total, dtype=torch.bool, device=scores.device).tril(total - time)
    visible = visible.unsqueeze(1) if visible.ndim == 3 else visible
    weights = scores.float().masked_fill(~visible, float("-inf")) if scores.dtype != torch.float64 else (
        scores.masked_fill(~visible, float("-inf")))
    return torch.einsum("bhqk,bkhv->bqhv", weights.softmax(-1).to(value.dtype), value)
    """,
    """
    kv = self.kv_b(latent).unflatten(-1, (self.num_heads, -1))
    heads = []
    for head in range(self.num_heads):
        k_nope, value = kv[:, :, head].split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        key = torch.cat((k_nope, k_rope), dim=-1).unsqueeze(2)
        query = torch.cat((q_nope[:, :, head], q_rope[:, :, head]), dim=-1).unsqueeze(2)
        heads.append(softmax_attention(query, key, value.unsqueeze(2), self.scale, visible))
    return torch.cat(heads, dim=2)
    """,
    """
    kv = self.kv_b(latent).unflatten(-1, (self.num_heads, -1))
    k_nope, value = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
    key = torch.cat([k_nope, torch.stack([k_rope] * self.num_heads, dim=2)], dim=-1)
    scores = torch.einsum("bqhd,bkhd->bhqk", torch.cat([q_nope, q_rope], dim=-1), key) * self.scale
    time, total = scores.shape[-2:]
    if visible is None:
        visible = torch.arange(total, device=key.device) <= torch.arange(total - time, total, device=key.device)[:, None]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~(visible if visible.ndim == 2 else visible[:, None]), -torch.inf)
    return torch.einsum("bhqk,bkhv->bqhv", scores.softmax(-1).to(value.dtype), value)
    """,
    """
    rows = []
    for b in range(len(latent)):
        kv = self.kv_b(latent[b : b + 1]).unflatten(-1, (self.num_heads, -1))
        k_nope, value = kv[..., : self.qk_nope_head_dim], kv[..., self.qk_nope_head_dim :]
        key = torch.cat((k_nope, k_rope[b : b + 1, :, None].expand(-1, -1, self.num_heads, -1)), -1)
        query = torch.cat((q_nope[b : b + 1], q_rope[b : b + 1]), -1)
        mask = visible[b : b + 1] if visible is not None and visible.ndim == 3 else visible
        rows.append(softmax_attention(query, key, value, self.scale, mask))
    return torch.cat(rows)
    """,
)


def probe(module, generator):
    """Widths that all differ, with masks, one query over a past, float64, large scores, and the dtype for bf16."""
    made = module.MultiheadLatentAttention(11, 3, 13, 5, 2, 4)
    made.scale *= 1.3  # as YaRN does
    with torch.no_grad():
        made.kv_b.weight.copy_(torch.randn(made.kv_b.weight.shape, generator=generator))
        made.kv_norm.weight.copy_(torch.rand(13, generator=generator))
    parts = [
        torch.randn(shape, generator=generator, requires_grad=True)
        for shape in ((2, 7, 3, 5), (2, 7, 3, 2), (2, 7, 13), (2, 7, 2))
    ]
    visible = (torch.rand(2, 7, 7, generator=generator) < 0.6) | torch.eye(7, dtype=torch.bool)
    found = {
        "causal": made.expanded(*parts, None),
        "masked": made.expanded(*parts, visible),
        "masked, one mask": made.expanded(*parts, visible[0].clone()),
    }
    last = [part[:, -1:] for part in parts[:2]]
    found["one query"] = made.expanded(*last, *parts[2:], None)
    weights = torch.randn(4, generator=generator)
    backward(sum((y * weights).sum() for y in found.values()))
    names = ("q_nope", "q_rope", "the latent", "the rope key")
    found |= {f"gradient of {name}": part.grad for name, part in zip(names, parts)}
    found["causal, float64"] = made.double().expanded(*(part.detach().double() for part in parts), None)
    large = [part.detach().double() * 300 for part in parts]
    found["causal, large scores"] = made.expanded(*large, None)
    y = made.bfloat16().expanded(*(part.detach().bfloat16() for part in parts), None)
    return found | {"causal, bf16": y[:0]}
