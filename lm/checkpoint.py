"""Models and training states on disk: safetensors, TOML and JSON. No pickle, so loading runs no code."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import files, history
from .config import Config, ModelConfig
from .model import Transformer


def save(model: Transformer, folder: Path | str) -> None:
    """Write config.toml and model.safetensors into a new or empty folder.

    Raises:
        ValueError: the folder is not empty, is a file, or has a name that is not UTF-8.
    """
    folder = Path(folder)
    check_name(folder)
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
    if weights.exists():
        return load_model(config.model, weights)
    return history.read_newest(folder, lambda newest: load_model(config.model, newest / "model.safetensors"))


def check_name(folder: Path) -> None:
    """Raise ValueError unless the folder's path is UTF-8, as safetensors requires."""
    for name in (str(folder), folder.resolve().name):
        if name.encode("utf-8", "replace").decode("utf-8") != name:
            raise ValueError(f"{name!r}: the name is not UTF-8; choose another folder (nothing was written)")


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
    """Write run/checkpoints/step-NNNNNN and prune the older checkpoints."""
    final = run / "checkpoints" / history.name_of(state["step"])

    def write(into: Path) -> None:
        save_file(contiguous(model_tensors(model)), into / "model.safetensors")
        save_file(contiguous(optimizer_tensors(model, optimizer)), into / "optimizer.safetensors")
        names = ("model.safetensors", "optimizer.safetensors")
        sums = {name: files.sha256(into / name, strict=True) for name in names}
        text = history.as_json({**state, "sha256": sums})
        (into / "state.json").write_text(text, encoding="utf-8")
        history.discard(final)  # a damaged checkpoint of the same step

    is_first = not final.parent.exists()
    final.parent.mkdir(exist_ok=True)
    if is_first:
        files.sync(run)
    files.commit(final, write)
    history.prune(run, keep, final)
    return final


def load_checkpoint(
    folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, updates: int = 1
) -> dict[str, Any]:
    """Load a checkpoint's weights and optimizer state into place -> its state.json

    updates: updates of the weights in a step, which the moments' bias correction counts.
    """
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
    state = history.read_state(folder)
    for name, parameter in model.named_parameters():
        values: dict[str, Tensor] = {m: stored[f"{name}.{m}"].to(parameter.device) for m in moments}
        step = torch.tensor(float(state["step"] * updates), device=parameter.device)
        optimizer.state[parameter] = {"step": step, **values}
    return state


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's two moments by parameter name; zeros for a parameter that never had a gradient."""
    return {
        f"{name}.{moment}": optimizer.state[parameter].get(moment, torch.zeros_like(parameter))
        for name, parameter in model.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }
