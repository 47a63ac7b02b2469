"""AdamW without weight decay on norms and embedding, and the learning-rate schedule."""

import math

import torch
from torch import nn

from .config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (V3 section 4.2: betas 0.9 and 0.95, decay 0.1), fused where available.

    Matrices decay; norms and the embedding do not. Selection biases are buffers, which no optimizer sees.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        (decayed if parameter.ndim > 1 and id(parameter) not in embeddings else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    device = next(model.parameters()).device.type
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=device in ("cpu", "cuda")
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step 1..steps.

    Linear warmup over `warmup` steps, then constant, then cosine decay over the last share `decay`; with
    `decay` 0 there is no decay.
    """
    if step <= config.warmup:
        return config.learning_rate * step / config.warmup
    if not config.decay:
        return config.learning_rate
    fall = max(1, round((config.steps - config.warmup) * config.decay))
    progress = max(0.0, (step - (config.steps - fall)) / fall)  # 0 until the decay begins, 1 at the last step
    low = config.learning_rate * config.final_learning_rate
    return low + (config.learning_rate - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
