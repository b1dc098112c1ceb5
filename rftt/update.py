"""Score the tokens of a batch, then update: one optimizer step of every module that learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rftt.batch import Batch, empty_like
from rftt.learner.fsdp import Totals, World, clip_gradients, equal_count, per_token
from rftt.learner.logprobs import token_logprobs, token_values
from rftt.learner.optim import set_lr
from rftt.rl import kl_estimate, sequence_weights
from rftt.run.config import RLConfig, Training


def score_tokens(
    cfg: RLConfig,
    models: dict[str, Any],
    batch: Batch,
    vocabulary: int,
    world: World,
    totals: Totals,
) -> Batch:
    """What the policy before the update, the reference and the critic say of every token."""

    def each(function: Callable[[Batch], Tensor]) -> Tensor:
        return per_token(function, batch, cfg.max_tokens_per_microbatch, world)

    def logprobs(name: str) -> Tensor:
        return each(lambda b: token_logprobs(models[name], b, cfg.temperature, vocabulary)[0])

    old, ref, values = logprobs("policy"), None, None
    if "reference" in models:
        ref = logprobs("reference")
        totals.add({"kl": (kl_estimate(old, ref, "k3") * batch.action_mask).sum()})
    if "critic" in models:
        values = each(lambda b: token_values(models["critic"], b))
    return batch.replace(old_logprobs=old, ref_logprobs=ref, values=values)


def weigh(batch: Batch, cfg: RLConfig, world: World) -> Batch:
    """A minibatch with the weights of its tokens, where they are not all the same."""
    if cfg.loss_normalization == "token":
        return batch
    weights = sequence_weights(batch.action_mask, batch.lengths, world.sum)
    return batch.replace(loss_weights=weights)


def update(
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    learning_rates: Mapping[str, float],
    batch: Batch,
    loss_of: Callable[[Batch], Tensor],
    cfg: Training,
    world: World,
) -> dict[str, float]:
    """One optimizer step of every module; returns the gradient norms before clipping.

    The step is skipped, on all ranks, where the loss or a norm is not finite; the norms say so.

    `loss_of` sums over tokens (DPO: pairs); the batch's on all ranks are the one denominator.
    """
    n_terms = max(world.sum(float(batch.n_terms)), 1.0)
    groups = equal_count(batch, cfg.max_tokens_per_microbatch, world)
    total = 0.0
    for group in groups:  # each reduces its gradients: whole ones would not fit beside the model
        loss = loss_of(batch.select(group) if group else empty_like(batch))
        (loss / n_terms).backward()
        total = total + loss.detach()
    norms = {name: clip_gradients(modules[name], cfg.max_grad_norm) for name in optimizers}
    if not math.isfinite(world.sum(float(total))):
        norms = dict.fromkeys(norms, math.nan)
    finite = all(map(math.isfinite, norms.values()))  # norms are global: all ranks agree
    for name, optimizer in optimizers.items():
        set_lr(optimizer, learning_rates[name])
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    return norms
