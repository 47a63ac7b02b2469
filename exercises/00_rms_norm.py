"""What remains of LayerNorm without the mean and the bias?"""

import torch

from exercises.grader.watch import backward

TARGET = "mla.norm:rms_norm"
TESTS = ("tests/mla/test_norm.py",)
WHICH = "narrow or saved"
EQUATION = "RMSNorm eq. 4"
LEARN = "The norm divides by the root mean square, computed in fp32 even when the model runs in bf16."
HINTS = (
    "LayerNorm subtracts the mean, divides by the standard deviation and adds a bias. Which two does RMSNorm drop?",
    "Take the mean of the squares over the last axis and add eps inside the root: one factor per row (..., 1). "
    "Compute in fp32, and cast the final result back to x's dtype. Return the factor as well, in fp32.",
    "float, square, mean(-1, keepdim=True), rsqrt, type_as",
)
EXPECTS = {
    "x": "(..., dim), fp32, bf16 or fp16; any number of leading axes",
    "weight": "(dim,), fp32 or the dtype of x",
    "eps": "a float",
    "returns": "normed (..., dim), computed in fp32 and rounded once, at the end, to the dtype of x; and the factor 1 / root mean square (..., 1) in fp32",
}
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
    (
        "(wide * scale * weight).to(x.dtype)",
        "wide.mul_(scale).mul_(weight).to(x.dtype)",
        "x is overwritten: for fp32 input `to` returns x itself; use * instead of *= and mul_",
    ),
    (
        "wide * scale * weight",
        "wide * scale.detach() * weight",
        "the factor is detached: it depends on x too, so the gradient of x is wrong",
    ),
    (
        ".to(x.dtype), scale",
        ".to(x.dtype), scale.to(x.dtype)",
        "the factor is rounded to the dtype of x: return it in fp32",
    ),
    (
        "wide.square().mean",
        "x.square().to(wide.dtype).mean",
        "the squares are rounded to the dtype of x: cast x before squaring it",
    ),
    (
        "(wide * scale * weight).to(x.dtype)",
        "((wide * scale).to(x.dtype) * weight).to(x.dtype)",
        "x times the factor is rounded before the weight is applied: cast once, at the end",
    ),
    (
        "torch.promote_types(x.dtype, torch.float32)",
        "torch.float32 if x.dtype == torch.bfloat16 else x.dtype",
        "fp16 is not converted to fp32: squares above 65504 overflow",
    ),
    (
        ".to(x.dtype), scale",
        ".to(x.dtype), scale.detach()",
        "the returned factor is detached: its gradient is needed for the second derivative",
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
    """
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).type_as(x), scale
    """,
    """
    wide = x.float()
    squares = torch.einsum("...d,...d->...", wide, wide).unsqueeze(-1) / x.shape[-1]
    scale = 1 / (squares + eps).sqrt()
    return torch.einsum("...d,...d,d->...d", wide, scale.expand(wide.shape), weight.float()).to(x.dtype), scale
    """,
    """
    rows, scales = [], []
    for row in x.reshape(-1, x.shape[-1]):
        wide = row.float()
        scales.append(torch.rsqrt(torch.stack([value * value for value in wide.split(1)]).mean() + eps))
        rows.append((wide * scales[-1] * weight).to(x.dtype))
    return torch.stack(rows).reshape(x.shape), torch.stack(scales).reshape(*x.shape[:-1], 1)
    """,
)


def probe(module, generator):
    """Rows whose mean is far from zero, eps that matter, bf16, and large numbers in fp16."""
    found = {}
    x = (torch.randn(3, 5, 7, generator=generator) + 0.7) / 3
    weight = torch.randn(7, generator=generator)
    for tensor in (x, weight):
        tensor.requires_grad_()
    y, scale = module.rms_norm(x, weight, 0.01)
    backward((y * torch.randn(y.shape, generator=generator)).sum())
    found |= {"y": y, "scale": scale, "gradient of x": x.grad, "gradient of the weight": weight.grad}
    x.grad = None
    backward(module.rms_norm(x, weight, 0.01)[1].square().sum())
    found["gradient of x through the factor"] = x.grad
    found["y of small x"] = module.rms_norm(x.detach() / 2000, weight.detach(), 1e-6)[0]
    for name, dim in (("of bf16", 999), ("of bf16, short rows", 5)):
        half = (torch.randn(4, dim, generator=generator) + 0.5).bfloat16()
        y, scale = module.rms_norm(half, torch.randn(dim, generator=generator), 1e-6)
        found |= {f"y {name}": y, f"scale {name}": scale}
    half = (300 * torch.randn(4, 9, generator=generator)).half()  # the squares exceed fp16
    y, scale = module.rms_norm(half, torch.randn(9, generator=generator), 1e-6)
    found |= {"y of fp16": y, "scale of fp16": scale}
    found["scale of zeros"] = module.rms_norm(torch.zeros(1, 3), torch.ones(3), 1e-2)[1]
    return found
