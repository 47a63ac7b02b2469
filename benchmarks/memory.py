"""Memory of a train step compared with transformers' DeepseekV3: saved activations and the peak.

python -m benchmarks.memory  ->  benchmarks/results/memory-CPU.json

Each peak is measured in a separate process, above its memory before the model is created: weights,
gradients, both moments of AdamW, and everything else in three steps of 16 x 256 tokens. "trimmed" returns
freed memory to the system at once; otherwise the C library keeps an unpredictable part of it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from lm import loss
from lm.model import Transformer
from lm.optim import build_optimizer
from lm.train import TrainConfig, run_block

from . import record
from .peers import deepseek_v3, speed_model

CANDIDATES = ("ours", "ours, recomputed", "transformers grouped_mm", "transformers eager")
TRIMMED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def saved_bytes(run: Callable[[], object], without: list[Tensor]) -> int:
    """Bytes that autograd saves in run() for the backward pass, each storage once, without those given."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in known)


def measure(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Run three train steps of a candidate in this process -> megabytes at the peak and saved by the last"""
    if name.startswith("transformers"):
        from transformers import DeepseekV3ForCausalLM  # noqa: F401
    build_optimizer(torch.nn.Linear(8, 8), TrainConfig())  # all imports and libraries count as idle
    torch.randn(8, 8) @ torch.randn(8, 8)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model: torch.nn.Module = Transformer(speed_model())
    model.initialize(torch.Generator().manual_seed(0))
    if name.startswith("transformers"):
        model = deepseek_v3(model, name.split()[1])
    train = TrainConfig(recompute="recomputed" in name)
    optimizer = build_optimizer(model, train)
    generator = torch.Generator().manual_seed(1)
    found: dict[str, float] = {}

    def forward() -> Tensor:
        tokens = torch.randint(256, (16, 257), generator=generator)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if isinstance(model, Transformer):
                hidden, _ = model.trunk(tokens[:, :-1], run=run_block(train))
                logits = model.head(model.norm(hidden))
            else:
                logits = model(tokens[:, :-1]).logits
        return loss.cross_entropy(logits, tokens[:, 1:])

    for _ in range(3):
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()
    found["peak_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) * 1024 / 1e6
    found["kept_for_backward_mb"] = saved_bytes(forward, list(model.parameters())) / 1e6
    return {key: round(value, 1) for key, value in found.items()}


def in_a_process(name: str, dtype: str, environment: dict[str, str]) -> dict[str, float]:
    """`measure` in a new process with these environment variables."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--one", name, dtype],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run all measurements, print and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("CANDIDATE", "DTYPE"))
    one = parser.parse_args().one
    if one:
        print(json.dumps(measure(one[0], getattr(torch, one[1]))))
        return
    found: dict = {}
    for dtype in ("float32", "bfloat16"):
        for name in CANDIDATES:
            result = in_a_process(name, dtype, {})
            result["peak_trimmed_mb"] = in_a_process(name, dtype, TRIMMED)["peak_mb"]
            found[f"train step, 18M, {dtype}, batch 16 x 256, {name}"] = result
            print(dtype, name, json.dumps(result), flush=True)
    record.write("memory", found)


if __name__ == "__main__":
    main()
