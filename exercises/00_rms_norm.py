"""What remains of LayerNorm without the mean and the bias?"""

import torch

TARGET = "mla.norm:rms_norm"
TESTS = ("tests/mla/test_norm.py",)
EQUATION = "RMSNorm eq. 4"
LEARN = "The norm divides by the root mean square, computed in fp32 even when the model runs in bf16."
HINTS = (
    "LayerNorm subtracts the mean, divides by the standard deviation and adds a bias. Which two does RMSNorm drop?",
    "Take the mean of the squares over the last axis and add eps inside the root: one factor per row (..., 1). "
    "Compute in fp32 or better, and cast the result back to x's dtype. Return the factor as well.",
    "torch.promote_types, to, square, mean(-1, keepdim=True), rsqrt",
)
MISTAKES = (
    (
        "wide = x.to(torch.promote_types(x.dtype, torch.float32))",
        "wide = x.to(torch.promote_types(x.dtype, torch.float32))\n    wide = wide - wide.mean(-1, keepdim=True)",
        "the mean is subtracted: that is LayerNorm; RMSNorm does not centre",
    ),
    (
        "torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)",
        "1 / (wide.square().mean(-1, keepdim=True).sqrt() + eps)",
        "eps is added outside the root: it belongs inside",
    ),
    (
        "wide.square().mean(-1, keepdim=True)",
        "wide.square().sum(-1, keepdim=True)",
        "the sum of the squares is used instead of their mean",
    ),
    (
        "wide.square().mean(-1, keepdim=True)",
        "wide.square().mean()",
        "one mean for all rows: each row has its own, over the last axis",
    ),
    (
        "torch.promote_types(x.dtype, torch.float32)",
        "x.dtype",
        "the mean is computed in the dtype of x: bf16 has only about three digits; compute in fp32, then cast",
    ),
    (
        "(wide * scale * weight).to(x.dtype)",
        "wide * scale * weight",
        "the result stays in fp32: cast it back to the dtype of x",
    ),
    ("wide * scale * weight", "wide * scale", "the weight is missing"),
    (
        "torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)",
        "torch.rsqrt(wide.square().mean(-1, keepdim=True))",
        "eps is missing: a row of zeros would be divided by zero",
    ),
)
RIGHT = (
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.pow(2).mean(dim=-1, keepdim=True) + eps).pow(-0.5)
    return (weight * (wide * scale)).type_as(x), scale
    """,
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype) ** 2 / x.shape[-1]
    scale = 1 / torch.sqrt(squares + eps)
    return (x.to(dtype) * scale * weight).to(x.dtype), scale
    """,
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    size = wide.shape[-1]
    scale = torch.rsqrt((wide * wide).sum(-1, keepdim=True) / size + eps)
    normed = wide * scale
    return (normed * weight).to(x.dtype), scale
    """,
)


def probe(module, generator):
    """Rows whose mean is far from zero, an eps large enough to matter, and bf16."""
    found = {}
    x = (torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) + 0.7) / 3
    weight = torch.randn(7, generator=generator, dtype=torch.float64)
    for tensor in (x, weight):
        tensor.requires_grad_()
    y, scale = module.rms_norm(x, weight, 0.01)
    (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum().backward()
    found |= {"y": y, "scale": scale, "gradient of x": x.grad, "gradient of the weight": weight.grad}
    half = (torch.randn(2, 999, generator=generator) + 0.5).bfloat16()
    y, scale = module.rms_norm(half, torch.ones(999), 1e-6)
    found |= {"y of bf16": y, "scale of bf16": scale}
    found["scale of zeros"] = module.rms_norm(torch.zeros(1, 3), torch.ones(3), 1e-2)[1]
    return found
