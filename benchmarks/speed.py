"""Train step, MoE layer, decoding and engine against peers of equal sizes, weights and dtype, in turns.

python -m benchmarks.speed [--rounds N] [--quick]  ->  benchmarks/results/speed-CPU.json
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lm import count, loss, machine
from lm.config import Config, ModelConfig
from lm.inference.engine import Engine
from lm.inference.request import Request
from lm.model import Transformer
from lm.optim import build_optimizer
from lm.parts import build_moe
from moe import SwiGLU

from . import record
from .peers import deepseek_v3, loop_over_experts, speed_model, with_attention

RUN = 8  # consecutive decode steps per turn: alternating models at every token would be unrealistic


def in_turns(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, with the candidates in turns; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Best and median of each, and the speed-up of the first over the others, by median and by best."""
    found: dict[str, Any] = {
        name: {
            "best_ms": round(1e3 * min(values), 3),
            "median_ms": round(1e3 * statistics.median(values), 3),
            "tokens_per_second": round(tokens / min(values)),
        }
        for name, values in seconds.items()
    }
    first, *others = seconds
    for name in others:
        found[name]["ours_times_as_fast"] = round(found[name]["median_ms"] / found[first]["median_ms"], 2)
        found[name]["ours_times_as_fast_best"] = round(found[name]["best_ms"] / found[first]["best_ms"], 2)
    return found


def train_step(config: ModelConfig, dtype: torch.dtype, rounds: int, batch: int = 16) -> dict:
    """Forward, backward and AdamW: ours, and transformers with each experts implementation, on new tokens."""
    ours = Transformer(config)
    ours.initialize(torch.Generator().manual_seed(0))
    context = 256
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
        if model is ours:
            optimizer = build_optimizer(model, Config(model=config).train)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        calls[name] = lambda model=model, optimizer=optimizer: step(model, optimizer)
    found = summary(in_turns(calls, rounds), batch * context)
    flops = count.training_flops_per_token(config, context)
    found["ours"]["gflops"] = round(flops * found["ours"]["tokens_per_second"] / 1e9, 1)
    return found


def moe_layer(config: ModelConfig, dtype: torch.dtype, rounds: int, tokens: int = 4096) -> dict:
    """Forward and backward of a MoE layer, of a loop over its experts and of a dense MLP of equal width."""
    layer = build_moe(config.dim, config.moe)
    width = (config.moe.top_k + config.moe.num_shared_experts) * config.moe.hidden_dim
    dense = SwiGLU(config.dim, width)
    x = torch.randn(tokens, config.dim, requires_grad=True)
    upstream = torch.randn(tokens, config.dim)

    def both(layer: Callable[[Tensor], Tensor]) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = layer(x)
        y.backward(upstream.to(y.dtype))

    calls = {
        "ours": lambda: both(lambda x: layer(x)[0]),
        "loop over experts": lambda: both(lambda x: loop_over_experts(layer, x)),
        "dense of equal width": lambda: both(dense),
    }
    found = summary(in_turns(calls, rounds), tokens)
    flops = 6 * (3 * config.dim * width + config.dim * config.moe.num_experts)
    found["ours"]["gflops"] = round(flops * found["ours"]["tokens_per_second"] / 1e9, 1)
    return found


def at_context(
    model: Transformer, context: int, batch: int, steps: int, compile: bool = False
) -> Callable[[], Any]:
    """A function that decodes one token for `batch` rows of `context` tokens, with random cache entries."""
    engine = Engine(model, batch, batch * (context + steps + 64), compile)
    requests: list[Request] = []
    for row in range(batch):
        requests.append(engine.submit([row], steps + 1))
        if not engine.let_in(requests[-1]):
            raise RuntimeError("no free pages for a request")
    rows = [request.row for request in requests]
    engine.pages.grow(rows, context)
    for pool in engine.pools:
        pool.normal_()
    for request in requests:
        request.row.length = context
        request.sequence = [0] * (context + steps + 1)
    return lambda: engine.read(requests, 1)


