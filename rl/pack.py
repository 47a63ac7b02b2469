"""Make the model that travels with the package: python -m rl.pack RUN NAME

RUN is a run of `lm reason train`. rl/models/NAME gets its weights in bf16, and its figures beside them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lm import checkpoint, files
from lm.run import read_metrics

from .config import ReasonConfig

MODELS = Path(__file__).parent / "models"


def find(model: Path) -> Path:
    """A folder, or the folder of the packaged model of that name."""
    packaged = MODELS / model
    return packaged if len(model.parts) == 1 and not model.exists() and packaged.is_dir() else model


def pack(run: Path, name: str) -> Path:
    """Write rl/models/NAME from a run -> the folder"""
    config, rows = ReasonConfig.load(run), read_metrics(run)
    model = checkpoint.load(run).to(torch.bfloat16)
    shown = ("pass_at_1", "in_form", "length")
    figures: dict[str, Any] = {
        "task": config.task,
        "objective": config.objective,
        "steps": rows[-1]["step"],
        "completions": rows[-1]["responses"],
        "held_out_problems": config.eval_problems,
        "base": {key: round(rows[0]["base"][key], 4) for key in shown},
        "trained": {key: round(rows[-1]["held_out"][key], 4) for key in shown},
        "seconds": round(rows[-1]["seconds"], 1),
    }
    out = MODELS / name

    def write(into: Path) -> None:
        checkpoint.write_model(model, into)
        files.write_json(into / "figures.json", figures)

    MODELS.mkdir(exist_ok=True)
    files.check_new(out)
    files.commit(out, write)
    print(json.dumps(figures, indent=1))
    return out


if __name__ == "__main__":
    pack(Path(sys.argv[1]), sys.argv[2])
