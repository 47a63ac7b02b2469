"""One page that chooses experts again: explore.html holds a run's scores, and a router in JavaScript."""

import base64
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe import Capacity, SigmoidRouter, SoftmaxRouter

from . import checkpoint, data, page, report
from .config import Config
from .model import Transformer

PAGE_BYTES = 300_000  # the largest page
MOST_TOKENS = 512
ENOUGH_TOKENS = 192  # before there are fewer, checkpoints are left out
LEAST_TOKENS = 16
KINDS = {SigmoidRouter: "sigmoid", SoftmaxRouter: "softmax"}


def write(run: Path, trust_code: bool = False) -> Path:
    """Write explore.html, self-contained, into a run folder -> the page's path.

    Raises:
        ValueError: the folder is not a run with a whole checkpoint, or its routers are none that the page
            can repeat.
    """
    config = checkpoint.read_config(run, trust_code)
    folders = whole_checkpoints(run)
    routers = read_routers(checkpoint.load_model(config.model, folders[-1] / "model.safetensors"))
    router = routers[0]  # all are alike, but for their weights
    held_out = data.load(config.data, config.model.vocab_size)[1]
    tokens = report.passage(data.Windows(held_out, config.train.context), MOST_TOKENS)
    head = {
        "router": KINDS[type(router)],
        "group_best": router.group_best,
        "num_experts": router.num_experts,
        "top_k": router.top_k,
        "num_groups": router.num_groups,
        "top_groups": router.top_groups,
        "normalize": router.normalize,
        "routed_scaling_factor": router.routed_scaling_factor,
        "rate": config.train.bias_update_rate or 0.001,
        "rule": config.train.bias_update,
        "hues": [report.hue(expert) for expert in range(router.num_experts)],
    }
    name = run.resolve().name
    shown = [report.show(token) for token in tokens.tolist()]
    room = PAGE_BYTES - len(render(name, {**head, "tokens": shown, "checkpoints": []}).encode())
    count, kept = fit(room, len(routers), router.num_experts, len(tokens), len(folders))
    read = [read_checkpoint(folders[index], config, tokens[:count]) for index in kept]
    text = render(name, {**head, "tokens": shown[:count], "checkpoints": read})
    checkpoint.write_file(run / "explore.html", text)
    return run / "explore.html"


def read_routers(model: Transformer) -> list[Any]:
    """A model's routers.

    Raises:
        ValueError: there are none, or they are not such that the page can repeat what they choose.
    """
    routers = [bare(router) for router in model.routers()]
    if not routers:
        raise ValueError(
            f"model.num_dense_layers {model.config.num_dense_layers} leaves no layer with experts; "
            f"fewer than model.num_layers {model.config.num_layers} would"
        )
    if type(routers[0]) not in KINDS:
        raise ValueError(
            f"model.moe.router {model.config.moe.router!r}: the page cannot repeat what it chooses; "
            f"it can for {' and '.join(KINDS.values())}"
        )
    return routers


def bare(router: Any) -> Any:
    """The router itself, where its room is limited: nothing is dropped in evaluation."""
    return router.router if isinstance(router, Capacity) else router


def whole_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints that are whole, oldest first; others are passed over with a warning.

    Raises:
        ValueError: there is none.
    """
    if (run / "model.safetensors").exists():
        raise ValueError(f"{run}: is a saved model; a run, which keeps its checkpoints, is needed")
    found = checkpoint.checkpoints(run)
    whole = []
    for path in found:
        try:
            checkpoint.check_whole(path)
            whole.append(path)
        except ValueError as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
    if not whole:
        raise ValueError(f"{run}: {'every checkpoint is damaged' if found else 'no checkpoint yet'}")
    return whole


def fit(
    room: int, layers: int, num_experts: int, num_tokens: int, num_checkpoints: int
) -> tuple[int, list[int]]:
    """How many tokens fit into `room` bytes, and of which checkpoints, evenly thinned and the newest always.

    Raises:
        ValueError: even one checkpoint leaves too few tokens.
    """
    row = layers * num_experts * 4 * 4 / 3  # bytes of a token's scores, in base64
    besides = row + 60 + layers * 40  # a checkpoint's biases and names
    kept = int(room / (besides + min(ENOUGH_TOKENS, num_tokens) * row))
    kept = max(1, min(num_checkpoints, kept))
    count = min(num_tokens, int((room / kept - besides) / row))
    if count < min(LEAST_TOKENS, num_tokens):
        raise ValueError(
            f"{layers} layers of {num_experts} experts are too many for a page: {PAGE_BYTES} bytes hold "
            f"the scores of {max(0, count)} tokens, not {LEAST_TOKENS}"
        )
    last = num_checkpoints - 1
    return count, [last - (kept - 1 - i) * last // max(1, kept - 1) for i in range(kept)]


@torch.no_grad()
def read_checkpoint(folder: Path, config: Config, tokens: Tensor) -> dict[str, Any]:
    """What one checkpoint's routers find in the passage, and their biases (None where they have none)."""
    model = checkpoint.load_model(config.model, folder / "model.safetensors")
    layers = [
        {"scores": encode(routing.scores), "bias": encode(getattr(router, "bias", None))}
        for router, routing in zip(model.routers(), model(tokens.unsqueeze(0)).routings)
    ]
    return {"step": checkpoint.read_state(folder)["step"], "layers": layers}


def encode(values: Tensor | None) -> str | None:
    """float32, little-endian, in base64"""
    return None if values is None else base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def render(name: str, found: dict[str, Any]) -> str:
    """The page, in which every text from outside is escaped."""
    return page.render(Path(__file__).parent / "explore.html", name=name, data=found)
