"""What a command needs before it starts: installed packages, address space, memory for its output."""

import contextlib

EXTRAS = {
    **dict.fromkeys(("filelock", "jinja2", "matplotlib", "safetensors", "tomli_w", "tqdm", "tyro"), "lm"),
    **dict.fromkeys(("fastapi", "pydantic", "starlette", "uvicorn"), "lm,serve"),
    "tokenizers": "lm,hf",
    "tensorboard": "lm,tensorboard",
}
TORCH_BYTES = 600 * 2**20  # address space that importing torch takes; with less, it may abort
SAMPLE_BYTES, TOKEN_BYTES = 8192, 36  # of a request with its random generator, and of each token in it


def reason(error: BaseException) -> str:
    """An error in one line; a missing optional package is named with the extra that installs it."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in EXTRAS:
        return f"needs {package}: pip install -c constraints.txt -e '.[{EXTRAS[package]}]'"
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_address_space() -> None:
    """Raise MemoryError if `ulimit -v` leaves too little for torch, whose import could then abort."""
    with contextlib.suppress(ImportError):
        import resource  # not on Windows, which has no such limit

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY and limit < TORCH_BYTES:
            raise MemoryError(
                f"the address space is limited to {limit / 2**20:,.0f} MiB (ulimit -v); "
                f"PyTorch needs {TORCH_BYTES / 2**20:,.0f} MiB"
            )


def check_output(samples: int, max_new_tokens: int) -> None:
    """Raise ValueError if the tokens to generate do not fit into this machine's memory."""
    from .machine import memory

    needed = max(samples, 0) * (SAMPLE_BYTES + TOKEN_BYTES * max(max_new_tokens, 0))
    here = memory() or 2**40
    if needed > here:
        raise ValueError(
            f"{samples:,} x {max_new_tokens:,} generated tokens take {needed / 2**30:,.0f} GiB; "
            f"this machine has {here / 2**30:,.0f} GiB; lower --num-samples or --max-new-tokens"
        )
