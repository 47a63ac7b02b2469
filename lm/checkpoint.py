"""Models and training states on disk: safetensors, TOML and JSON. No pickle, so loading runs no code."""

import json
import math
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import files
from .config import FORMAT, Config, ModelConfig, NewerFormat, check_format
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
ADDED = {  # missing in the states of earlier versions
    "windows": int,  # training windows used so far: the place in the data
    "context": int,  # their length
    "seed": int,  # of their order
    "text": dict,  # fingerprints of the training and the held-out text
    "first_loss": float,
    "best_loss": float,  # of the next batch, at any save
    "diverged": bool,
}
LONGEST_STATE = 2**20  # bytes


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
    return read_newest(folder, lambda newest: load_model(config.model, newest / "model.safetensors"))


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
    final = run / "checkpoints" / name_of(state["step"])

    def write(into: Path) -> None:
        save_file(contiguous(model_tensors(model)), into / "model.safetensors")
        save_file(contiguous(optimizer_tensors(model, optimizer)), into / "optimizer.safetensors")
        sums = {name: sha256(into / name) for name in ("model.safetensors", "optimizer.safetensors")}
        text = as_json({"format": FORMAT, **state, "sha256": sums})
        (into / "state.json").write_text(text, encoding="utf-8")
        discard(final)  # a damaged checkpoint of the same step

    final.parent.mkdir(exist_ok=True)
    files.commit(final, write)
    prune(run, keep, final)
    return final


def prune(run: Path, keep: int, newest: Path) -> None:
    """Remove all but the last `keep` checkpoints up to `newest`, and what a killed process left unfinished.

    If all of these have diverged, the last one that has not is kept too.
    """
    found = checkpoints(run)
    old, kept = found[: found.index(newest) + 1][:-keep], found[: found.index(newest) + 1][-keep:]
    if old and not any(map(is_good, kept)):
        good = next(filter(is_good, reversed(old)), None)
        old = [path for path in old if path != good]
    for path in old:
        discard(path)
    for path in newest.parent.glob(".step-*.tmp"):
        shutil.rmtree(path)


def discard(path: Path) -> None:
    """Remove a checkpoint if it exists; a reader sees all of it or nothing."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        aside = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside)


def is_good(checkpoint: Path) -> bool:
    """Whether a checkpoint's state can be read and is not marked as diverged."""
    try:
        return not read_state(checkpoint).get("diverged", False)
    except ValueError:
        return False


def mark_diverged(checkpoint: Path) -> None:
    """Mark a checkpoint whose next step failed, so that resuming uses an earlier one."""
    state = read_state(checkpoint)
    files.write_file(checkpoint / "state.json", as_json({"format": FORMAT, **state, "diverged": True}))


def as_json(state: dict[str, Any]) -> str:
    """The text of state.json."""
    return json.dumps(state, indent=1, allow_nan=False)


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
    """The first of `whole_checkpoints`. Checkpoints that a running training removes are not missed.

    Raises:
        ValueError: there is no intact checkpoint, or one has a newer format.
    """
    folder, quiet = run / "checkpoints", 0
    while quiet < 3:  # a listing misses checkpoints that are renamed meanwhile
        before, found = identity(folder), checkpoints(run)
        for path in whole_checkpoints(found):
            return path
        unchanged = identity(folder) == before
        if unchanged and any(path.is_dir() for path in found):
            raise ValueError(f"{run}: every checkpoint is damaged")
        quiet = quiet + 1 if unchanged else 0
        time.sleep(0.01)
    raise ValueError(f"{run}: no checkpoint yet")


def whole_checkpoints(found: list[Path]) -> Iterator[Path]:
    """The intact checkpoints among those found, newest first; those that have diverged come last.

    Warns of each one that is skipped.
    """
    diverged = []
    for path in reversed(found):
        try:
            state = check_whole(path)
        except NewerFormat:
            raise
        except ValueError as error:
            if path.is_dir():  # else a running training has removed it
                warnings.warn(f"damaged checkpoint skipped: {error}", stacklevel=3)
            continue
        if state.get("diverged"):
            warnings.warn(f"checkpoint skipped: {path}: training had diverged", stacklevel=3)
            diverged.append(path)
            continue
        yield path
    yield from diverged


def read_newest(run: Path, read: Callable[[Path], Any]) -> Any:
    """read(newest checkpoint), from one and the same checkpoint even while a training replaces it."""
    while True:
        newest = newest_checkpoint(run)
        before = identity(newest)
        try:
            found = read(newest)
        except (OSError, ValueError):
            if before is not None and identity(newest) == before:
                raise
            continue
        if before is not None and identity(newest) == before:
            return found


def identity(folder: Path) -> tuple[int, int] | None:
    """Tells a folder from another one at the same path; None if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def check_whole(checkpoint: Path) -> dict[str, Any]:
    """Raise ValueError unless a checkpoint is of its name's step, as written and finite -> its state"""
    state = read_state(checkpoint)
    if checkpoint.name != name_of(state["step"]):
        raise ValueError(f"{checkpoint / 'state.json'}: step is {state['step']}; expected the folder's")
    for name, digest in state["sha256"].items():
        if sha256(checkpoint / name) != digest:
            raise ValueError(f"{checkpoint / name}: is not what was written (its sha256 differs)")
    for name in state["sha256"]:
        path = checkpoint / name
        with files.guarded(path), safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ValueError(f"{path}: {key} holds NaN or infinite numbers")
    return state


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json and check its fields.

    Raises:
        NewerFormat: only a newer version of lm can read it.
        ValueError: it is damaged; names the file.
    """
    path = checkpoint / "state.json"
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        if path.stat().st_size > LONGEST_STATE:
            raise ValueError(f"larger than {LONGEST_STATE} bytes")
        state = json.loads(path.read_text(encoding="utf-8"))
        check_format(state)
        for key, kind in STATE.items():
            if type(state[key]) is not kind:
                raise ValueError(f"{key} is {state[key]!r:.80}; expected {kind.__name__}")
        for key in ADDED.keys() & state.keys():
            if type(state[key]) is not ADDED[key]:
                raise ValueError(f"{key} is {state[key]!r:.80}; expected {ADDED[key].__name__}")
        if state["step"] < 1 or not math.isfinite(state["seconds"]):
            raise ValueError(f"step is {state['step']} and seconds is {state['seconds']}")
        for key in ("first_loss", "best_loss"):
            if not math.isfinite(state.get(key, 0)):
                raise ValueError(f"{key} is {state[key]}")
        if state.get("windows", 0) < 0 or state.get("context", 1) < 1:
            raise ValueError(f"windows is {state['windows']} and context is {state['context']}")
        if state["dtype"] not in ("torch.float32", "torch.bfloat16"):
            raise ValueError(f"dtype is {state['dtype']!r:.80}")
        if state["sha256"].keys() != {"model.safetensors", "optimizer.safetensors"}:
            raise ValueError(f"sha256 names {', '.join(state['sha256'])!r:.80}")
        return state
    except NewerFormat as error:
        raise NewerFormat(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a valid state file: {error}") from None


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoint folders, in the order of their steps; differently named ones are not checkpoints."""
    found = {}
    for path in (run / "checkpoints").glob("step-[0-9]*"):
        step = re.fullmatch("step-([0-9]+)", path.name)
        if step and path.name == name_of(int(step[1])) and path.is_dir():
            found[int(step[1])] = path
    return [found[step] for step in sorted(found)]


def name_of(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:06d}"
