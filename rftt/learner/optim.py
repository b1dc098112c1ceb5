"""Build optimizers and compute learning rates (arXiv 2502.13389).

The rate is a function of the step, so checkpoints need no scheduler object.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rftt.learner.fsdp import like_shard, own_part, rows_on_all_ranks
from rftt.run.config import Training
from rftt.types import UserError

BLOCK = 64
"""Values of a row that share a scale in 8-bit moments. It divides the width of nearly all matrices,
so that a shard of whole rows, on any number of ranks, has whole blocks."""
SMALLEST = 4096
"""Smaller matrices keep float32 moments (arXiv 2110.02861)."""


def build_optimizer(cfg: Training, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Build AdamW over the trainable parameters. Vectors (norms, biases) have no weight decay.

    Raises UserError if `optim` is adamw_8bit and torchao is not installed.
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
    optimizer = _adamw_8bit()(groups, lr=lr, betas=betas, block_size=BLOCK)
    for parameter in parameters:  # else torchao decides by the shard, which differs among ranks
        first, second = (_moment(parameter, signed=signed) for signed in (True, False))
        step = torch.tensor(0.0)
        optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    if parameters[0].device.type == "cpu":  # compiling C++ for each shape takes minutes
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    return optimizer


def _adamw_8bit() -> Any:
    """Return torchao's AdamW8bit, which updates sharded tensors; bitsandbytes' does not.

    What torchao logs while it is imported is about kernels that are not used here.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "optim=adamw_8bit needs torchao; pip install -r requirements-8bit.txt, or set "
            "optim=adamw."
        ) from error
    finally:
        logging.disable(before)
    return AdamW8bit


def _moment(parameter: Tensor, *, signed: bool) -> Tensor:
    """Return a moment of zeros, sharded as its parameter: in 8 bits, or in float32 if small."""
    from torchao.optim.subclass_8bit import (  # pyright: ignore[reportMissingImports]
        OptimState8bit,
    )

    own = own_part(parameter)
    whole_blocks = parameter.ndim == 2 and parameter.shape[1] % BLOCK == 0
    if whole_blocks and parameter.numel() >= SMALLEST and rows_on_all_ranks(parameter):
        zeros = OptimState8bit.zeros(own.shape, signed, BLOCK, own.device)
    else:
        zeros = torch.zeros_like(own)
    return like_shard(zeros, parameter)


def parts_of(moment: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors of an optimizer's state, by the end of their name.

    An 8-bit moment consists of codes and of one scale per block, both sharded by rows.
    """
    own: Any = own_part(moment)
    if type(own) is Tensor:
        return {"": moment}
    parts = {".codes": own.codes, ".scale": own.scale.view(len(own), -1)}
    return {end: like_shard(part, moment) for end, part in parts.items()}


def put_parts(moment: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the moment of `parts_of`. An 8-bit one is overwritten."""
    own: Any = own_part(moment)
    if type(own) is Tensor:
        return parts[""]
    own.codes.copy_(own_part(parts[".codes"]))
    own.scale.copy_(own_part(parts[".scale"]).flatten())
    return moment


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
        if isinstance(group["lr"], Tensor):  # torchao's, a tensor so that its step is compiled once
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
