"""Where does 2.446 come from?"""

import torch

TARGET = "experiments.gate_scale:gate_scale"
TESTS = ("tests/experiments/test_gate_scale.py",)
EQUATION = "Moonlight, arXiv 2502.16982, appendix"
LEARN = "A weighted sum of independent experts is smaller than one dense MLP's output; dividing by the weights' 2-norm compensates."
HINTS = (
    "If k independent outputs have equal norms, how large is their sum with weights p that add up to 1?",
    "Work in rounds of at most CHUNK tokens: draw logits (tokens, experts) from N(0, 1) with the generator; p is the "
    "top_k sigmoids over their sum; return the mean over all samples of 1 over the 2-norm of p.",
    "torch.randn(..., generator=generator), sigmoid, topk(...).values, sum(-1, keepdim=True), norm(dim=-1)",
)
EXPECTS = {
    "num_experts, top_k": "ints, top_k of num_experts are chosen",
    "samples": "int, any number of tokens, in rounds of at most CHUNK",
    "seed": "int, of one generator for all rounds",
    "returns": "a float",
}
MISTAKES = (
    (
        "logits.sigmoid().topk(top_k).values",
        "logits.softmax(-1).topk(top_k).values",
        "the scores are a softmax over all experts: V3 uses sigmoids",
    ),
    (
        "p = chosen / chosen.sum(-1, keepdim=True)",
        "p = chosen",
        "the chosen sigmoids are not divided by their sum",
    ),
    (
        "(1 / p.norm(dim=-1)).double().sum()",
        "p.norm(dim=-1).double().sum()",
        "the result is the norm itself: the factor compensates for it, so it is 1 over the norm",
    ),
    (
        "p.norm(dim=-1)",
        "p.norm(p=1, dim=-1)",
        "the 1-norm is used, which is always 1: the squares of independent outputs add up, so use the 2-norm",
    ),
    (
        "logits.sigmoid().topk(top_k).values",
        "logits.sigmoid()[:, :top_k]",
        "the first top_k experts are used: choose those with the highest scores",
    ),
    (
        "return total / samples",
        "return total / samples / top_k",
        "divided by top_k: return the mean over the samples",
    ),
    (
        "logits.sigmoid()",
        "logits.bfloat16().sigmoid()",
        "the sigmoids run in bf16: keep fp32",
    ),
    (
        "float((1 / p.norm(dim=-1)).double().sum())",
        "float((1 / p.norm(dim=-1)).bfloat16().sum())",
        "the factors are summed in bf16: sum them in float64",
    ),
    (
        "logits.sigmoid().topk",
        "logits.sigmoid_().topk(1) and logits.sigmoid().topk",
        "the logits are overwritten by their sigmoids, and the sigmoid is applied again",
    ),
    (
        "(1 / p.norm(dim=-1)).double().sum()",
        "1 / p.norm(dim=-1).double().mean() * len(p)",
        "the mean norm is inverted: average the inverses, 1 over the norm of each token",
    ),
    (
        "generator = torch.Generator().manual_seed(seed)",
        "generator = torch.manual_seed(seed)",
        "the global generator is seeded: create a torch.Generator",
    ),
    (
        "logits = torch.randn(",
        "generator = torch.Generator().manual_seed(seed)\n        logits = torch.randn(",
        "the generator is created anew in each round, so all rounds draw the same numbers",
    ),
)
RIGHT = (
    """
    generator = torch.Generator().manual_seed(seed)
    sums = []
    for start in range(0, samples, CHUNK):
        count = min(CHUNK, samples - start)
        scores = torch.sigmoid(torch.randn(count, num_experts, generator=generator))
        best = scores.sort(-1, descending=True).values[:, :top_k]
        sums.append((best.sum(-1) / best.square().sum(-1).sqrt()).double().sum())
    return float(sum(sums)) / samples
    """,
    """
    generator = torch.Generator().manual_seed(seed)
    scales = []
    for start in range(0, samples, CHUNK):
        logits = torch.randn(min(CHUNK, samples - start), num_experts, generator=generator)
        p = torch.nn.functional.normalize(logits.sigmoid().topk(top_k).values, p=1, dim=-1)
        scales.append(torch.linalg.vector_norm(p, dim=-1).reciprocal())
    return float(torch.cat(scales).double().mean())
    """,
    """
    generator = torch.Generator().manual_seed(seed)
    left, total = samples, torch.zeros((), dtype=torch.float64)
    while left > 0:
        now = min(CHUNK, left)
        chosen, _ = torch.randn(now, num_experts, generator=generator).topk(top_k)
        weights = chosen.sigmoid()
        weights = weights / weights.sum(1, keepdim=True)
        total += weights.pow(2).sum(1).rsqrt().double().sum()
        left -= now
    return (total / samples).item()
    """,
    """
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for start in range(0, samples, CHUNK):
        logits = torch.randn(min(CHUNK, samples - start), num_experts, generator=generator)
        for row in logits.sigmoid().topk(top_k).values.tolist():
            total += sum(row) / sum(value * value for value in row) ** 0.5
    return total / samples
    """,
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    while sum(map(len, parts)) < samples:
        count = min(CHUNK, samples - sum(map(len, parts)))
        p = torch.sigmoid(torch.randn(count, num_experts, generator=generator)).topk(top_k).values.double()
        p = p / torch.einsum("tk->t", p)[:, None]
        parts.append(torch.einsum("tk,tk->t", p, p) ** -0.5)
    return torch.cat(parts).mean().item()
    """,
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(min(CHUNK, samples - start), num_experts, generator=generator) for start in range(0, samples, CHUNK)]
    sums = []
    for logits in draws:
        scores = torch.exp(-torch.nn.functional.softplus(-logits.double()))
        best = scores.sort(-1).values[:, -top_k:]
        sums.append(((best.sum(-1) ** 2 / (best**2).sum(-1)) ** 0.5).sum())
    return float(torch.stack(sums).sum() / samples)
    """,
)


def probe(module, generator):
    """Moonlight's 6 of 64, and sizes that no model uses."""
    cases = {"6 of 64": (64, 6, 3000, 0), "3 of 11": (11, 3, 1700, 5), "1 of 4": (4, 1, 500, 2)}
    cases |= {"2 of 2": (2, 2, 900, 3), "in two rounds": (4, 3, 20_100, 4)}
    state = torch.get_rng_state()
    values = {name: module.gate_scale(*case) for name, case in cases.items()}
    module.CHUNK = 400
    values["in five rounds"] = module.gate_scale(11, 3, 1700, 5)
    found = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in values.items()}
    found["the results are floats"] = torch.tensor(all(type(value) is float for value in values.values()))
    unchanged = torch.equal(state, torch.get_rng_state())
    return found | {"the global random state is unchanged": torch.tensor(unchanged)}
