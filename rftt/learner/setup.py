"""The models of a run, loaded and sharded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rftt.engines import vocabulary_size
from rftt.engines.opened import check_rows, check_savable, open_config
from rftt.engines.vocabulary import check_free
from rftt.learner.check import check_backbone, check_policy
from rftt.learner.fsdp import World, shard
from rftt.learner.lora import Reference, attach
from rftt.learner.model import Critic, load_critic, load_policy
from rftt.learner.rows import add_function_rows, matrices
from rftt.run.config import RLConfig, SFTConfig
from rftt.run.data import Example, lengths_of
from rftt.tokens import CLOSERS, OPENERS, FunctionIds


@dataclass(frozen=True)
class Models:
    """The models of an RL run."""

    policy: PreTrainedModel
    reference: PreTrainedModel | Reference | None
    """The frozen initial policy. None without a KL term."""
    critic: Critic | None
    """The value model of ppo. None for other estimators."""
    vocabulary: int
    """Number of ids in the tokenizer. Rows beyond it are never scored."""

    def trained(self) -> dict[str, nn.Module]:
        """Return the models that learn, by name."""
        critic = {"critic": self.critic} if self.critic else {}
        return {"policy": self.policy, **critic}


def load_models(
    cfg: RLConfig, world: World, vocabulary: int, ids: FunctionIds | None = None
) -> Models:
    """Load every model that the run needs, all of them from `model_name_or_path`.

    With `use_peft` there is one, whose functional tokens `ids` are trained beside the adapter.
    Raises UserError if a model is not what its folder says, or would be scored wrongly.
    """
    if not cfg.skip_model_check:
        check_savable(cfg.model_name_or_path)
    compute = getattr(torch, cfg.dtype)

    def load(load_one: Any, *, frozen: bool = False) -> Any:
        model = load_one(
            cfg.model_name_or_path,
            # The optimizer needs float32 weights, and never sees frozen ones.
            compute if frozen or cfg.use_peft else torch.float32,
            gradient_checkpointing=cfg.gradient_checkpointing and not frozen,
            trust_remote_code=cfg.trust_remote_code,
            check=not cfg.skip_model_check,
        ).requires_grad_(not frozen)
        if not cfg.skip_model_check:
            if isinstance(model, Critic):
                check_backbone(model.backbone)
            else:
                check_policy(model, vocabulary, tree=cfg.packing == "tree")
        if cfg.use_peft and not isinstance(model, Critic):
            attach(cfg, model, (*ids.openers, *ids.closers) if ids else (), cfg.seed)
        return shard(model, world, param_dtype=compute, cpu_offload=cfg.fsdp_cpu_offload)

    # In turns, because the host of eight ranks may not hold a model of each.
    policy, reference, critic = world.in_turns(partial(load, load_policy)), None, None
    if cfg.kl_coef and cfg.use_peft:
        reference = Reference(policy)
    elif cfg.kl_coef:
        reference = world.in_turns(partial(load, load_policy, frozen=True))
    if cfg.advantage_estimator == "ppo":
        critic = world.in_turns(partial(load, load_critic))
    return Models(policy, reference, critic, vocabulary)


def _function_rows(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the vocabulary rows of the sixteen delimiters, which the tokenizer must have."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in OPENERS + CLOSERS]


def load_trainee(
    cfg: SFTConfig,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: list[str],
    rows: Sequence[Example],
) -> tuple[PreTrainedModel, int]:
    """Load the model that the warm-up trains on `rows`, with an embedding for each new token.

    Return it and the number of ids. Raises UserError as load_models does.
    """
    path, n_tokens = cfg.model_name_or_path, vocabulary_size(tokenizer)
    if not cfg.skip_model_check:
        check_savable(path)
        check_free(tokenizer, new_tokens)
        config = open_config(path, trust_remote_code=cfg.trust_remote_code)
        check_rows(path, config, lengths_of(rows))
    compute = getattr(torch, cfg.dtype)

    def load() -> PreTrainedModel:
        model = load_policy(
            path,
            # The optimizer needs float32 weights, and never sees frozen ones.
            compute if cfg.use_peft else torch.float32,
            gradient_checkpointing=cfg.gradient_checkpointing,
            trust_remote_code=cfg.trust_remote_code,
            check=not cfg.skip_model_check,
        )
        ids = _function_rows(tokenizer) if cfg.functional_tokens else []
        before = [matrix[ids] for matrix in matrices(model) if len(matrix) > max(ids, default=0)]
        add_function_rows(model, tokenizer, new_tokens)
        if not cfg.skip_model_check:
            check_policy(model, n_tokens)
        if cfg.use_peft:
            attach(cfg, model, ids, cfg.seed, frozen=before)
        shard(model, world, param_dtype=compute, cpu_offload=cfg.fsdp_cpu_offload)
        return model

    return world.in_turns(load), n_tokens
