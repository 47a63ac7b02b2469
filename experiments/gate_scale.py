"""Where do the routed scaling factors of Moonlight, 2.446, and Kimi K2, 2.827, come from?

lm experiment gate_scale [--quick]  ->  experiments/results/gate_scale.json

Claim (Moonlight, arXiv 2502.16982, appendix): the factor is the mean of 1/||p||_2 over Gaussian logits, p
the normalised sigmoids of the top k. Independent expert outputs of equal size then add up to that size, as
that of one dense MLP. Kimi K2's factor is the one for V3's 256 experts; its own 384 give 0.0004 more.
"""

import json

import torch

from lm import files, machine
from lm.config import Config

from . import command

CASES = (("moonlight", 64), ("kimi-k2", 384), ("kimi-k2", 256))  # preset, experts
SAMPLES, QUICK_SAMPLES = 200_000, 2_000
CHUNK = 20_000  # samples held in memory at once
SEED = 0


def gate_scale(num_experts: int, top_k: int, samples: int, seed: int) -> float:
    """The mean of 1 / ||p||_2 over `samples` tokens with logits from N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for start in range(0, samples, CHUNK):
        logits = torch.randn(min(CHUNK, samples - start), num_experts, generator=generator)
        chosen = logits.sigmoid().topk(top_k).values  # (tokens, top_k)
        p = chosen / chosen.sum(-1, keepdim=True)
        total += float((1 / p.norm(dim=-1)).double().sum())
    return total / samples


def main(arguments: list[str] | None = None) -> None:
    """Compute each model's factor and compare it with the published one."""
    made = command.parser("gate_scale", __doc__)
    given = made.parse_args(arguments)
    command.check_folders(made, given)
    samples = QUICK_SAMPLES if given.quick else SAMPLES
    rows = []
    for preset, num_experts in CASES:
        moe = Config.preset(preset).model.moe
        sizes = {"model": preset, "num_experts": num_experts, "top_k": moe.top_k}
        computed = round(gate_scale(num_experts, moe.top_k, samples, SEED), 4)
        rows.append({**sizes, "computed": computed, "published": moe.routed_scaling_factor})
    found = {"machine": machine.describe(), "samples": samples, "seed": SEED, "gate_scale": rows}
    text, path = json.dumps(found, indent=1), given.out / "gate_scale.json"
    files.write_file(path, text + "\n")
    print(text)
    if given.no_verdict:
        print(f"No verdict: {given.no_verdict}.")
    print(f"Result: {command.place(path)}")


if __name__ == "__main__":
    main()
