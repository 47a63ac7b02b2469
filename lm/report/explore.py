"""One page that chooses experts again: explore.html holds a run's scores, and a router in JavaScript."""

import base64
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe import Capacity, SigmoidRouter, SoftmaxRouter
from moe.router import described

from .. import checkpoint, data, files
from ..config import Config
from ..hub import folder
from ..hub.tokenizer import open_tokenizer
from ..model import Transformer
from ..tokenizer import ByteTokenizer
from . import measure, page

PAGE_BYTES = 300_000  # the largest page
MOST_TOKENS = 512
ENOUGH_TOKENS = 192  # before there are fewer, checkpoints are left out
LEAST_TOKENS = 16
KINDS = {SigmoidRouter: "sigmoid", SoftmaxRouter: "softmax"}


def write(path: Path, trust_code: bool = False) -> Path:
    """Write explore.html, self-contained, into a model's folder -> the page's path.

    Of a run all checkpoints are shown, of another folder its model.

    Raises:
        ValueError: there is no whole model in the folder, or its routers are not such that the page can
            repeat what they choose.
    """
    config, (tokens, shown) = folder.read_config(path, trust_code), passage(path, trust_code)
    stored: list[Path | None] = [None]
    if folder.kind_of(path) == folder.RUN:
        stored = [*whole_checkpoints(path)]
    model = read_model(path, stored[-1], config, trust_code)
    routers = read_routers(model)
    router = routers[0]  # all are alike, but for their weights
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
        "hues": [measure.hue(expert) for expert in range(router.num_experts)],
    }
    name = path.resolve().name
    room = PAGE_BYTES - len(render(name, {**head, "tokens": shown, "checkpoints": []}).encode())
    count, kept = fit(room, len(routers), router.num_experts, len(tokens), len(stored))
    read = []
    for place in (stored[index] for index in kept):
        there = model if place == stored[-1] else read_model(path, place, config, trust_code)
        step = None if place is None else checkpoint.read_state(place)["step"]
        read.append({"step": step, "layers": scores_of(there, tokens[:count])})
    text = render(name, {**head, "tokens": shown[:count], "checkpoints": read})
    files.write_file(path / "explore.html", text)
    return path / "explore.html"


def passage(path: Path, trust_code: bool) -> tuple[Tensor, list[str]]:
    """A held-out passage as the model's tokens (time,), and each as it is shown."""
    config = folder.read_config(path, trust_code)
    tokenizer = open_tokenizer(path, config.model.vocab_size)
    text = data.load(config.data, config.model.vocab_size)[1]
    if isinstance(tokenizer, ByteTokenizer):
        tokens = measure.passage(data.Windows(text, config.train.context), MOST_TOKENS)
        return tokens, [measure.show(token) for token in tokens.tolist()]
    some = measure.passage(data.Windows(text, config.train.context), 4 * MOST_TOKENS)
    ids = tokenizer.encode(bytes(some.tolist()))[:MOST_TOKENS]
    return torch.tensor(ids), [tokenizer.decode([token]) or "∎" for token in ids]


def read_model(path: Path, stored: Path | None, config: Config, trust_code: bool) -> Transformer:
    """The model of a checkpoint, or of a folder that has one alone."""
    if stored is None:
        return folder.load(path, trust_code)
    return checkpoint.load_model(config.model, stored / "model.safetensors")


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
def scores_of(model: Transformer, tokens: Tensor) -> list[dict[str, Any]]:
    """What each layer's router finds in the passage, and its bias (None where it has none)."""
    return [
        {"scores": encode(routing.scores), "bias": encode(router.bias)}
        for router, routing in zip(map(described, model.routers()), model(tokens.unsqueeze(0)).routings)
    ]


def encode(values: Tensor | None) -> str | None:
    """float32, little-endian, in base64"""
    return None if values is None else base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def render(name: str, found: dict[str, Any]) -> str:
    """The page, in which every text from outside is escaped."""
    return page.render(Path(__file__).parent / "explore.html", name=name, data=found)
