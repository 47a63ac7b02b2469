"""Why is decoding with MLA cheap?"""

import torch

from exercises.grader.watch import backward

TARGET = "mla.attention:MultiheadLatentAttention.absorbed"
TESTS = ("tests/mla/test_attention.py",)
WHICH = "(absorb or chunk or cache) and not transformers and not biases and not multiply_adds"
EQUATION = "DeepSeek-V2 section 2.1.2, DeepSeek-V3 eq. 9, 10"
LEARN = "q (W c) = (q W) c: the key and value matrices move to the query and the output, and the cache is read directly."
HINTS = (
    "(q W) c = q (W c): which side is cheaper for one query and many keys?",
    "Each head maps its query from nope to latent, and its result from latent to value. The scores (batch, heads, "
    "time, total) are [q_latent, q_rope] times the cache entries, in fp32 (float64 stays float64); the values are the latents.",
    "self.split_kv_b(), matmul or einsum twice, cat, masked_fill, softmax; a causal mask if visible is None",
)
EXPECTS = {
    "q_nope, q_rope": "(batch, time, heads, nope) and (batch, time, heads, rope), fp32, bf16 or float64",
    "entries": "(batch, total, latent + rope), the cache's entries, latent first, in the dtype of the query",
    "visible": "None: causal, and total = time unless time is 1; or bool, (time, total) or (batch, time, total), True where a query may look",
    "self.scale": "the softmax scale, which YaRN can change; self.split_kv_b() -> (heads, nope, latent), (heads, value, latent)",
    "returns": "(batch, time, heads, value), the dtype of the entries; softmax in fp32, or float64 for float64",
}
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
    (
        ".to(torch.promote_types(scores.dtype, torch.float32))",
        "",
        "the softmax runs in the dtype of the query: in bf16 its weights have three digits; cast the scores to fp32",
    ),
    (
        ".to(torch.promote_types(scores.dtype, torch.float32))",
        ".bfloat16()",
        "the scores are rounded to bf16: softmax in fp32, or float64 for float64",
    ),
    (
        ".to(torch.promote_types(scores.dtype, torch.float32))",
        ".float()",
        "the softmax runs in fp32 for float64 too: cast to torch.promote_types(scores.dtype, torch.float32)",
    ),
    (
        "~visible, float",
        "visible.logical_not_(), float",
        "visible is inverted in place: the next layer gets it too; use ~visible",
    ),
    (
        "latent = entries[..., : self.kv_lora_rank]",
        "latent = entries[..., : self.kv_lora_rank].detach()",
        "the values are detached: no gradient reaches the entries through them",
    ),
    (
        ".softmax(-1).to(entries.dtype)",
        ".softmax(-1)",
        "the weights stay in fp32: cast them to the dtype of the entries before the product",
    ),
    (
        "torch.cat((q_latent, q_rope.transpose(1, 2)), dim=-1)",
        "torch.cat((q_latent, q_rope.repeat_interleave(2, 2)[:, :, :heads].transpose(1, 2)), dim=-1)",
        "the rope queries of other heads are used: head h has its own",
    ),
    (
        "* self.scale",
        "* (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5",
        "the scale is recomputed: use self.scale, which YaRN can change",
    ),
    (
        "if visible is None and time > 1:  # no past: total == time\n            visible = torch.ones(time, time,",
        "if visible is None:\n            visible = torch.ones(time, entries.shape[1],",
        "a single query sees only the first entry: without visible it sees itself and all earlier tokens",
    ),
    (
        "scores.softmax(-1)",
        "(scores.exp() / scores.exp().sum(-1, keepdim=True))",
        "exp overflows for large scores: use softmax, or subtract the maximum first",
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
    """
    w_key, w_value = self.split_kv_b()
    time, total = q_nope.shape[1], entries.shape[1]
    dtype = torch.promote_types(entries.dtype, torch.float32)
    if visible is None:
        visible = torch.ones(time, total, dtype=torch.bool, device=entries.device).tril(total - time)
    rows = []
    for b in range(len(entries)):
        query = torch.cat((torch.einsum("thn,hnl->thl", q_nope[b], w_key), q_rope[b]), dim=-1)
        scores = torch.einsum("thc,sc->hts", query, entries[b]).to(dtype) * self.scale
        shown = visible if visible.ndim == 2 else visible[b]
        weights = scores.where(shown, -torch.inf).softmax(-1).to(entries.dtype)
        context = torch.einsum("hts,sl->thl", weights, entries[b, :, : self.kv_lora_rank])
        rows.append(torch.einsum("thl,hvl->thv", context, w_value))
    return torch.stack(rows)
    """,
    """
    w_key, w_value = self.split_kv_b()
    query = torch.cat((torch.einsum("bthn,hnl->bthl", q_nope, w_key), q_rope), dim=-1)
    scores = torch.einsum("bthc,bsc->bhts", query, entries)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scale
    if visible is None and scores.shape[-2] > 1:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if visible is not None:
        scores = scores + torch.zeros_like(scores).masked_fill(~(visible if visible.ndim == 2 else visible[:, None]), -torch.inf)
    power = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = (power / power.sum(-1, keepdim=True)).to(entries.dtype)
    return torch.einsum("bhts,bsl,hvl->bthv", weights, entries[..., : self.kv_lora_rank], w_value)
    """,
    """
    w_key, w_value = self.split_kv_b()
    time, out = q_nope.shape[1], []
    for t in range(time):
        if visible is None:
            shown = torch.arange(entries.shape[1], device=entries.device) <= (t if time > 1 else entries.shape[1])
        else:
            shown = visible[t] if visible.ndim == 2 else visible[:, t].unsqueeze(1)
        query = torch.cat(((q_nope[:, t].unsqueeze(2) @ w_key).squeeze(2), q_rope[:, t]), dim=-1)
        scores = query @ entries.mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scale
        weights = scores.masked_fill(~shown, -torch.inf).softmax(-1).to(entries.dtype)
        context = weights @ entries[..., : self.kv_lora_rank]
        out.append((context.unsqueeze(2) @ w_value.mT).squeeze(2))
    return torch.stack(out, dim=1)
    """,
    """
    w_key, w_value = self.split_kv_b()
    q = torch.cat((torch.einsum('bthn,hnl->bthl', q_nope, w_key), q_rope), -1)
    y = softmax_attention(q, entries.unsqueeze(2), entries[..., : self.kv_lora_rank].unsqueeze(2), self.scale, visible)
    return torch.einsum('bthl,hvl->bthv', y, w_value)
    """,
)


