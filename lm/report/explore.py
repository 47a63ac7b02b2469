"""explore.html, a page that repeats a model's routing: it holds the scores and a router in JavaScript."""

import base64
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe import Capacity, SigmoidRouter, SoftmaxRouter
from moe.router import described

from .. import checkpoint, data, files, history
from ..console import visible
from ..hub import folder
from ..hub.tokenizer import open_tokenizer
from ..model import Transformer
from ..tokenizer import ByteTokenizer
from . import measure, page

PAGE_BYTES = 300_000  # the largest page
MOST_TOKENS = 512
ENOUGH_TOKENS = 192  # checkpoints are left out before the passage becomes shorter than this
LEAST_TOKENS = 16
KINDS = {SigmoidRouter: "sigmoid", SoftmaxRouter: "softmax"}


def write(path: Path, trust_code: bool = False) -> Path:
    """Write explore.html, self-contained, into a model's folder -> the page's path

    The page shows every checkpoint of a run, or the one model of any other folder.

    Raises:
        ValueError: the folder has no complete model, or the page does not support its routers.
    """
    config, (tokens, shown) = folder.read_config(path, trust_code), passage(path, trust_code)

    def read(place: Path) -> tuple[Path, int, Transformer]:
        model = checkpoint.load_model(config.model, place / "model.safetensors")
        return place, history.read_state(place)["step"], model

    step: int | None = None
    older: list[Path] = []
    if folder.kind_of(path) == folder.RUN:  # perhaps beside a training that prunes
        newest, step, model = history.read_newest(path, read)
        older = whole_before(path, newest)
    else:
        model = folder.load(path, trust_code)
    routers = read_routers(model)
    router = routers[0]  # all have the same settings
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
    name = visible(path.resolve().name)
    room = PAGE_BYTES - len(render(name, {**head, "tokens": shown, "checkpoints": []}).encode())
    count, kept = fit(room, len(routers), router.num_experts, len(tokens), len(older) + 1)
    drawn = []
    for place in (older[index] for index in kept[:-1]):
        if (found := read_unchanged(place, read)) is not None:
            drawn.append({"step": found[1], "layers": scores_of(found[2], tokens[:count])})
    drawn.append({"step": step, "layers": scores_of(model, tokens[:count])})
    text = render(name, {**head, "tokens": shown[:count], "checkpoints": drawn})
    files.write_file(path / "explore.html", text)
    return path / "explore.html"


def passage(path: Path, trust_code: bool) -> tuple[Tensor, list[str]]:
    """A held-out passage as token ids (time,), and the text displayed for each token."""
    config = folder.read_config(path, trust_code)
    tokenizer = open_tokenizer(path, config.model.vocab_size)
    text = data.load(config.data, config.model.vocab_size, config.train.seed)[1]
    if isinstance(tokenizer, ByteTokenizer):
        tokens = measure.passage(data.Windows(text, config.train.context), MOST_TOKENS)
        return tokens, [measure.show(token) for token in tokens.tolist()]
    some = measure.passage(data.Windows(text, config.train.context), 4 * MOST_TOKENS)
    ids = tokenizer.encode(bytes(some.tolist()))[:MOST_TOKENS]
    texts = [tokenizer.decode([token]).replace(" ", "␣").replace("\n", "↵") for token in ids]
    return torch.tensor(ids), [visible(text) or "∎" for text in texts]


def read_routers(model: Transformer) -> list[Any]:
    """A model's routers.

    Raises:
        ValueError: the model has no router, or the page does not support its kind.
    """
    routers = [bare(router) for router in model.routers()]
    if not routers:
        raise ValueError(
            f"model.num_dense_layers {model.config.num_dense_layers}: no layer has experts; "
            f"it must be less than model.num_layers {model.config.num_layers}"
        )
    if type(routers[0]) not in KINDS:
        raise ValueError(
            f"model.moe.router {model.config.moe.router!r}: the page does not support this router, "
            f"only {' and '.join(KINDS.values())}"
        )
    return routers


def bare(router: Any) -> Any:
    """The router inside a Capacity wrapper, which drops no tokens in evaluation."""
    return router.router if isinstance(router, Capacity) else router


def whole_before(run: Path, newest: Path) -> list[Path]:
    """A run's complete checkpoints before `newest`, oldest first; damaged ones are skipped with a warning."""
    whole = []
    for path in history.checkpoints(run):
        try:
            if int(path.name[5:]) < int(newest.name[5:]) and read_unchanged(path, history.check_whole):
                whole.append(path)
        except ValueError as error:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=2)
    return whole


def read_unchanged(place: Path, read: Callable[[Path], Any]) -> Any:
    """read(checkpoint), or None if a running training removes or replaces the checkpoint meanwhile."""
    before, failure, found = history.identity(place), None, None
    try:
        found = read(place)
    except (OSError, ValueError) as error:
        failure = error
    if before is None or history.identity(place) != before:
        return None
    if failure is not None:
        raise failure
    return found


def fit(
    room: int, layers: int, num_experts: int, num_tokens: int, num_checkpoints: int
) -> tuple[int, list[int]]:
    """How many tokens fit into `room` bytes, and the indices of the checkpoints to keep.

    Checkpoints are thinned out evenly; the newest is always kept.

    Raises:
        ValueError: too few tokens fit, even with a single checkpoint.
    """
    row = layers * num_experts * 4 * 4 / 3  # bytes of a token's scores, in base64
    besides = row + 60 + layers * 40  # a checkpoint's biases and names
    kept = int(room / (besides + min(ENOUGH_TOKENS, num_tokens) * row))
    kept = max(1, min(num_checkpoints, kept))
    count = min(num_tokens, int((room / kept - besides) / row))
    if count < min(LEAST_TOKENS, num_tokens):
        raise ValueError(
            f"{layers} layers of {num_experts} experts are too many for the page: {PAGE_BYTES} bytes hold "
            f"the scores of {max(0, count)} tokens; at least {LEAST_TOKENS} are needed"
        )
    last = num_checkpoints - 1
    return count, [last - (kept - 1 - i) * last // max(1, kept - 1) for i in range(kept)]


@torch.no_grad()
def scores_of(model: Transformer, tokens: Tensor) -> list[dict[str, Any]]:
    """Each MoE layer's scores for the passage and its selection bias (None without one), encoded."""
    return [
        {"scores": encode(routing.scores), "bias": encode(router.bias)}
        for router, routing in zip(map(described, model.routers()), model(tokens.unsqueeze(0)).routings)
    ]


def encode(values: Tensor | None) -> str | None:
    """A tensor as little-endian float32 in base64."""
    return None if values is None else base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def render(name: str, found: dict[str, Any]) -> str:
    """The page; every inserted text is escaped."""
    return page.render(Path(__file__).parent / "explore.html", name=name, data=found)
