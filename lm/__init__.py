"""The toy transformer: `moe` and `mla` composed, trained, sampled, counted and stored.

Its story, in reading order: config, parts, model, loss, count, fp8; tokenizer, data, optim, evaluate, train,
run, checkpoint, files, machine; terminal, cli. Four packages beside it: inference writes text, hub reads
other people's model folders, serve answers over HTTP, report draws pages.

Names are resolved when first used, so that `import lm` loads no torch.
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
