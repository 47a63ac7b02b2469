"""The toy transformer: `moe` and `mla` composed into a model that trains, generates, saves and loads.

Modules in reading order: config, parts, model, loss, count, fp8; tokenizer, data, optim, evaluate, train,
run, checkpoint, history, files, machine, budget; console, terminal, cli. Four packages stand beside them:
inference generates text, hub reads and writes Hugging Face folders, serve answers over HTTP, report makes
HTML pages.

Names are resolved on first use, so `import lm` does not import torch.
"""

import importlib

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Engine",
    "Output",
    "Transformer",
    "count",
    "from_hf",
    "generate",
    "load",
    "save",
    "to_hf",
]

PLACES = {
    "Config": ("config", "Config"),
    "Engine": ("inference.engine", "Engine"),
    "Output": ("model", "Output"),
    "Transformer": ("model", "Transformer"),
    "count": ("count", None),
    "from_hf": ("hub.hf", "from_hf"),
    "generate": ("inference.generate", "generate"),
    "load": ("hub.folder", "load"),
    "save": ("checkpoint", "save"),
    "to_hf": ("hub.hf", "to_hf"),
}


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module 'lm' has no attribute {name!r}")
    module, attribute = PLACES[name]
    found = importlib.import_module(f".{module}", __name__)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value
