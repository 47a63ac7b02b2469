"""Write the measured figures into README.md and docs/performance.md, from the committed result files.

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
    """A result file, by its path relative to the root."""
    return json.loads((ROOT / path).read_text("utf-8"))


def machine(found: dict) -> str:
    """The machine of a result, for a table cell."""
    facts = found["machine"]
    return f"{facts['cores']} cores, {facts['cpu_capability']}"


def results(kind: str) -> list[dict]:
    """The results of a benchmark, one per machine."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob(f"{kind}-*.json"))]


def entries(kind: str, start: str) -> Iterator[tuple[dict, str, Any]]:
    """Entries whose name begins with `start`, of all machines -> the file, the rest of the name, the entry"""
    for found in results(kind):
        for name, value in found.items():
            if name.startswith(start):
                yield found, name.removeprefix(start), value


def trainings() -> Table:
    """The presets that were trained."""
    head = ("preset", "parameters, M", "active, M", "loss on held-out plays, nats a byte")
    rows: Table = [(*head, "best n-gram", "minutes", "machine")]
    for path in sorted((ROOT / "experiments" / "results").glob("train-*.json")):
        found = read(f"experiments/results/{path.name}")
        sizes = (f"{found[name] / 1e6:.1f}" for name in ("parameters", "active_parameters"))
        losses = (f"{found[name]:.3f}" for name in ("held_out_loss", "best_ngram_loss"))
        minutes = f"{found['seconds'] / 60:.1f}"
        rows.append((f"`{path.stem.removeprefix('train-')}`", *sizes, *losses, minutes, machine(found)))
    return rows


def speed() -> Table:
    """Train and decode steps: how many times as fast as transformers."""
    rows: Table = [("step of an 18 M model", "machine", "times as fast", "compiled, times as fast")]
    for start in ("train step, 18M, ", "decode, 18M, "):
        for found, name, value in entries("speed", start):
            compiled = ""
            if "ours compiled" in value:
                ratio = value[PEERS[0]]["best_ms"] / value["ours compiled"]["best_ms"]
                compiled = f"{ratio:.2f}"
            plain = f"{value[PEERS[0]]['ours_times_as_fast_best']:.2f}"
            step = f"{start.partition(',')[0]}, {name}".replace("torch.", "").replace(" of context", "")
            rows.append((step.replace("train step", "train").strip(), machine(found), plain, compiled))
    return rows


def limits() -> Table:
    """The limits of the machines."""
    rows: Table = [("machine", "fp32 matmul, GFLOP/s", "bf16 matmul, GFLOP/s", "copy, GB/s", "torch")]
    for found in results("speed"):
        rates = found["matmul_gflops"]
        each = (str(rates.get(f"torch.{dtype}", "")) for dtype in ("float32", "bfloat16"))
        copy = str(found.get("copy_gb_per_second", ""))
        rows.append((machine(found), *each, copy, found["machine"]["torch"]))
    return rows


def train() -> Table:
    """Train steps compared with transformers."""
    peers = [f"speed-up over {peer}" for peer in PEERS]
    rows: Table = [("model", "machine", "ms", "tokens/s", *peers, "fraction of the matmul rate")]
    for found, name, value in entries("speed", "train step, "):
        ours = value["ours"]
        rate = found["matmul_gflops"]["torch.bfloat16" if "bfloat16" in name else "torch.float32"]
        share = f"{ours['gflops'] / rate:.2f}" if "gflops" in ours else ""
        times = (f"{value[peer]['ours_times_as_fast_best']:.2f} x" for peer in PEERS)
        cells = (f"{ours['best_ms']:.0f}", f"{ours['tokens_per_second']:,}", *times, share)
        rows.append((name, machine(found), *cells))
    return rows


def layer() -> Table:
    """The MoE layer compared with a loop over experts and a dense MLP."""
    peers = ("loop over experts", "dense of equal width")
    rows: Table = [("model", "machine", "ms", "loop, ms", "dense MLP, ms", "fraction of the dense rate")]
    for found, name, value in entries("speed", "MoE layer, "):
        loop, dense = (value[peer] for peer in peers)
        each = (f"{one['best_ms']:.1f}" for one in (value["ours"], loop, dense))
        rows.append((name, machine(found), *each, f"{dense['ours_times_as_fast_best']:.2f}"))
    return rows


