"""Models and training states on disk: safetensors, TOML and JSON. No pickle, so loading runs no code."""

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import files
from .config import Config, ModelConfig
from .files import sha256
from .model import Transformer

STATE = {
    "step": int,
    "tokens": int,
    "seconds": float,
    "dtype": str,
    "cpu_capability": str,
    "threads": int,
    "torch": str,
    "sha256": dict,
}


def save(model: Transformer, folder: Path | str) -> None:
    """Write config.toml and model.safetensors into a new or empty folder.

    Raises:
        ValueError: the folder is not empty, or is a file.
    """
    folder = Path(folder)
    files.check_new(folder)
    files.commit(folder, lambda into: write_model(model, into))


def write_model(model: Transformer, into: Path) -> None:
    """Write config.toml and model.safetensors."""
    (into / "config.toml").write_text(Config(model=model.config).to_toml(), encoding="utf-8")
    save_file(contiguous(model_tensors(model)), into / "model.safetensors")


def load(folder: Path | str, trust_code: bool = False) -> Transformer:
    """Load a model from a folder that `save` wrote, or from the newest intact checkpoint of a run folder.

    Args:
        trust_code: allow the config to name a custom router or attention, which is then imported.

    Raises:
        ValueError: a file is missing, damaged or does not match the config; names the file.
    """
    folder = Path(folder)
    config = read_config(folder, trust_code)
    weights = folder / "model.safetensors"
    if not weights.exists():
        weights = newest_checkpoint(folder) / "model.safetensors"
    return load_model(config.model, weights)


def read_config(folder: Path, trust_code: bool) -> Config:
    """Read a folder's config.toml; one that names custom code needs trust_code."""
    if not (folder / "config.toml").is_file():
        reason = "holds no config.toml" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder}: {reason}; expected a run or a saved model")
    config = Config.load(folder / "config.toml")
    for key, path in config.model.own_parts().items():
        if not trust_code:
            said = f"{key} {path!r} is code; importing it needs trust_code (--trust-code)"
            raise ValueError(f"{folder / 'config.toml'}: {said}")
    return config


