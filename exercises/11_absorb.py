"""Why is decoding with MLA cheap?"""

import torch

TARGET = "mla.attention:MultiheadLatentAttention.absorbed"
TESTS = ("tests/mla/test_attention.py",)
WHICH = "(absorb or chunk or cache) and not transformers and not biases"
EQUATION = "DeepSeek-V2 section 2.1.2, DeepSeek-V3 eq. 9, 10"
LEARN = "q (W c) = (q W) c: the key and value matrices move to the query and the output, and the cache is read directly."
HINTS = (
    "(q W) c = q (W c): which side is cheaper for one query and many keys?",
    "Each head maps its query from nope to latent, and its result from latent to value. The scores (batch, heads, "
    "time, total) are [q_latent, q_rope] times the cache entries, in fp32; the values are the latents.",
    "self.split_kv_b(), matmul or einsum twice, cat, masked_fill, softmax; a causal mask if visible is None",
)
MISTAKES = (
    (
        "* self.scale",
        "* (self.kv_lora_rank + self.qk_rope_head_dim) ** -0.5",
        "the scale uses the latent's width: it stays (nope + rope)^-0.5, because the scores are the same numbers",
    ),
    (
        "w_key, w_value = self.split_kv_b()",
        "w_key, w_value = (self.kv_b.weight.view(self.num_heads, -1, self.kv_lora_rank).flip(1)"
        ".split([self.qk_nope_head_dim, self.v_head_dim], dim=1))",
        "the rows of kv_b are taken in the wrong order: each head's key rows come first",
    ),
    (
        "w_key, w_value = self.split_kv_b()",
        "w_key, w_value = (part.unflatten(0, (self.num_heads, -1)) for part in self.kv_b.weight.split("
        "[self.num_heads * self.qk_nope_head_dim, self.num_heads * self.v_head_dim]))",
        "kv_b is split across all heads at once: each head has its key rows, then its value rows",
    ),
    (
        "torch.cat((q_latent, q_rope.transpose(1, 2)), dim=-1)",
        "torch.cat((q_latent, q_rope.transpose(1, 2) * 0), dim=-1)",
        "the rope part of the query is missing: the scores would not depend on position",
    ),
    (
        "if visible is None and time > 1:",
        "if False:",
        "the causal mask is missing: if visible is None, a query may only see itself and earlier tokens",
    ),
    (
        "visible = visible.unsqueeze(1) if visible.ndim == 3 else visible",
        "visible = torch.ones_like(visible.unsqueeze(1) if visible.ndim == 3 else visible)",
        "the mask is missing",
    ),
    (
        ".tril()",
        ".triu()",
        "the causal mask is reversed: queries see later tokens",
    ),
)
RIGHT = (
    """
    w_key, w_value = self.split_kv_b()
    latent, k_rope = entries.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
    q_latent = torch.einsum("bthn,hnl->bthl", q_nope, w_key)
    scores = torch.einsum("bthl,bsl->bhts", q_latent, latent) + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scale
    time = q_nope.shape[1]
    if visible is None and time > 1:
        visible = torch.ones(time, time, dtype=torch.bool, device=scores.device).tril()
    if visible is not None:
        scores = scores.masked_fill(~(visible.unsqueeze(1) if visible.ndim == 3 else visible), float("-inf"))
    weights = scores.softmax(-1).to(latent.dtype)
    context = torch.einsum("bhts,bsl->bthl", weights, latent)
    return torch.einsum("bthl,hvl->bthv", context, w_value)
    """,
    """
    w_key, w_value = self.split_kv_b()
    latent = entries[..., : self.kv_lora_rank]
    query = torch.cat((rearrange(q_nope, "b t h n -> b h t n") @ w_key, q_rope.transpose(1, 2)), -1)
    scores = query @ entries.unsqueeze(1).transpose(-1, -2) * self.scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    time = scores.shape[-2]
    if visible is None and time > 1:
        above = torch.ones(time, time, device=scores.device).triu(1) > 0
        scores = scores.masked_fill(above, -torch.inf)
    elif visible is not None:
        shown = visible if visible.ndim == 2 else visible[:, None]
        scores = torch.where(shown, scores, -torch.inf)
    context = scores.softmax(dim=-1).to(latent.dtype) @ latent.unsqueeze(1)
    return rearrange(context @ w_value.mT, "b h t v -> b t h v")
    """,
    """
    w_key, w_value = self.split_kv_b()
    heads = []
    time = q_nope.shape[1]
    if visible is None and time > 1:
        visible = torch.ones(time, time, dtype=torch.bool, device=entries.device).tril()
    latent = entries[..., : self.kv_lora_rank]
    for head in range(self.num_heads):
        query = torch.cat((q_nope[:, :, head] @ w_key[head], q_rope[:, :, head]), dim=-1)
        scores = torch.bmm(query * self.scale, entries.transpose(1, 2))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        heads.append(scores.softmax(-1).to(entries.dtype) @ latent @ w_value[head].T)
    return torch.stack(heads, dim=2)
    """,
)


def probe(module, generator):
    """A latent wider than nope + rope, the causal mask, another mask, and one query over a longer past."""
    made = module.MultiheadLatentAttention(11, 3, 13, 5, 2, 4).double()
    with torch.no_grad():
        made.kv_b.weight.copy_(torch.randn(made.kv_b.weight.shape, generator=generator, dtype=torch.float64))
    parts = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 7, 3, 5), (2, 7, 3, 2), (2, 7, 15))
    ]
    visible = (torch.rand(2, 7, 7, generator=generator) < 0.6) | torch.eye(7, dtype=torch.bool)
    found = {"causal": made.absorbed(*parts, None), "masked": made.absorbed(*parts, visible)}
    last = [part[:, -1:] for part in parts[:2]]
    found["one query"] = made.absorbed(*last, parts[2], None)
    weights = torch.randn(4, generator=generator, dtype=torch.float64)
    sum((y * weights).sum() for y in found.values()).backward()
    names = ("q_nope", "q_rope", "the entries")
    return found | {f"gradient of {name}": part.grad for name, part in zip(names, parts)}
