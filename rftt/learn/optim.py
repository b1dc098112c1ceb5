"""Optimizers and learning-rate schedules. The rate is a function of the step, so there is no
scheduler object to save and none to forget on resume (PAPER §1).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from rftt.schema import UserError

Schedule = Literal["constant", "cosine", "linear"]


def build_optimizer(
    model: nn.Module,
    *,
    name: Literal["adamw", "adamw_8bit"] = "adamw",
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; vectors (norms, biases) do not decay.

    Raises UserError when `adamw_8bit` is asked for without bitsandbytes.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "optim=adamw_8bit needs bitsandbytes: pip install bitsandbytes, or use optim=adamw."
        ) from error
    return AdamW8bit(groups, lr=lr, betas=betas)


def lr_at(
    step: int,
    total: int,
    *,
    base: float,
    kind: Schedule = "constant",
    warmup_steps: int = 0,
    min_ratio: float = 0.0,
) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`: linear warm-up, then `kind`.

    The first step already moves (rate base / warmup_steps); decay ends at min_ratio · base.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total - warmup_steps, 1), 1.0)
    falling = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * progress),
    }
    return base * (min_ratio + (1.0 - min_ratio) * falling[kind])


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