def load_model(config: ModelConfig, weights: Path) -> Transformer:
    """Build a model from a file of weights, checking names and shapes before allocating memory."""
    try:
        with torch.device("meta"):
            expected = model_tensors(Transformer(config))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{weights}: its config is not a valid model: {error}") from None
    tensors = read_tensors(weights, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    matrices = {tensor.dtype for name, tensor in tensors.items() if not is_bias(name)}
    if len(matrices) != 1:
        dtypes = sorted(map(str, matrices))
        raise ValueError(f"{weights}: the weights have several dtypes, {dtypes}; expected one")
    model = Transformer(config).to(matrices.pop())
    for name, ours in model_tensors(model).items():
        dtype = tensors[name].dtype
        if is_bias(name) and dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{weights}: {name} is {dtype}; expected torch.float32 or torch.float64")
        unfit = int((~tensors[name].isfinite()).sum())
        if unfit:
            raise ValueError(f"{weights}: {name} holds {unfit} NaN or infinite numbers")
        ours.copy_(tensors[name])
    return model.eval()


def is_bias(name: str) -> bool:
    """Whether a tensor is a router's selection bias, which keeps its own dtype."""
    return name.endswith("router.bias")


def model_tensors(model: Transformer) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, without a tied head, which is the embedding."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["head.weight"]
    return tensors


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in row-major order, which safetensors requires."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def read_tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read a safetensors file that must hold exactly these names and shapes, into new memory.

    Raises:
        ValueError: the file is damaged, or holds something else; names the file.
    """
    longest = 4096 + sum(512 + len(name) for name in expected)  # the header of these tensors fits
    found = files.read_header(path, longest)
    differences = {"missing": expected.keys() - found.keys(), "unexpected": found.keys() - expected.keys()}
    for word, names in differences.items():
        if names:
            first = ", ".join(sorted(names)[:5])
            raise ValueError(f"{path}: {len(names)} {word} tensors, such as {first}")
    for name, shape in expected.items():
        if found[name].dtype == torch.float8_e4m3fn:
            raise ValueError(f"{path}: {name} is F8_E4M3; expected one of {', '.join([*files.DTYPES][:-1])}")
        if found[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {found[name].shape}; the model has {shape}")
    return {name: files.read_tensor(name, found[name]).clone() for name in expected}  # the file may change


def save_checkpoint(
    run: Path, model: Transformer, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write run/checkpoints/step-NNNNNN and remove all but the last `keep` checkpoints."""
    final = run / "checkpoints" / f"step-{state['step']:06d}"

    def write(into: Path) -> None:
        save_file(contiguous(model_tensors(model)), into / "model.safetensors")
        save_file(contiguous(optimizer_tensors(model, optimizer)), into / "optimizer.safetensors")
        sums = {name: sha256(into / name) for name in ("model.safetensors", "optimizer.safetensors")}
        text = json.dumps({**state, "sha256": sums}, indent=1, allow_nan=False)
        (into / "state.json").write_text(text, encoding="utf-8")

    final.parent.mkdir(exist_ok=True)
    files.commit(final, write)
    found = checkpoints(run)
    unfinished = final.parent.glob(".step-*.tmp")  # left by runs that were killed while saving
    for path in [*found[: found.index(final) + 1][:-keep], *unfinished]:
        shutil.rmtree(path)
    return final


def load_checkpoint(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint's weights and optimizer state into place -> its state.json"""
    ours = model_tensors(model)
    theirs = read_tensors(folder / "model.safetensors", {name: tuple(t.shape) for name, t in ours.items()})
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    moments = ("exp_avg", "exp_avg_sq")
    expected = {f"{name}.{moment}": shapes[name] for name in names for moment in moments}
    stored = read_tensors(folder / "optimizer.safetensors", expected)
    state = read_state(folder)
    for name, parameter in model.named_parameters():
        values: dict[str, Tensor] = {m: stored[f"{name}.{m}"].to(parameter.device) for m in moments}
        step = torch.tensor(float(state["step"]), device=parameter.device)
        optimizer.state[parameter] = {"step": step, **values}
    return state


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's two moments by parameter name; zeros for a parameter that never had a gradient."""
    return {
        f"{name}.{moment}": optimizer.state[parameter].get(moment, torch.zeros_like(parameter))
        for name, parameter in model.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }


def newest_checkpoint(run: Path) -> Path:
    """The newest intact checkpoint; damaged ones are skipped with a warning.

    Raises:
        ValueError: there is no intact checkpoint.
    """
    found = checkpoints(run)
    for path in reversed(found):
        try:
            check_whole(path)
            return path
        except ValueError as error:
            warnings.warn(f"damaged checkpoint skipped: {error}", stacklevel=2)
    raise ValueError(f"{run}: {'every checkpoint is damaged' if found else 'no checkpoint yet'}")


def check_whole(checkpoint: Path) -> None:
    """Raise ValueError unless a checkpoint's files match their checksums."""
    for name, digest in read_state(checkpoint)["sha256"].items():
        if sha256(checkpoint / name) != digest:
            raise ValueError(f"{checkpoint / name}: is not what was written (its sha256 differs)")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json and check its fields."""
    path = checkpoint / "state.json"
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in STATE.items():
            if type(state[key]) is not kind:
                raise ValueError(f"{key} is {state[key]!r:.80}; expected {kind.__name__}")
        if state["step"] < 1 or not math.isfinite(state["seconds"]):
            raise ValueError(f"step is {state['step']} and seconds is {state['seconds']}")
        if state["dtype"] not in ("torch.float32", "torch.bfloat16"):
            raise ValueError(f"dtype is {state['dtype']!r:.80}")
        if state["sha256"].keys() != {"model.safetensors", "optimizer.safetensors"}:
            raise ValueError(f"sha256 names {', '.join(state['sha256'])!r:.80}")
        return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a valid state file: {error}") from None


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoint folders, oldest first."""
    found = (run / "checkpoints").glob("step-[0-9]*")
    return sorted(found, key=lambda path: (len(path.name), path.name))  # step 1,000,000 sorts after 999,999
