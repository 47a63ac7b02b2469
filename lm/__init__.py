"""The toy transformer: `moe` and `mla` composed, trained, sampled, counted and stored.

Names are resolved when first used, so that `import lm` loads no torch.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["Config", "Output", "Transformer", "count", "generate", "load", "save"]

PLACES = {
    "Config": ("config", "Config"),
    "Output": ("model", "Output"),
    "Transformer": ("model", "Transformer"),
    "count": ("count", None),
    "generate": ("decode", "generate"),
    "load": ("checkpoint", "load"),
    "save": ("checkpoint", "save"),
}


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module 'lm' has no attribute {name!r}")
    module, attribute = PLACES[name]
    found = importlib.import_module(f".{module}", __name__)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value
