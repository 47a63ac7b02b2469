"""Put the measured figures into README.md and docs/performance.md, from the committed result files alone.

python docs/figures.py [--pictures]
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("transformers grouped_mm", "transformers eager")
Table = list[tuple[str, ...]]


def read(path: str) -> dict:
    """A result file, by its path below the root."""
    return json.loads((ROOT / path).read_text())


def machine(found: dict) -> str:
    """The machine of a result, in a few words."""
    facts = found["machine"]
    return f"{facts['cores']} cores, {facts['cpu_capability']}"


def results(kind: str) -> list[dict]:
    """The results of a benchmark, one for each machine."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{kind}-*.json"))]


def entries(kind: str, start: str) -> Iterator[tuple[dict, str, Any]]:
    """Results whose name begins so, on every machine -> the whole file, the rest of the name, the entry"""
    for found in results(kind):
        for name, value in found.items():
            if name.startswith(start):
                yield found, name.removeprefix(start), value


def readme() -> Table:
    """What a reader wants to know first."""
    rows: Table = [("what", "measured", "machine", "made by")]
    for path in sorted((ROOT / "experiments" / "results").glob("train-*.json")):
        found = read(f"experiments/results/{path.name}")
        name = path.stem.removeprefix("train-")
        minutes = f"{found['seconds'] / 60:.1f} min, {found['tokens'] / 1e6:.1f} M bytes"
        loss = f"{found['held_out_loss']:.3f} nats a byte (best n-gram {found['best_ngram_loss']:.3f})"
        what = f"`{name}`, {found['parameters'] / 1e6:.1f} M parameters: loss on four held-out plays"
        rows.append((what, f"{loss} after {minutes}", machine(found), f"`lm train --preset {name}`"))
    found = read("experiments/results/gate_scale.json")
    shown = ", ".join(
        f"{row['computed']:.3f} ({row['model']}, {row['num_experts']} experts; published {row['published']})"
        for row in found["gate_scale"]
    )
    what = "the factor on the routed experts, from Gaussian logits"
    rows.append((what, shown, machine(found), "`lm experiment gate_scale`"))
    for start, what in (
        ("train step, 18M, ", "train step, {}: times as fast as transformers' DeepseekV3 (`grouped_mm`)"),
        ("decode, 18M, ", "decode, {}: times as fast as transformers' DeepseekV3 (`grouped_mm`)"),
    ):
        for found, name, value in entries("speed", start):
            shown = f"{value[PEERS[0]]['ours_times_as_fast_best']:.2f}"
            if "ours compiled" in value:
                compiled = value[PEERS[0]]["best_ms"] / value["ours compiled"]["best_ms"]
                shown += f", compiled {compiled:.2f}"
            rows.append((what.format(name), shown, machine(found), "`make bench`"))
    return rows


def limits() -> Table:
    """What the machines can do."""
    rows: Table = [("machine", "fp32 matmul, GFLOP/s", "bf16 matmul, GFLOP/s", "copy, GB/s", "torch")]
    for found in results("speed"):
        rates = found["matmul_gflops"]
        each = (str(rates.get(f"torch.{dtype}", "")) for dtype in ("float32", "bfloat16"))
        copy = str(found.get("copy_gb_per_second", ""))
        rows.append((machine(found), *each, copy, found["machine"]["torch"]))
    return rows


def train() -> Table:
    """Train steps beside transformers'."""
    rows: Table = [("model", "machine", "ms", "tokens/s", *PEERS, "of the matmul rate")]
    for found, name, value in entries("speed", "train step, "):
        ours = value["ours"]
        rate = found["matmul_gflops"]["torch.bfloat16" if "bfloat16" in name else "torch.float32"]
        share = f"{ours['gflops'] / rate:.2f}" if "gflops" in ours else ""
        times = (f"{value[peer]['ours_times_as_fast_best']:.2f} x" for peer in PEERS)
        cells = (f"{ours['best_ms']:.0f}", f"{ours['tokens_per_second']:,}", *times, share)
        rows.append((name, machine(found), *cells))
    return rows


def layer() -> Table:
    """The MoE layer between a loop over experts and a dense MLP."""
    peers = ("loop over experts", "dense of equal width")
    rows: Table = [("model", "machine", "ms", "ms of the loop", "ms of the dense", "of the dense's rate")]
    for found, name, value in entries("speed", "MoE layer, "):
        loop, dense = (value[peer] for peer in peers)
        each = (f"{one['best_ms']:.1f}" for one in (value["ours"], loop, dense))
        rows.append((name, machine(found), *each, f"{dense['ours_times_as_fast_best']:.2f}"))
    return rows


def decode() -> Table:
    """Decoding beside transformers and beside other attentions."""
    head = ("model", "machine", "ms a step", "transformers", "compiled, ms", "transformers")
    rows: Table = [(*head, "ours with MHA", "bytes a token", "of MHA")]
    for found, name, value in entries("speed", "decode, "):
        ours, theirs = value["ours"], value[PEERS[0]]
        cells = [f"{ours['best_ms']:.2f}", f"{theirs['ours_times_as_fast_best']:.2f} x"]
        mha = value.get("ours with MHA")
        if mha:
            compiled = value["ours compiled"]["best_ms"]
            cells += [f"{compiled:.2f}", f"{theirs['best_ms'] / compiled:.2f} x"]
            cells.append(f"{mha['ours_times_as_fast_best']:.2f} x")
            cells += [f"{one['cache_bytes_a_token']:,}" for one in (ours, mha)]
        rows.append((name, machine(found), *cells, *[""] * (7 - len(cells))))
    return rows


