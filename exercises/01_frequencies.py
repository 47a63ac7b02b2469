"""How fast does each pair of features turn?"""

import torch

TARGET = "mla.rope:frequencies"
TESTS = ("tests/mla/test_rope.py",)
WHICH = "(frequenc or angle or turn or position) and not 131072"
EQUATION = "RoFormer eq. 15"
LEARN = "Pair i turns by theta^(-2i/dim) radians a position: the first fast, the last hardly ever."
HINTS = (
    "How many pairs has a head of dim features, and which exponent has the last one?",
    "(dim/2,) numbers in fp32 on the device, from 1 down to nearly 1/theta: the even numbers 0, 2, .. over dim, "
    "as a power of theta, inverted. A scaling makes them slower by itself.",
    "torch.arange(0, dim, 2, dtype, device), a power of theta, scaling.slow_down(turn, theta)",
)
MISTAKES = (
    (
        "torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim",
        "torch.arange(0, dim // 2, dtype=torch.float32, device=device) / dim",
        "the exponent is i/dim: pair i has 2i/dim",
    ),
    (
        "1.0 / theta **",
        "theta **",
        "the pairs turn faster and faster: the exponent is negative",
    ),
    (
        "torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim",
        "torch.arange(2, dim + 2, 2, dtype=torch.float32, device=device) / dim",
        "the pairs are counted from 1: the first one turns by a whole radian",
    ),
    (
        "torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim",
        "torch.arange(0, dim, 2, dtype=torch.float32, device=device) / (dim - 2)",
        "divided by dim - 2: the last pair does not reach 1/theta, the exponent is 2i/dim",
    ),
    (
        "turn if scaling is None else scaling.slow_down(turn, theta)",
        "turn",
        "the scaling is left out",
    ),
    (
        "torch.arange(0, dim, 2, dtype=torch.float32, device=device)",
        "torch.arange(0, dim, 1, dtype=torch.float32, device=device)",
        "a number for each feature: two features are one pair and turn together",
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
)


def probe(module, generator):
    """Two sizes, two bases, with and without a scaling."""
    cpu = torch.device("cpu")
    return {
        "of 14 features": module.frequencies(14, 10000.0, None, cpu),
        "of 6 features": module.frequencies(6, 300.0, None, cpu),
        "slowed down": module.frequencies(10, 500.0, module.Linear(3.0), cpu),
    }
