"""Train step and decoding beside transformers' DeepseekV3: same sizes, weights and dtype, in turns.

python -m benchmarks.speed [--rounds N]  ->  benchmarks/results/speed-CPU.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lm import loss, machine
from lm.config import Config, ModelConfig
from lm.model import Transformer

from .peers import deepseek_v3, speed_model

RUN = 8  # decoding steps in a row: text is not written a token from each of two models in turn
RESULTS = Path(__file__).parent / "results"


def in_turns(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the candidates in turns; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def train_step(config: ModelConfig, dtype: torch.dtype, rounds: int) -> dict:
    """Forward, backward, AdamW: ours and transformers' with each of its experts, on new tokens each time."""
    ours = Transformer(config)
    ours.initialize(torch.Generator().manual_seed(0))
    batch, context = 16, 256
    models = {"ours": ours, **{f"transformers {e}": deepseek_v3(ours, e) for e in ("grouped_mm", "eager")}}
    generator = torch.Generator().manual_seed(1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        tokens = torch.randint(config.vocab_size, (batch, context + 1), generator=generator)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(tokens[:, :-1]).logits
        loss.cross_entropy(logits, tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        calls[name] = lambda model=model, optimizer=optimizer: step(model, optimizer)
    return summary(in_turns(calls, rounds), batch * context)


@torch.inference_mode()
def decode(config: ModelConfig, context: int, batch: int, rounds: int) -> dict:
    """One token more at a context, fp32, of ours and of transformers' from its own cache."""
    ours = Transformer(config)
    ours.initialize(torch.Generator().manual_seed(0))
    theirs = deepseek_v3(ours)
    tokens = torch.randint(config.vocab_size, (batch, context))
    caches = ours.new_caches(batch, context + RUN * (rounds + 1))
    for chunk in tokens.split(256, dim=1):
        ours(chunk, caches)
    past, last = theirs(tokens, use_cache=True).past_key_values, tokens[:, -1:]
    calls = {
        "ours": lambda: [ours(last, caches) for _ in range(RUN)],
        "transformers grouped_mm": lambda: [theirs(last, past_key_values=past) for _ in range(RUN)],
    }
    seconds = in_turns(calls, rounds)
    return summary({name: [value / RUN for value in values] for name, values in seconds.items()}, batch)


def summary(seconds: dict[str, list[float]], tokens: int) -> dict:
    """Best and median of each, and how many times as fast ours is, from the medians and from the best."""
    found: dict = {
        name: {
            "best_ms": round(1e3 * min(values), 3),
            "median_ms": round(1e3 * statistics.median(values), 3),
            "tokens_per_second": round(tokens / min(values)),
        }
        for name, values in seconds.items()
    }
    for name in list(seconds)[1:]:
        found[name]["ours_times_as_fast"] = round(found[name]["median_ms"] / found["ours"]["median_ms"], 2)
        found[name]["ours_times_as_fast_best"] = round(found[name]["best_ms"] / found["ours"]["best_ms"], 2)
    return found


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of this machine's best of 20 products of 1024 x 1024."""
    a = torch.randn(1024, 1024).to(dtype)
    seconds = in_turns({"matmul": lambda: torch.mm(a, a)}, 20)["matmul"]
    return round(2 * 1024**3 / min(seconds) / 1e9, 1)


def main() -> None:
    """All measurements, printed and written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    native = machine.pick_dtype("auto", torch.device("cpu"))
    dtypes = [torch.float32] + [native] * (native != torch.float32)
    facts = machine.describe()
    rates = {str(dtype): matmul_rate(dtype) for dtype in dtypes}
    found: dict = {"machine": facts, "matmul_gflops": rates, "rounds": rounds}
    models = {"18M": speed_model(), "toy": Config.preset("toy").model}
    for name, config in models.items():
        for dtype in dtypes:
            found[f"train step, {name}, {dtype}, batch 16 x 256"] = train_step(config, dtype, rounds)
        for context, batch in ((256, 1), (2048, 1), (8192, 1), (2048, 8)):
            key = f"decode, {name}, float32, batch {batch} at {context} of context"
            found[key] = decode(config, context, batch, rounds)
    for key, value in found.items():
        print(key, json.dumps(value))
    kind = str(facts["cpu_capability"]).lower().replace(" ", "-")
    (RESULTS / f"speed-{kind}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
