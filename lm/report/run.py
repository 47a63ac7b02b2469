"""report.html: a run's losses, samples and cache size, and the work of its experts, on one page."""

import base64
import os
from pathlib import Path
from typing import Any

from .. import checkpoint, data, files, history
from ..hub import folder
from ..model import Transformer
from ..run import read_metrics
from . import figures, info, measure, page

LONGEST_SAMPLES = 2**26  # bytes of samples.txt


def write(run: Path, trust_code: bool = False) -> Path:
    """Write report.html, self-contained, and its figures as PNG files beside it -> the page's path

    Raises:
        ValueError: the folder is not a run with a complete checkpoint.
    """
    folder.need(run, folder.RUN)
    config = checkpoint.read_config(run, trust_code)

    def read(newest: Path) -> tuple[dict[str, Any], Transformer]:
        return history.read_state(newest), checkpoint.load_model(config.model, newest / "model.safetensors")

    state, model = history.read_newest(run, read)  # of one checkpoint, even beside a training that prunes
    rows = read_metrics(run)
    if not rows:
        raise ValueError(f"{run / 'metrics.jsonl'}: has no rows yet")
    _, validation = data.open_windows(config)
    baseline = measure.read_baseline(config)
    caches = measure.cache_bytes(model, config)
    pictures = {"loss": figures.draw_loss(rows, baseline), "cache": figures.draw_cache(caches)}
    passage: list[list[dict[str, Any]]] = []
    if model.routers():
        passage = measure.passage_experts(model, validation)
        pictures["balance"] = figures.draw_balance(rows)
        pictures["load"] = figures.draw_load(measure.expert_load(model, validation))
        pictures["experts"] = figures.draw_passage(passage)
    images = {}
    for name, figure in pictures.items():
        figure.savefig(run / f"{name}.png", dpi=110, bbox_inches="tight")
        figures.plt.close(figure)
        images[name] = base64.b64encode((run / f"{name}.png").read_bytes()).decode()
    samples = run / "samples.txt"
    text = page.render(
        Path(__file__).parent / "report.html",
        name=run.resolve().name,
        config=config,
        state=state,
        last=rows[-1],
        evaluated=[row for row in rows if "val_loss" in row][-1:],
        baseline=baseline,
        images=images,
        passage=passage,
        caches=caches,
        v3_caches=info.v3_cache_bytes("bf16"),
        counts=measure.counts(config, model),
        samples=files.read_own(samples, LONGEST_SAMPLES) if os.path.lexists(samples) else "",
        hue=measure.hue,
    )
    files.write_file(run / "report.html", text)
    return run / "report.html"
