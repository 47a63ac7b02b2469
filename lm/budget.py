"""The memory that a command needs at least, compared with what the machine has before it starts.

Imports torch only in what a training needs.
"""

import contextlib

from .config import ModelConfig, TrainConfig

TORCH_BYTES = 600 * 2**20  # address space that importing torch takes; with less, it may abort
SAMPLE_BYTES, TOKEN_BYTES = 8192, 36  # of a request with its random generator, and of each token in it


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
    from . import machine

    needed = max(samples, 0) * (SAMPLE_BYTES + TOKEN_BYTES * max(max_new_tokens, 0))
    here = machine.memory() or 2**40
    if needed > here:
        raise ValueError(
            f"{samples:,} x {max_new_tokens:,} generated tokens take {needed / 2**30:,.0f} GiB; "
            f"this machine has {here / 2**30:,.0f} GiB; lower --num-samples or --max-new-tokens"
        )


def check_memory(config: ModelConfig, train: TrainConfig | None = None) -> None:
    """Raise ValueError if a training cannot fit into this machine's memory.

    Weights, gradients and two moments take 16 bytes per parameter. With `train`, the activations of a batch
    are added.
    """
    from . import machine

    parameters, here = num_parameters(config), machine.memory()
    needed = 16 * parameters
    if 0 < here < needed:
        raise ValueError(
            f"the model has {parameters:,} parameters; training them takes {needed / 2**30:,.0f} GiB; "
            f"this machine has {here / 2**30:,.0f} GiB"
        )
    if train is None:
        return
    batch = activation_bytes(config, train)
    if 0 < here < needed + batch:
        raise ValueError(
            f"train.batch_size {train.batch_size} of train.context {train.context} tokens takes at least "
            f"{batch / 2**30:,.0f} GiB; this machine has {here / 2**30:,.0f} GiB"
            + ("" if train.recompute else "; a smaller batch_size with train.accumulation takes less")
        )


def num_parameters(config: ModelConfig) -> int:
    """All parameters; a model with custom parts is built without memory to count them."""
    from . import count

    try:
        return count.total_parameters(config)
    except ValueError:
        import torch

        from .model import Transformer

        with torch.device("meta"):
            return count.built_parameters(Transformer(config))


def activation_bytes(config: ModelConfig, train: TrainConfig) -> int:
    """The least that a forward pass keeps for the backward pass.

    A token takes its ids, each block's input in fp32 and, without recomputation, at least six vectors of
    size dim per block and four hidden vectors of its MLP, in the dtype of the matrix products.
    """
    per_token = 16 + 4 * config.num_layers * config.dim
    if not train.recompute:
        moe = config.num_layers - config.num_dense_layers
        used = config.moe.top_k + config.moe.num_shared_experts
        hidden = config.num_dense_layers * config.hidden_dim + moe * used * config.moe.hidden_dim
        itemsize = 4 if train.dtype == "float32" else 2
        per_token += itemsize * (6 * config.num_layers * config.dim + 4 * hidden)
    return train.batch_size * train.context * per_token