def probe(module, generator):
    """A latent wider than nope + rope, the causal mask, other masks, one query over a past, float64, large scores, bf16."""
    made = module.MultiheadLatentAttention(11, 3, 13, 5, 2, 4)
    made.scale *= 1.3  # as YaRN does
    with torch.no_grad():
        made.kv_b.weight.copy_(torch.randn(made.kv_b.weight.shape, generator=generator))
    parts = [
        torch.randn(shape, generator=generator, requires_grad=True)
        for shape in ((2, 7, 3, 5), (2, 7, 3, 2), (2, 7, 15))
    ]
    visible = (torch.rand(2, 7, 7, generator=generator) < 0.6) | torch.eye(7, dtype=torch.bool)
    last = [part[:, -1:] for part in parts[:2]]
    found = {
        "causal": made.absorbed(*parts, None),
        "masked": made.absorbed(*parts, visible),
        "masked, one mask": made.absorbed(*parts, visible[1].clone()),
        "two queries": made.absorbed(*(part[:, :2] for part in parts), None),
        "one query": made.absorbed(*last, parts[2], None),
    }
    weights = torch.randn(4, generator=generator)
    backward(sum((y * weights).sum() for y in found.values()))
    names = ("q_nope", "q_rope", "the entries")
    found |= {f"gradient of {name}": part.grad for name, part in zip(names, parts)}
    found["causal, float64"] = made.double().absorbed(*(part.detach().double() for part in parts), None)
    large = [part.detach().double() * 300 for part in parts]
    found["causal, large scores"] = made.absorbed(*large, None)
    y = made.bfloat16().absorbed(*(part.detach().bfloat16() for part in parts), None)
    return found | {"causal, bf16": y[:0]}
