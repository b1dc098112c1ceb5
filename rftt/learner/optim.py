"""Optimizers and learning-rate schedules. The rate is a function of the step, so there is no
scheduler object to save and none to forget on resume (arXiv 2502.13389).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from rftt.run.config import Training
from rftt.types import UserError


def build_optimizer(cfg: Training, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; vectors (norms, biases) do not decay.

    Raises UserError when `adamw_8bit` is asked for without bitsandbytes.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    if cfg.optim == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "optim=adamw_8bit needs bitsandbytes: pip install bitsandbytes, or use optim=adamw."
        ) from error
    return AdamW8bit(groups, lr=lr, betas=betas)


def lr_at(cfg: Training, peak: float, step: int, total: int) -> float:
    """Learning rate of `step` (from 0) of `total`: linear warm-up to `peak`, then the schedule.

    The first step already moves; decay ends at min_lr_ratio · peak.
    """
    warmup_steps = math.ceil(cfg.warmup_ratio * total)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total - warmup_steps, 1), 1.0)
    falling = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * progress),
    }[cfg.lr_scheduler_type]
    return peak * (cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * falling)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
