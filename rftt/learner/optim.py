"""Build optimizers and compute learning rates (arXiv 2502.13389).

The rate is a function of the step, so checkpoints need no scheduler object.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from rftt.run.config import Training
from rftt.types import UserError


def build_optimizer(cfg: Training, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Build AdamW over the trainable parameters. Vectors (norms, biases) have no weight decay.

    Raises UserError if `optim` is adamw_8bit and bitsandbytes is not installed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # an adapter has matrices only
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    if cfg.optim == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "optim=adamw_8bit needs bitsandbytes; pip install bitsandbytes, or set optim=adamw."
        ) from error
    return AdamW8bit(groups, lr=lr, betas=betas)


def lr_at(cfg: Training, peak: float, step: int, total: int) -> float:
    """Return the learning rate of `step` (from 0) of `total` steps.

    It rises linearly to `peak` during the warm-up, then follows the schedule down to
    min_lr_ratio · peak. The first step already has a rate above 0.
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
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
