"""What does MLA cache for a token?"""

import contextlib

import torch

from exercises.grader.watch import backward

TARGET = "mla.attention:MultiheadLatentAttention.compress"
TESTS = ("tests/mla/test_attention.py",)
WHICH = "(cache or latent or (equation or compressions) and expanded) and not autocast"
EQUATION = "DeepSeek-V3 eq. 1, 3"
LEARN = "One projection produces both cached parts; the latent is normed, the rope key is not."
HINTS = (
    "One projection produces the two cached parts. Which of them is normed?",
    "kv_a(x) is (batch, time, latent + rope), the latent first. Norm the latent; leave the rope key as it is, "
    "(batch, time, rope), one for all heads.",
    "self.kv_a, split([...], dim=-1), self.kv_norm",
)
EXPECTS = {
    "x": "(batch, time, dim), the dtype of the weights: fp32, bf16 or float64",
    "self.kv_a": "a linear layer, dim -> latent + rope, with or without bias; self.kv_norm: the norm of the latent",
    "returns": "latent (batch, time, latent), k_rope (batch, time, rope), in the dtype of x",
}
MISTAKES = (
    (
        "return self.kv_norm(latent), k_rope",
        "return latent, k_rope",
        "the latent is returned without its norm: the normed latent is cached and expanded",
    ),
    (
        "latent, k_rope = self.kv_a(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)",
        "k_rope, latent = self.kv_a(x).split([self.qk_rope_head_dim, self.kv_lora_rank], dim=-1)",
        "split in the wrong order: the latent comes first, then the rope key",
    ),
    (
        "self.kv_norm(latent), k_rope",
        "self.kv_norm(latent), k_rope * torch.rsqrt(k_rope.square().mean(-1, keepdim=True) + 1e-6)",
        "the rope key is normed too: norm only the latent",
    ),
    (
        "latent, k_rope = self.kv_a(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)",
        "both = self.kv_a(x)\n"
        "        both = both * torch.rsqrt(both.square().mean(-1, keepdim=True) + 1e-6)\n"
        "        latent, k_rope = both.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)\n"
        "        return latent * self.kv_norm.weight, k_rope",
        "one norm over latent and rope key together: norm the latent only",
    ),
    (
        "self.kv_norm(latent), k_rope",
        "self.kv_norm(latent), k_rope.unsqueeze(2).expand(-1, -1, self.num_heads, -1)",
        "the rope key is repeated for each head: all heads share one, and it is stored once",
    ),
    (
        "self.kv_norm(latent), k_rope",
        "self.kv_norm(latent.detach()), k_rope",
        "the latent is detached: no gradient reaches the projection through it",
    ),
    (
        "self.kv_norm(latent), k_rope",
        "self.kv_norm(latent), k_rope.float()",
        "the rope key is cast to fp32: keep the dtype of x",
    ),
    (
        "self.kv_norm(latent), k_rope",
        "self.kv_norm(latent.bfloat16()).to(x.dtype), k_rope",
        "the latent is rounded to bf16: keep the dtype of x",
    ),
    (
        "self.kv_norm(latent), k_rope",
        "self.kv_norm(latent), k_rope.mul_(k_rope.square().mean(-1, keepdim=True).rsqrt())",
        "the rope key is scaled in place: it stays as it is",
    ),
    (
        "self.kv_a(x)",
        "(x @ self.kv_a.weight.T)",
        "the bias of kv_a is missing: call the layer",
    ),
    (
        "self.kv_norm(latent), k_rope",
        "torch.nn.functional.rms_norm(latent, latent.shape[-1:], self.kv_norm.weight), k_rope",
        "the norm's eps is missing: call self.kv_norm, or pass self.kv_norm.eps",
    ),
    (
        "self.kv_norm(latent), k_rope",
        "self.kv_norm(latent.float()).to(x.dtype), k_rope",
        "the norm runs in fp32 for float64 too: keep the dtype of x, which self.kv_norm handles",
    ),
)
RIGHT = (
    """
    both = self.kv_a(x)
    latent, k_rope = both[..., : self.kv_lora_rank], both[..., self.kv_lora_rank :]
    return self.kv_norm(latent), k_rope
    """,
    """
    latent, k_rope = torch.split(self.kv_a(x), (self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
    latent = self.kv_norm(latent)
    return latent, k_rope
    """,
    """
    wide = torch.nn.functional.linear(x, self.kv_a.weight, self.kv_a.bias)
    k_rope = wide.narrow(-1, self.kv_lora_rank, self.qk_rope_head_dim)
    return self.kv_norm(wide.narrow(-1, 0, self.kv_lora_rank)), k_rope
    """,
    """
    both = torch.einsum("btd,cd->btc", x, self.kv_a.weight)
    if self.kv_a.bias is not None:
        both = both + self.kv_a.bias
    latent, k_rope = both.tensor_split([self.kv_lora_rank], dim=-1)
    return self.kv_norm(latent), k_rope
    """,
    """
    steps = [self.kv_a(x[:, time]) for time in range(x.shape[1])]
    latent = torch.stack([self.kv_norm(step[:, : self.kv_lora_rank]) for step in steps], dim=1)
    return latent, torch.stack([step[:, self.kv_lora_rank :] for step in steps], dim=1)
    """,
    """
    parts = []
    for start, width in ((0, self.kv_lora_rank), (self.kv_lora_rank, self.qk_rope_head_dim)):
        bias = None if self.kv_a.bias is None else self.kv_a.bias[start : start + width]
        parts.append(torch.nn.functional.linear(x, self.kv_a.weight[start : start + width], bias))
    return self.kv_norm(parts[0]), parts[1]
    """,
    """
    both = torch.func.functional_call(self.kv_a, dict(self.kv_a.named_parameters()), (x,))
    latent, k_rope = both.tensor_split((self.kv_lora_rank,), -1)
    wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.kv_norm.eps) * self.kv_norm.weight
    return normed.to(x.dtype), k_rope
    """,
)


def attention(module, generator):
    """A small attention whose sizes all differ and whose norm weights are not 1."""
    made = module.MultiheadLatentAttention(11, 3, 7, 5, 2, 4, q_lora_rank=6, qkv_bias=True)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 2)
    return made


def probe(module, generator):
    """Both parts with their gradients, a whole call, small x, no bias, float64, and the dtypes for bf16."""
    made = attention(module, generator)
    x = torch.randn(3, 5, 11, generator=generator, requires_grad=True)
    latent, k_rope = made.compress(x)
    found = {"latent": latent, "rope key": k_rope}
    loss = (latent * torch.randn(latent.shape, generator=generator)).sum()
    backward(loss + k_rope.square().sum())
    found |= {"gradient of x": x.grad, "gradient of the projection": made.kv_a.weight.grad}
    with contextlib.suppress(Exception):  # the latent and the rope key say what is wrong
        found["y"] = made(x)
    with torch.no_grad():
        made.kv_a.bias.zero_()
    found["latent of small x"] = made.compress(x.detach() / 2000)[0]  # where the norm's eps matters
    made.kv_a.bias = None
    latent, k_rope = made.double().compress(x.detach().double())
    found |= {"latent of float64": latent, "rope key of float64": k_rope}
    latent, k_rope = made.bfloat16().compress(x.detach().bfloat16())
    return found | {"latent of bf16": latent[:0], "rope key of bf16": k_rope[:0]}
