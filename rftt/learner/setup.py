"""From a config to models, optimizers and learning rates."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rftt.learner.checkpoint import Checkpoints, latest, newest_whole
from rftt.learner.fsdp import World, shard
from rftt.learner.model import load_critic, load_policy
from rftt.learner.optim import build_optimizer
from rftt.run.cli import check_same_run
from rftt.run.config import RLConfig, SFTConfig
from rftt.types import UserError


def build_models(
    cfg: RLConfig, world: World
) -> tuple[dict[str, Any], dict[str, nn.Module], dict[str, Any], dict[str, float]]:
    """All models, sharded; of those that learn also modules, optimizers and peak learning rates."""
    names = ["policy"]
    names += ["reference"] if cfg.kl_coef else []  # the frozen start of the policy
    names += ["critic"] if cfg.advantage_estimator == "ppo" else []
    compute = getattr(torch, cfg.dtype)
    models: dict[str, Any] = {}
    for name in names:
        load = load_critic if name == "critic" else load_policy
        model = load(
            cfg.model_name_or_path,
            compute if name == "reference" else torch.float32,
            gradient_checkpointing=cfg.gradient_checkpointing and name != "reference",
            trust_remote_code=cfg.trust_remote_code,
        ).requires_grad_(name != "reference")
        models[name] = shard(model, world, param_dtype=compute, cpu_offload=cfg.fsdp_cpu_offload)
    modules = {name: models[name] for name in names if name != "reference"}
    peaks = {"policy": cfg.learning_rate, "critic": cfg.critic_learning_rate}
    peaks = {name: peaks[name] for name in modules}
    optimizers = {name: build_optimizer(cfg, modules[name], peak) for name, peak in peaks.items()}
    return models, modules, optimizers, peaks


def checkpoint_to_resume(
    cfg: SFTConfig | RLConfig, world: World, resume: str = "auto"
) -> Path | None:
    """The newest whole checkpoint of this run. Raises UserError if it is not to be continued."""
    out = Path(cfg.output_dir)
    if cfg.train_batch_size < world.size:
        raise UserError(
            f"train_batch_size {cfg.train_batch_size} leaves some of {world.size} ranks idle; "
            f"use at least {world.size}."
        )
    begun = latest(out) is not None
    world.barrier()  # all ranks have looked
    if cfg.overwrite_output_dir:
        return None
    if begun and resume == "never":
        raise UserError(
            f"{out} has checkpoints; set resume_from_checkpoint: auto or "
            "overwrite_output_dir: true, or use a new output_dir."
        )
    if begun:
        check_same_run(out / "config.yaml", asdict(cfg))
    return newest_whole(out, world)


def same_data(rows: Sequence[object], before: str | None, out: Path) -> str:
    """Digest of the rows, to be kept in checkpoints. Raises UserError where theirs is another."""
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    if before not in (None, digest):
        raise UserError(f"{out} was begun with other rows; use a new output_dir for these.")
    return digest


def checkpoints_of(
    cfg: SFTConfig | RLConfig,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    past: dict[str, Any],
) -> Checkpoints:
    """Where this run's checkpoints go; `past` is what the resumed one says.

    Old ones are overwritten here, when the run's log has made sure that nobody else is at work.
    """
    if cfg.overwrite_output_dir and world.is_main:
        shutil.rmtree(Path(cfg.output_dir) / "checkpoints", ignore_errors=True)
    return Checkpoints(
        Path(cfg.output_dir),
        world,
        tokenizer,
        keep=cfg.save_total_limit,
        dtype=cfg.dtype,
        best=past.get("best_score", -math.inf),
    )
