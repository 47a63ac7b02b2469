"""Which two features rotate together, and in which direction?"""

import torch

from exercises.grader.watch import backward

TARGET = "mla.rope:RotaryEmbedding.turn"
TESTS = ("tests/mla/test_rope.py",)
WHICH = "not transformers and not permutation and not fp32_angles and not position_0 and not heads_share and not not_cos and not papers_yarn"
EQUATION = "RoFormer eq. 15"
LEARN = "Two features form a plane that rotates; which two depends on the checkpoint's layout, so you have to know it."
HINTS = (
    "Rotate a vector (a, b) by an angle: what are its new coordinates? Which two features are (a, b)?",
    "even and odd (..., dim/2): features 2i and 2i + 1 if interleaved, else i and i + dim/2. Rotate each pair by its "
    "angle in fp32, put both features back where they were, and cast to x's dtype.",
    "float, unflatten, unbind, stack, flatten, or slices 0::2 and 1::2, type_as",
)
EXPECTS = {
    "x": "(..., dim), fp32, bf16 or fp16",
    "cos, sin": "(..., dim/2) fp32 each; their leading axes broadcast against those of x",
    "self.interleaved": "True: features 2i and 2i + 1 are a pair; False: i and i + dim/2",
    "returns": "the rotated x, the same shape and dtype",
}
MISTAKES = (
    (
        "if self.interleaved else",
        "if not self.interleaved else",
        "the pairs are those of the other layout: interleaved means features 2i and 2i + 1",
    ),
    (
        "even * cos - odd * sin, even * sin + odd * cos",
        "even * cos + odd * sin, odd * cos - even * sin",
        "the rotation goes the wrong way: (a, b) becomes (a cos - b sin, a sin + b cos)",
    ),
    (
        "even * cos - odd * sin, even * sin + odd * cos",
        "even * cos - odd * sin, odd * cos - even * sin",
        "a sign is wrong: lengths change, so this is not a rotation",
    ),
    (
        "dim=two)",
        "dim=-1 if two == -2 else -2)",
        "the rotated pairs are put back in the other layout",
    ),
    (
        "(-1, (-1, 2)) if self.interleaved else (-2, (2, -1))",
        "(-1, (-1, 2))",
        "interleaved=False is ignored: in that case features i and i + dim/2 are a pair",
    ),
    (
        "wide = x.to(torch.promote_types(x.dtype, torch.float32))",
        "wide, cos, sin = x, cos.to(x.dtype), sin.to(x.dtype)",
        "computed in the dtype of x: bf16 is too coarse for sines and cosines; compute in fp32, then cast",
    ),
    (
        ".to(x.dtype)",
        "",
        "the result stays in fp32: cast it back to the dtype of x",
    ),
    (
        "return turned.flatten(-2).to(x.dtype)",
        "return x.copy_(turned.flatten(-2))",
        "x is overwritten: return a new tensor",
    ),
    (
        "wide = x.to(torch.promote_types(x.dtype, torch.float32))",
        "wide = x.to(torch.promote_types(x.dtype, torch.float32)).detach()",
        "x is detached: no gradient reaches it",
    ),
    (
        "wide = x.to(torch.promote_types(x.dtype, torch.float32))",
        "wide = x.to(torch.bfloat16)",
        "x is rounded to bf16 first: keep fp32 as it is",
    ),
    (
        ".to(x.dtype)",
        ".double()",
        "the result is float64: cast it back to the dtype of x",
    ),
)
RIGHT = (
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if self.interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
    else:
        a, b = wide.chunk(2, dim=-1)
    new_a, new_b = a * cos - b * sin, b * cos + a * sin
    if self.interleaved:
        return torch.stack((new_a, new_b), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((new_a, new_b), dim=-1).to(x.dtype)
    """,
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if self.interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        a, b = wide[..., 0::2], wide[..., 1::2]
        other = torch.stack((-b, a), dim=-1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        a, b = wide.chunk(2, dim=-1)
        other = torch.cat((-b, a), dim=-1)
    return (wide * cos + other * sin).to(x.dtype)
    """,
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    half = x.shape[-1] // 2
    first = torch.arange(half, device=x.device) * (2 if self.interleaved else 1)
    second = first + (1 if self.interleaved else half)
    a, b = wide[..., first], wide[..., second]
    y = torch.empty(torch.broadcast_shapes(wide.shape, (*cos.shape[:-1], 2 * half)), dtype=wide.dtype, device=x.device)
    y[..., first] = a * cos - b * sin
    y[..., second] = a * sin + b * cos
    return y.to(x.dtype)
    """,
    """
    wide = x.float()
    if self.interleaved:
        z = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    else:
        z = torch.complex(*wide.chunk(2, dim=-1))
    z = z * torch.complex(cos, sin)
    if self.interleaved:
        return torch.view_as_real(z).flatten(-2).type_as(x)
    return torch.cat((z.real, z.imag), dim=-1).type_as(x)
    """,
    """
    rotation = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)  # (..., pairs, 2, 2)
    wide = x.float()
    if self.interleaved:
        pairs = wide.reshape(*x.shape[:-1], -1, 2)
        return torch.einsum("...pij,...pj->...pi", rotation, pairs).flatten(-2).to(x.dtype)
    pairs = wide.reshape(*x.shape[:-1], 2, -1)
    return torch.einsum("...pij,...jp->...ip", rotation, pairs).flatten(-2).to(x.dtype)
    """,
    """
    wide, half = x.float(), x.shape[-1] // 2
    columns = [None] * (2 * half)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if self.interleaved else (i, i + half)
        columns[a] = wide[..., a] * cos[..., i] - wide[..., b] * sin[..., i]
        columns[b] = wide[..., a] * sin[..., i] + wide[..., b] * cos[..., i]
    return torch.stack(columns, dim=-1).to(x.dtype)
    """,
    """
    wide = x.float()
    a, b = (wide[..., ::2], wide[..., 1::2]) if self.interleaved else wide.chunk(2, -1)
    z = torch.polar((a * a + b * b).sqrt(), torch.atan2(b, a)) * torch.complex(cos, sin)
    if self.interleaved:
        return torch.view_as_real(z).flatten(-2).to(x.dtype)
    return torch.cat((z.real, z.imag), -1).to(x.dtype)
    """,
)


def probe(module, generator):
    """Both layouts, positions that do not start at 0, and bf16."""
    found = {}
    for interleaved in (True, False):
        rope = module.RotaryEmbedding(10, 50.0, interleaved)
        x = torch.randn(3, 5, 2, 10, generator=generator, requires_grad=True)
        positions = torch.tensor([3, 4, 7, 11, 12])
        y = rope(x, positions)
        name = "interleaved" if interleaved else "in halves"
        found[f"y, {name}"] = y
        backward((y * torch.randn(y.shape, generator=generator)).sum())
        found[f"gradient of x, {name}"] = x.grad
        half = torch.randn(1, 5, 10, generator=generator).bfloat16()
        found[f"y of bf16, {name}"] = rope(half, positions + 700)
    return found
