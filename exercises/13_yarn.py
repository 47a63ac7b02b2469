"""How can a model trained on 4k tokens read 128k?"""

import torch

TARGET = "mla.rope:YaRN.slow_down"
TESTS = ("tests/mla/test_rope.py",)
WHICH = "(yarn or scaled or pair) and not refused and not 131072"
EQUATION = "YaRN section 3.2"
LEARN = "Pairs that rotate often within the original context keep their speed; slow pairs are slowed down further."
HINTS = (
    "How many turns does a pair make in 4096 tokens? Which pairs have covered every angle in training?",
    "(dim/2,) numbers between 1 (fast: kept) and 0 (slow: divided by factor): a ramp over the pair indices, from "
    "the floor of the pair with beta_fast turns to the ceil of the pair with beta_slow, both clamped to 0..dim - 1.",
    "self.pair_with(turns, dim, theta), math.floor, math.ceil, torch.arange, clamp(0, 1)",
)
EXPECTS = {
    "turn": "(dim/2,) fp32, radians per position, high to low; it is cached by the caller: leave it unchanged",
    "theta": "a float, the base of turn",
    "self.factor, self.beta_fast, self.beta_slow": "floats",
    "returns": "(dim/2,) fp32",
}
MISTAKES = (
    (
        "kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)",
        "kept = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)",
        "the ramp is reversed: keep the fast pairs and divide the slow ones by the factor",
    ),
    (
        "return turn / self.factor * (1 - kept) + turn * kept",
        "return turn / self.factor",
        "every pair is slowed down: that is position interpolation; YaRN keeps the fast pairs",
    ),
    (
        ".clamp(0, 1)",
        "",
        "the ramp is not clamped to 0..1",
    ),
    (
        "math.floor(self.pair_with(self.beta_fast, dim, theta))",
        "math.floor(self.pair_with(self.beta_slow, dim, theta))",
        "the ramp starts at the pair with beta_slow turns: it must start at beta_fast and end at beta_slow",
    ),
    (
        "turn / self.factor * (1 - kept)",
        "turn * self.factor * (1 - kept)",
        "slow pairs are made faster: a longer context needs slower rotation",
    ),
    (
        "dim = 2 * len(turn)",
        "dim = len(turn)",
        "dim is set to the number of pairs: a pair is two features",
    ),
    (
        "return turn / self.factor * (1 - kept) + turn * kept",
        "return turn.copy_(turn / self.factor * (1 - kept) + turn * kept)",
        "turn is overwritten: return a new tensor",
    ),
    (
        "pairs = torch.arange(len(turn), dtype=torch.float32",
        "pairs = torch.arange(len(turn), dtype=torch.float64",
        "the result is float64: keep fp32",
    ),
    (
        "kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)",
        "kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1).bfloat16()",
        "the ramp is rounded to bf16: compute it in fp32",
    ),
    (
        "kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)",
        "kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1).round()",
        "the ramp is rounded to 0 and 1: pairs in between are slowed down partly",
    ),
    (
        "max(high - low, 0.001)",
        "(high - low)",
        "the ramp is divided by high - low, which can be 0 or negative: by at least 0.001",
    ),
)
RIGHT = (
    """
    dim = 2 * turn.numel()
    low = max(0, math.floor(self.pair_with(self.beta_fast, dim, theta)))
    high = min(dim - 1, math.ceil(self.pair_with(self.beta_slow, dim, theta)))
    ramp = (torch.arange(dim // 2, device=turn.device, dtype=torch.float32) - low) / max(high - low, 0.001)
    slow = ramp.clamp(min=0, max=1)
    return torch.lerp(turn, turn / self.factor, slow)
    """,
    """
    dim = 2 * len(turn)
    low = max(math.floor(self.pair_with(self.beta_fast, dim, theta)), 0)
    high = min(math.ceil(self.pair_with(self.beta_slow, dim, theta)), dim - 1)
    new = []
    for pair, speed in enumerate(turn):
        slow = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
        new.append(speed * (1 - slow) + speed / self.factor * slow)
    return torch.stack(new)
    """,
    """
    dim = 2 * len(turn)
    edges = [self.pair_with(beta, dim, theta) for beta in (self.beta_fast, self.beta_slow)]
    low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), dim - 1)
    index = torch.arange(len(turn), dtype=turn.dtype, device=turn.device)
    kept = torch.clip((high - index) / (high - low) if high > low else (index <= low).to(turn), 0, 1)
    return turn * (kept + (1 - kept) / self.factor)
    """,
    """
    dim, speeds = 2 * len(turn), turn.tolist()
    low = max(math.floor(self.pair_with(self.beta_fast, dim, theta)), 0)
    high = min(math.ceil(self.pair_with(self.beta_slow, dim, theta)), dim - 1)
    slow = [min(max((i - low) / max(high - low, 0.001), 0), 1) for i in range(len(speeds))]
    mixed = [speed * (1 - s) + speed / self.factor * s for speed, s in zip(speeds, slow)]
    return torch.tensor(mixed, dtype=turn.dtype, device=turn.device)
    """,
    """
    dim = 2 * len(turn)
    low = max(math.floor(self.pair_with(self.beta_fast, dim, theta)), 0)
    high = min(math.ceil(self.pair_with(self.beta_slow, dim, theta)), dim - 1)
    slow = ((torch.arange(len(turn), device=turn.device) - low) / max(high - low, 0.001)).clamp(0, 1)
    shares = torch.stack((1 - slow, slow), dim=1)
    return torch.einsum("pk,pk->p", shares, torch.stack((turn, turn / self.factor), dim=1))
    """,
    """
    dim = 2 * len(turn)
    low = max(math.floor(self.pair_with(self.beta_fast, dim, theta)), 0)
    high = min(math.ceil(self.pair_with(self.beta_slow, dim, theta)), dim - 1)
    new = turn.clone()
    for pair in range(len(turn)):
        if pair > low:
            slow = min((pair - low) / max(high - low, 0.001), 1)
            new[pair] = turn[pair] * (1 - slow + slow / self.factor)
    return new
    """,
    """
    dim = 2 * len(turn)
    low = max(math.floor(self.pair_with(self.beta_fast, dim, theta)), 0)
    high = min(math.ceil(self.pair_with(self.beta_slow, dim, theta)), dim - 1)
    i = torch.arange(len(turn), device=turn.device).double()
    ramp = ((i - low) / max(high - low, 0.001)).clamp(0, 1)
    return (turn.double() * (1 - ramp) + turn.double() / self.factor * ramp).to(turn.dtype)
    """,
)


def probe(module, generator):
    """Ramps in the middle, before the first pair and after the last, other betas."""
    found = {}
    for name, dim, theta, yarn in (
        ("as in DeepSeek", 64, 10000.0, module.YaRN(40.0, 4096)),
        ("short context", 34, 500.0, module.YaRN(4.0, 128)),
        ("ramp beyond the last pair", 22, 10.0, module.YaRN(4.0, 690)),
        ("a context far beyond the ramp", 22, 10.0, module.YaRN(4.0, 10**9)),
        ("no context to speak of", 22, 10000.0, module.YaRN(4.0, 4)),
        ("other betas", 22, 10000.0, module.YaRN(7.0, 700, beta_fast=9.0, beta_slow=2.0)),
    ):
        turn = theta ** (-torch.arange(0, dim, 2) / dim)
        new = yarn.slow_down(turn, theta)
        found |= {name: new, f"{name}, the slowest pairs": new[-4:] / turn[-4:]}
    return found