def long() -> Table:
    """Decoding at ever longer contexts beside copying what it reads."""
    head = ("machine", "context", "ms a step", "compiled, ms", "MB of latents", "ms to copy them")
    rows: Table = [(*head, "compiled, times the copy")]
    for found, _, value in entries("speed", "long context, "):
        for context, one in value.items():
            cells = [f"{one[name]:.2f}" for name in ("ms", "compiled_ms", "latent_mb", "copy_ms")]
            rows.append((machine(found), context, *cells, f"{one['compiled_ms'] / one['copy_ms']:.1f}"))
    return rows


def engine() -> Table:
    """Many requests at once against one by one."""
    head = ("machine", "together, tokens/s", "one by one", "times", "prompt tokens of 16 alike in 512")
    rows: Table = [(*head, "of these read", "cache, MB", "not shared, MB")]
    for found, _, value in entries("speed", "engine, "):
        both = [f"{value[how]['tokens_per_second']:,}" for how in ("together", "one by one")]
        shared = value["16 requests with 512 tokens in common"]
        size = (f"{shared[key] / 1e6:.1f}" for key in ("cache_bytes", "cache_bytes_without_sharing"))
        times = f"{value['one by one']['ours_times_as_fast_best']:.1f}"
        counted = f"{shared['prompt_tokens']:,}", f"{shared['tokens_read']:,}"
        rows.append((machine(found), *both, times, *counted, *size))
    return rows


def memory() -> Table:
    """Memory of a train step."""
    rows: Table = [("what", "machine", "kept for backward, MB", "peak, MB", "peak, trimmed, MB")]
    for found, name, value in entries("memory", "train step, "):
        keys = ("kept_for_backward_mb", "peak_mb", "peak_trimmed_mb")
        rows.append((name, machine(found), *(f"{value[key]:,.0f}" for key in keys)))
    return rows


def operators() -> Table:
    """Where the time of a train step goes."""
    rows: Table = [("step", "machine", "operator", "share", "ms", "calls")]
    for found, name, value in entries("profile", "train step, "):
        for one in value[:8]:
            cells = f"{one['share']:.1%}", f"{one['ms']:.0f}", f"{one['calls']:,}"
            rows.append((name, machine(found), f"`{one['operator']}`", *cells))
    return rows


def crossing() -> Table:
    """Up to how many queries the absorbed form is the quicker one."""
    rows: Table = [("machine", "past", "by counting multiply-adds", "by the clock")]
    for found in results("scaling"):
        one = found["crossing"]
        counted, measured = one["absorbed_is_cheaper_up_to"], one["absorbed_was_quicker_up_to"]
        rows.append((machine(found), str(one["past"]), f"{counted} queries", f"{measured} queries"))
    return rows


PLACES: dict[str, dict[str, Callable[[], Table]]] = {
    "README.md": {"figures": readme},
    "docs/performance.md": {
        "limits": limits,
        "train": train,
        "layer": layer,
        "decode": decode,
        "long": long,
        "engine": engine,
        "memory": memory,
        "operators": operators,
        "crossing": crossing,
    },
}


def page(path: str) -> str:
    """A page with its tables made anew."""
    text = (ROOT / path).read_text()
    for name, table in PLACES[path].items():
        head, *rows = table()
        lines = [head, ("---",) * len(head), *rows]
        shown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.S)
        text, found = place.subn(lambda _, shown=shown: shown, text)
        if found != 1:
            raise ValueError(f"{path}: {found} places for the table {name!r}; there must be one")
    return text


def pictures() -> None:
    """docs/scaling-layer.png and docs/scaling-decode.png, of the newest machine's curves."""
    import matplotlib.pyplot as plt

    found = results("scaling")[-1]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for axis, (key, label) in zip(
        axes, {"experts": "experts, of which 4 are active", "dim": "dim", "tokens": "tokens"}.items()
    ):
        curves(axis, found[key], label)
    axes[0].set_ylabel("ms, forward and backward")
    axes[0].legend(frameon=False)
    save(figure, "scaling-layer.png")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, batch in zip(axes, (1, 8)):
        points = found[f"decode, batch {batch}"]
        curves(axis, {context: one["ms"] for context, one in points.items()}, f"context, batch {batch}")
        axis.set_ylabel("ms a token in one attention layer")
    points = {context: one["cache_bytes"] for context, one in found["decode, batch 1"].items()}
    curves(axes[2], points, "context")
    axes[2].set_ylabel("bytes of cache, one layer, fp32")
    axes[0].legend(frameon=False)
    save(figure, "scaling-decode.png")


def curves(axis: Any, points: dict[str, dict[str, float]], label: str) -> None:
    """A line for each name, over the numbers that the points are called by."""
    names = {name: None for point in points.values() for name in point}
    for name in names:
        at = [(int(x), point[name]) for x, point in points.items() if name in point]
        axis.plot(*zip(*at), marker="o", markersize=3, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / name, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    for path in PLACES:
        (ROOT / path).write_text(page(path))
    if "--pictures" in sys.argv:
        pictures()
