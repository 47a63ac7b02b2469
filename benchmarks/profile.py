"""Time per operator of a train step by torch.profiler, in fp32 and bf16 autocast.

python -m benchmarks.profile  ->  benchmarks/results/profile-CPU.json
"""

import torch
from torch.profiler import ProfilerActivity, profile

from lm import loss
from lm.model import Transformer
from lm.optim import build_optimizer
from lm.train import TrainConfig

from . import record
from .peers import speed_model

STEPS, SHOWN = 3, 25


def operators(dtype: torch.dtype) -> list[dict]:
    """The operators of a train step of 16 x 256 tokens, by their own time in descending order."""
    model = Transformer(speed_model())
    model.initialize(torch.Generator().manual_seed(0))
    optimizer = build_optimizer(model, TrainConfig())
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        tokens = torch.randint(256, (16, 257), generator=generator)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(tokens[:, :-1]).logits
        loss.cross_entropy(logits, tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            step()
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "operator": event.key,
            "share": round(event.self_cpu_time_total / total, 4),
            "ms": round(event.self_cpu_time_total / STEPS / 1e3, 2),
            "calls": event.count // STEPS,
        }
        for event in events[:SHOWN]
    ]


def main() -> None:
    """Profile both dtypes, print and save the tables."""
    found: dict = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"train step, 18M, {dtype}, batch 16 x 256"
        found[name] = operators(dtype)
        print(name)
        for row in found[name]:
            print(f"{row['share']:7.1%} {row['ms']:9.2f} ms {row['calls']:6} x  {row['operator']}")
    record.write("profile", found)


if __name__ == "__main__":
    main()
