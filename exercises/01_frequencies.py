"""How fast does each pair of features rotate?"""

import torch

TARGET = "mla.rope:frequencies"
TESTS = ("tests/mla/test_rope.py",)
WHICH = "(frequenc or angle or turn or position) and not 131072"
EQUATION = "RoFormer eq. 15"
LEARN = (
    "Pair i rotates by theta^(-2i/dim) radians per position: the first pair fast, the last one very slowly."
)
HINTS = (
    "How many pairs does a head of dim features have, and what is the exponent of the last one?",
    "(dim/2,) frequencies in fp32 on the device, from 1 down to nearly 1/theta: one over theta to the power of "
    "0, 2, 4, ... over dim. If there is a scaling, it slows them down afterwards.",
    "torch.arange(0, dim, 2, dtype, device), a power of theta, scaling.slow_down(turn, theta)",
)
EXPECTS = {
    "dim": "an even int, the features of a head that rotate",
    "theta": "a float, the base",
    "scaling": "None, or an object whose slow_down(turn, theta) returns the scaled frequencies",
    "device": "where the result must be",
    "returns": "(dim/2,) fp32, radians per position, high to low",
}
MISTAKES = (
    (
        "torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim",
        "torch.arange(0, dim // 2, dtype=torch.float32, device=device) / dim",
        "the exponent is i/dim: for pair i it is 2i/dim",
    ),
    (
        "1.0 / theta **",
        "theta **",
        "later pairs rotate faster: the exponent must be negative",
    ),
    (
        "torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim",
        "torch.arange(2, dim + 2, 2, dtype=torch.float32, device=device) / dim",
        "the pairs are counted from 1: count from 0, so that the first pair rotates by a whole radian",
    ),
    (
        "torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim",
        "torch.arange(0, dim, 2, dtype=torch.float32, device=device) / (dim - 2)",
        "divided by dim - 2: divide by dim; the last pair does not quite reach 1/theta",
    ),
    (
        "turn if scaling is None else scaling.slow_down(turn, theta)",
        "turn",
        "the scaling is missing",
    ),
    (
        "torch.arange(0, dim, 2, dtype=torch.float32, device=device)",
        "torch.arange(0, dim, 1, dtype=torch.float32, device=device)",
        "one frequency per feature: two features form a pair and share one frequency",
    ),
    (
        "torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim",
        "(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim).bfloat16().float()",
        "the exponents are rounded to bf16: compute them in fp32",
    ),
    (
        "return turn if scaling",
        "turn = turn.bfloat16().float()\n        return turn if scaling",
        "the frequencies are rounded to bf16: angles of late positions would be off by whole turns",
    ),
    (
        "return turn if scaling",
        "turn = turn.double()\n        return turn if scaling",
        "the result is float64: return fp32",
    ),
    (
        "dtype=torch.float32, device=device",
        "dtype=torch.float32",
        "the device is ignored: create the frequencies on it",
    ),
    (
        "scaling.slow_down(turn, theta)",
        "scaling.slow_down(turn, 10000.0)",
        "the scaling is given another base: pass theta",
    ),
)
RIGHT = (
    """
    pair = torch.arange(dim // 2, device=device, dtype=torch.float32)
    turn = theta ** (-2 * pair / dim)
    return turn if scaling is None else scaling.slow_down(turn, theta)
    """,
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device).div(dim)
    turn = torch.pow(torch.tensor(theta, dtype=torch.float32, device=device), -exponents)
    if scaling is not None:
        turn = scaling.slow_down(turn, theta)
    return turn
    """,
    """
    turn = torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float32, device=device)
    if scaling is None:
        return turn
    return scaling.slow_down(turn, theta)
    """,
    """
    turn = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32, device=device) * (-math.log(theta) / dim))
    return turn if scaling is None else scaling.slow_down(turn, theta)
    """,
    """
    speeds = [1.0]
    for _ in range(dim // 2 - 1):
        speeds.append(speeds[-1] * theta ** (-2 / dim))
    turn = torch.tensor(speeds, dtype=torch.float64).to(device, torch.float32)
    return turn if scaling is None else scaling.slow_down(turn, theta)
    """,
    """
    ones = torch.full((dim // 2,), theta ** (-2 / dim), dtype=torch.float64, device=device)
    ones[0] = 1.0
    turn = ones.cumprod(0).float()
    return scaling.slow_down(turn, theta) if scaling else turn
    """,
)


def probe(module, generator):
    """Two sizes, two bases, with and without a scaling, and another device."""
    cpu, meta = torch.device("cpu"), torch.device("meta")
    turn = module.frequencies(14, 10000.0, None, cpu)
    return {
        "of 14 features": turn,
        "of 14 features, relative": turn * 10000.0 ** (torch.arange(0, 14, 2) / 14),
        "of 6 features": module.frequencies(6, 2.5, None, cpu),
        "slowed down": module.frequencies(10, 500.0, module.YaRN(3.0, 100), cpu),
        "it is on the given device": torch.tensor(module.frequencies(6, 300.0, None, meta).device == meta),
    }
