"""Going over a batch in microbatches, the same number on every rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from rftt.batch import Batch, empty_like
from rftt.learner.fsdp import World, clip_gradients
from rftt.learner.model import token_logprobs, token_values
from rftt.learner.optim import set_lr
from rftt.rl import kl_estimate, sequence_weights
from rftt.run.config import RLConfig, Training


def equal_count(batch: Batch, max_tokens: int, world: World) -> list[list[int]]:
    """Microbatches as document indices; [] stands for an empty one, or FSDP's collectives hang."""
    groups = batch.microbatches(max_tokens)
    return groups + [[]] * (int(world.max(float(len(groups)))) - len(groups))


def per_token(
    function: Callable[[Batch], Tensor], batch: Batch, max_tokens: int, world: World
) -> Tensor:
    """(T,) `function` of every microbatch, without gradients, put back in the batch's order."""
    result = torch.zeros_like(batch.rewards)
    with torch.no_grad():
        for group in equal_count(batch, max_tokens, world):
            if group:
                result[batch.token_index(group)] = function(batch.select(group)).to(result.dtype)
            else:
                function(empty_like(batch))
    return result


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


def deal(
    sizes: Sequence[int],
    n_minibatches: int,
    seed: int,
    world: World,
    groups: Sequence[int] | None = None,
) -> list[list[int]]:
    """This rank's share of each minibatch of a shuffled batch, long and short ones evenly.

    With `groups` (tree packing) those of one group stay on one rank, but for one cut per rank. The
    minibatches themselves depend on neither, nor on the number of ranks: they are what is learnt.
    """
    order = list(range(len(sizes)))
    Random(seed).shuffle(order)
    minibatches = [order[i::n_minibatches] for i in range(n_minibatches)]
    if groups is not None:
        return [_run(sorted(m, key=groups.__getitem__), sizes, world) for m in minibatches]
    return [
        sorted(minibatch, key=lambda i: (-sizes[i], i))[world.rank :: world.size]
        for minibatch in minibatches
    ]


def _run(order: list[int], sizes: Sequence[int], world: World) -> list[int]:
    """This rank's run of `order`: neighbours stay together, and sizes add up to about as much."""
    ends = list(accumulate(sizes[i] for i in order))
    middles = [(end - sizes[i] / 2) / ends[-1] for i, end in zip(order, ends, strict=True)]
    share = [int(middle * world.size) for middle in middles]
    return [i for i, rank in zip(order, share, strict=True) if rank == world.rank]


class Totals:
    """Sums (maxima, for keys that end in _max) of metrics over microbatches, then over ranks."""

    def __init__(self) -> None:
        self._values: defaultdict[str, Tensor | float] = defaultdict(float)

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        for key, value in metrics.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            old = self._values[key]
            self._values[key] = max(old, value) if key.endswith("_max") else old + value

    def reduce(self, world: World, per: float) -> dict[str, float]:
        """Over all ranks; sums are divided by `per`, the global count of action tokens (or 1)."""
        return {
            key: float(world.max(float(value)))
            if key.endswith("_max")
            else float(world.sum(float(value))) / max(per, 1.0)
            for key, value in sorted(self._values.items())
        }