@torch.inference_mode()
def decode(config: ModelConfig, context: int, batch: int, rounds: int) -> dict:
    """A decode step at a context length, fp32: ours eager, compiled, with MHA, with GQA, and transformers."""
    ours = Transformer(config)
    ours.initialize(torch.Generator().manual_seed(0))
    theirs = deepseek_v3(ours)
    steps = RUN * (rounds + 1)
    tokens = torch.randint(config.vocab_size, (batch, context))
    past, last = theirs(tokens, use_cache=True).past_key_values, tokens[:, -1:]
    calls: dict[str, Callable[[], Any]] = {
        "ours": at_context(ours, context, batch, steps),
        "ours compiled": at_context(ours, context, batch, steps, compile=True),
        "transformers grouped_mm": lambda: theirs(last, past_key_values=past),
    }
    size = dict.fromkeys(("ours", "ours compiled"), 4 * count.cache_elements_per_token(config))
    heads = config.attention.num_heads
    for name, kv_heads in (("ours with MHA", heads), ("ours with GQA, a quarter", max(1, heads // 4))):
        rival = with_attention(config, kv_heads)
        calls[name] = at_context(rival, context, batch, steps)
        size[name] = 4 * count.cache_elements_per_token(rival.config)
    runs = {name: lambda call=call: [call() for _ in range(RUN)] for name, call in calls.items()}
    seconds = in_turns(runs, rounds)
    found = summary({name: [value / RUN for value in values] for name, values in seconds.items()}, batch)
    for name, number in size.items():
        found[name]["cache_bytes_a_token"] = number
    return found


@torch.inference_mode()
def long_context(config: ModelConfig, rounds: int, contexts: tuple[int, ...]) -> dict:
    """Decode steps at several contexts, fp32, batch 1, and the time to copy the latents that they read."""
    ours = Transformer(config)
    ours.initialize(torch.Generator().manual_seed(0))
    steps = RUN * (rounds + 1)
    calls: dict[str, Callable[[], Any]] = {}
    bytes_read = {}
    for n in contexts:
        source = torch.randn(n * count.cache_elements_per_token(config))
        calls[f"{n} ms"] = at_context(ours, n, 1, steps)
        calls[f"{n} compiled_ms"] = at_context(ours, n, 1, steps, compile=True)
        calls[f"{n} copy_ms"] = partial(torch.empty_like(source).copy_, source)
        bytes_read[n] = source.nbytes
    runs = {name: lambda call=call: [call() for _ in range(RUN)] for name, call in calls.items()}
    found: dict[str, Any] = {str(n): {"latent_mb": bytes_read[n] / 1e6} for n in contexts}
    for name, seconds in in_turns(runs, rounds).items():
        n, what = name.split()
        found[n][what] = round(1e3 * min(seconds) / RUN, 3)
    return found


def engine(config: ModelConfig, rounds: int, requests: int = 64) -> dict:
    """Requests of different lengths, in one batch and one by one; and requests with a common prefix."""
    model = Transformer(config)
    model.initialize(torch.Generator().manual_seed(0))
    draw = random.Random(0)
    sizes = [(draw.randint(8, 128), draw.randint(16, 128)) for _ in range(requests)]
    prompts = [draw.choices(range(config.vocab_size), k=length) for length, _ in sizes]

    def run(at_once: int) -> None:
        one = Engine(model, at_once, at_once * 256)
        for prompt, (_, new) in zip(prompts, sizes):
            one.submit(prompt, new, 0)
        one.run()

    calls = {"together": lambda: run(requests), "one by one": lambda: run(1)}
    found = summary(in_turns(calls, max(1, rounds // 3)), sum(new for _, new in sizes))
    shared = Engine(model, 16, 16 * 1024)
    beginning = draw.choices(range(config.vocab_size), k=512)
    for end in range(16):
        shared.submit([*beginning, end % config.vocab_size, 1], 8, 0)
    held = read = 0
    step = shared.decoder.step

    def counted(tokens: Tensor, pools: Any, plan: Any) -> Tensor:
        nonlocal read
        read += plan.tokens
        return step(tokens, pools, plan)

    shared.decoder.step = counted  # type: ignore[method-assign]
    while shared.busy:
        shared.step()
        held = max(held, shared.nbytes)
    alone = 16 * 9 * sum(pool[0].nbytes for pool in shared.pools)
    found["16 requests with 512 tokens in common"] = {
        "prompt_tokens": 16 * 514,
        "tokens_read": read - 16 * 7,
        "cache_bytes": held,
        "cache_bytes_without_sharing": alone,
    }
    return found


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of the best of 20 products of 1024 x 1024."""
    a = torch.randn(1024, 1024).to(dtype)
    seconds = in_turns({"matmul": lambda: torch.mm(a, a)}, 20)["matmul"]
    return round(2 * 1024**3 / min(seconds) / 1e9, 1)


def copy_rate() -> float:
    """GB/s of copying 256 MB, counting reads and writes."""
    a = torch.ones(2**26)
    b = torch.empty_like(a)
    seconds = in_turns({"copy": lambda: b.copy_(a)}, 10)["copy"]
    return round(2 * a.nbytes / min(seconds) / 1e9, 1)


def main() -> None:
    """Run all measurements, print and save them."""
    options = record.options(__doc__, rounds=9)
    rounds = options.rounds
    native = machine.pick_dtype("auto", torch.device("cpu"))
    dtypes = [torch.float32] + [native] * (native != torch.float32)
    rates = {str(dtype): matmul_rate(dtype) for dtype in dtypes}
    found: dict = {"rounds": rounds, "matmul_gflops": rates, "copy_gb_per_second": copy_rate()}
    models = {"18M": speed_model(), "toy": Config.preset("toy").model}
    if options.quick:
        models = {"nano": Config.preset("nano").model}
    for name, config in models.items():
        for dtype in dtypes:
            found[f"train step, {name}, {dtype}, batch 16 x 256"] = train_step(config, dtype, rounds)
            found[f"MoE layer, {name}, {dtype}, 4,096 tokens"] = moe_layer(config, dtype, 3 * rounds)
        for context, batch in ((256, 1), (2048, 1), (8192, 1), (2048, 8))[: 2 if options.quick else None]:
            key = f"decode, {name}, float32, batch {batch} at {context} of context"
            found[key] = decode(config, context, batch, rounds)
        if name != "toy":
            longest = (256, 1024) if options.quick else (2048, 8192, 32768)
            found[f"long context, {name}, float32, batch 1"] = long_context(config, rounds, longest)
            found[f"engine, {name}, float32"] = engine(config, rounds, 8 if options.quick else 64)
    for key, value in found.items():
        print(key, json.dumps(value))
    record.write("speed", found, options.out)


if __name__ == "__main__":
    main()
