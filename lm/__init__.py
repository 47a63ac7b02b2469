"""The toy transformer: `moe` and `mla` composed, trained, sampled, counted and stored.

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
    "Engine": ("engine", "Engine"),
    "Output": ("model", "Output"),
    "Transformer": ("model", "Transformer"),
    "count": ("count", None),
    "from_hf": ("hf", "from_hf"),
    "generate": ("decode", "generate"),
    "load": ("checkpoint", "load"),
    "save": ("checkpoint", "save"),
    "to_hf": ("hf", "to_hf"),
}


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module 'lm' has no attribute {name!r}")
    module, attribute = PLACES[name]
    found = importlib.import_module(f".{module}", __name__)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value