def decode() -> Table:
    """Decode steps compared with transformers and with multi-head attention."""
    over = "speed-up over transformers"
    head = ("model", "machine", "ms", over, "compiled, ms", over, "speed-up over MHA")
    rows: Table = [(*head, "cache, bytes per token", "with MHA")]
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
    """Decode steps at long contexts compared with copying the latents."""
    head = ("machine", "context", "ms", "compiled, ms", "latents, MB", "copy, ms")
    rows: Table = [(*head, "compiled / copy")]
    for found, _, value in entries("speed", "long context, "):
        for context, one in value.items():
            cells = [f"{one[name]:.2f}" for name in ("ms", "compiled_ms", "latent_mb", "copy_ms")]
            rows.append((machine(found), context, *cells, f"{one['compiled_ms'] / one['copy_ms']:.1f}"))
    return rows


def engine() -> Table:
    """Many requests at once compared with one by one."""
    head = ("machine", "together, tokens/s", "one by one, tokens/s", "ratio", "common prefix: prompt tokens")
    rows: Table = [(*head, "tokens computed", "cache, MB", "cache without sharing, MB")]
    for found, _, value in entries("speed", "engine, "):
        both = [f"{value[how]['tokens_per_second']:,}" for how in ("together", "one by one")]
        shared = value["16 requests with 512 tokens in common"]
        size = (f"{shared[key] / 1e6:.1f}" for key in ("cache_bytes", "cache_bytes_without_sharing"))
        times = f"{value['one by one']['ours_times_as_fast_best']:.1f}"
        counted = f"{shared['prompt_tokens']:,}", f"{shared['tokens_read']:,}"
        rows.append((machine(found), *both, times, *counted, *size))
    return rows


def memory() -> Table:
    """Memory of train steps."""
    rows: Table = [("step", "machine", "saved for backward, MB", "peak, MB", "peak, trimmed, MB")]
    for found, name, value in entries("memory", "train step, "):
        keys = ("kept_for_backward_mb", "peak_mb", "peak_trimmed_mb")
        rows.append((name, machine(found), *(f"{value[key]:,.0f}" for key in keys)))
    return rows


def operators() -> Table:
    """The operators that take the most time in a train step."""
    rows: Table = [("step", "machine", "operator", "share", "ms", "calls")]
    for found, name, value in entries("profile", "train step, "):
        for one in value[:8]:
            cells = f"{one['share']:.1%}", f"{one['ms']:.0f}", f"{one['calls']:,}"
            rows.append((name, machine(found), f"`{one['operator']}`", *cells))
    return rows


def crossing() -> Table:
    """The number of queries up to which the absorbed form is faster."""
    rows: Table = [("machine", "past tokens", "fewer multiply-adds up to", "faster up to")]
    for found in results("scaling"):
        one = found["crossing"]
        counted, measured = one["absorbed_is_cheaper_up_to"], one["absorbed_was_quicker_up_to"]
        rows.append((machine(found), str(one["past"]), f"{counted} queries", f"{measured} queries"))
    return rows


PLACES: dict[str, dict[str, Callable[[], Table]]] = {
    "README.md": {"trainings": trainings, "speed": speed},
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
    """The text of a page with new tables."""
    text = (ROOT / path).read_text("utf-8")
    for name, table in PLACES[path].items():
        head, *rows = table()
        lines = [head, ("---",) * len(head), *rows]
        shown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.S)
        text, found = place.subn(lambda _, shown=shown: shown, text)
        if found != 1:
            raise ValueError(f"{path}: {found} places for the table {name!r}; expected 1")
    return text


def pictures() -> None:
    """Draw docs/scaling-layer.png and docs/scaling-decode.png, for the last machine."""
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
        axis.set_ylabel("ms per token, one attention layer")
    points = {context: one["cache_bytes"] for context, one in found["decode, batch 1"].items()}
    curves(axes[2], points, "context")
    axes[2].set_ylabel("bytes of cache, one layer, fp32")
    axes[0].legend(frameon=False)
    save(figure, "scaling-decode.png")


def curves(axis: Any, points: dict[str, dict[str, float]], label: str) -> None:
    """A line for each name, over the keys of `points`."""
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
        (ROOT / path).write_text(page(path), "utf-8")
    if "--pictures" in sys.argv:
        pictures()
