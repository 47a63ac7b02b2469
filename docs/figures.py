"""Put the measured figures into README.md, from the committed result files and nowhere else.

python docs/figures.py
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- end of figures -->)", re.S)


def read(path: str) -> dict:
    """A result file, by its path below the root."""
    return json.loads((ROOT / path).read_text())


def machine(found: dict) -> str:
    """The machine of a result, in a few words."""
    facts = found["machine"]
    return f"{facts['cores']} cores, {facts['cpu_capability']}"


def table() -> str:
    """The README's table."""
    rows = [("what", "measured", "machine", "made by"), ("---", "---", "---", "---")]
    for path in sorted((ROOT / "experiments" / "results").glob("train-*.json")):
        found = read(f"experiments/results/{path.name}")
        name = path.stem.removeprefix("train-")
        minutes = f"{found['seconds'] / 60:.1f} min, {found['tokens'] / 1e6:.1f} M bytes"
        loss = f"{found['held_out_loss']:.3f} nats a byte (best n-gram {found['best_ngram_loss']:.3f})"
        what = f"`{name}`, {found['parameters'] / 1e6:.1f} M parameters: loss on four held-out plays"
        rows.append((what, f"{loss} after {minutes}", machine(found), f"`lm train --preset {name}`"))
    found = read("experiments/results/balance.json")
    violations = found["max_violation_by_layer_last_100_steps"]
    pairs = zip(violations["bias update"], violations["none"])
    shown = " / ".join(f"{a:.2f} against {b:.2f}" for a, b in pairs)
    what = f"MaxVio with the bias update against none, each layer, last 100 of {found['steps']:,} steps"
    rows.append((what, shown, machine(found), f"`python -m experiments.balance --steps {found['steps']}`"))
    found = read("experiments/results/gate_scale.json")
    shown = ", ".join(
        f"{row['computed']:.3f} ({row['model']}, {row['num_experts']} experts; published {row['published']})"
        for row in found["gate_scale"]
    )
    what = "the factor on the routed experts, from Gaussian logits"
    rows.append((what, shown, machine(found), "`python -m experiments.gate_scale`"))
    for path in sorted((ROOT / "benchmarks" / "results").glob("speed-*.json")):
        found = read(f"benchmarks/results/{path.name}")
        for key, value in found.items():
            if key.startswith(("train step, 18M", "decode, 18M")):
                ratio = value["transformers grouped_mm"]["ours_times_as_fast_best"]
                what = f"{key}: times as fast as transformers' DeepseekV3 (`grouped_mm`)"
                rows.append((what, f"{ratio:.2f}", machine(found), "`python -m benchmarks.speed`"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(PLACE.sub(lambda _: table(), readme.read_text()))
