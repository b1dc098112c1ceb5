"""The models of a run, loaded and sharded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rftt.learner.fsdp import World, shard
from rftt.learner.model import Critic, add_function_rows, load_critic, load_policy
from rftt.run.config import RLConfig, SFTConfig


@dataclass(frozen=True)
class Models:
    """The models of an RL run."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    """The frozen initial policy. None without a KL term."""
    critic: Critic | None
    """The value model of ppo. None for other estimators."""
    vocabulary: int
    """Number of ids in the tokenizer. Rows beyond it are never scored."""

    def trained(self) -> dict[str, nn.Module]:
        """Return the models that learn, by name."""
        critic = {"critic": self.critic} if self.critic else {}
        return {"policy": self.policy, **critic}


def load_models(cfg: RLConfig, world: World, vocabulary: int) -> Models:
    """Load every model that the run needs, all of them from `model_name_or_path`."""
    compute = getattr(torch, cfg.dtype)

    def load(load_one: Any, *, frozen: bool = False) -> Any:
        model = load_one(
            cfg.model_name_or_path,
            compute if frozen else torch.float32,  # the optimizer needs float32 weights
            gradient_checkpointing=cfg.gradient_checkpointing and not frozen,
            trust_remote_code=cfg.trust_remote_code,
        ).requires_grad_(not frozen)
        return shard(model, world, param_dtype=compute, cpu_offload=cfg.fsdp_cpu_offload)

    return Models(
        policy=load(load_policy),
        reference=load(load_policy, frozen=True) if cfg.kl_coef else None,
        critic=load(load_critic) if cfg.advantage_estimator == "ppo" else None,
        vocabulary=vocabulary,
    )


def load_trainee(
    cfg: SFTConfig, world: World, tokenizer: PreTrainedTokenizerBase, new_tokens: list[str]
) -> PreTrainedModel:
    """Load the model that the warm-up trains, with a vocabulary row for each new token."""
    model = load_policy(
        cfg.model_name_or_path,
        torch.float32,  # the optimizer needs float32 weights
        gradient_checkpointing=cfg.gradient_checkpointing,
        trust_remote_code=cfg.trust_remote_code,
    )
    add_function_rows(model, tokenizer, new_tokens)
    compute = getattr(torch, cfg.dtype)
    shard(model, world, param_dtype=compute, cpu_offload=cfg.fsdp_cpu_offload)
    return model
