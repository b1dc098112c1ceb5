"""The mathematics of RL: pure functions of flat tensors, nothing distributed.

Every (T,) tensor is packed as in batch.py: D documents, of whose tokens N are actions. A loss is a
SUM over action tokens. `update.py:Learner.step` divides it by one count for all ranks, because a
mean of means would weigh a token by its microbatch. Metrics are sums as well, except `*_max`.
Departures from the textbook: only action tokens form the time axis, so text that is not the
policy's (forced openers, masked tokens) neither discounts nor bootstraps, and a reward on it
belongs to the last action before it (arXiv 2502.13389; Schulman 2015 for GAE, 2020 for k1–k3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
WorldSum = Callable[[Tensor], Tensor]

LOG_RATIO_LIMIT = 20.0
"""A ratio of e^88 is infinite in float32, and its gradient NaN. Beyond e^20 the clip decides."""


# ---- KL ----


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Return a (T,) estimate of KL(policy ‖ reference) from the policy's own samples.

    k1 is unbiased, but as a loss its mean gradient is 0. k2's gradient is right. k3 is unbiased and
    never negative, hence less noisy. It is the default because GRPO uses it.
    """
    log_ratio = logprobs - ref_logprobs  # (T,)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(-log_ratio) + log_ratio


@dataclass(frozen=True)
class AdaptiveKL:
    """Controller of Ziegler et al. (2019) that keeps the KL per token near `target`."""

    coef: float
    target: float | None  # None keeps `coef` fixed
    horizon: float  # rollouts after which a constant 20 % error has moved `coef` by 20 %

    def update(self, kl: float, n_rollouts: int) -> AdaptiveKL:
        """Return the controller after a step with this KL per token."""
        if self.target is None or not math.isfinite(kl):  # not finite: the update was skipped
            return self
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)  # one noisy batch moves little
        return replace(self, coef=self.coef * (1.0 + error * n_rollouts / self.horizon))


def token_rewards(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, kl_coef: float
) -> Tensor:
    """Return (T,) rewards minus kl_coef · k1 on the masked tokens, which the policy drew itself."""
    if ref_logprobs is None or kl_coef == 0.0:
        return rewards
    penalty = kl_coef * kl_estimate(logprobs, ref_logprobs, "k1")  # (T,)
    return rewards - torch.where(mask, penalty, 0.0)  # other tokens may be infinite


# ---- Advantages ----


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, lengths: Sequence[int], gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return (T,) generalised advantages and returns, 0 outside the mask.

    δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γλ A_{t+1};  R_t = A_t + V_t, over action tokens.
    """
    document, slot, n_slots = _time_axis(mask, lengths)  # (T,), (T,), int
    reward = rewards.new_zeros(len(lengths), n_slots)  # (D, K): one column per action
    reward.index_put_((document, slot), rewards, accumulate=True)  # also rewards outside the mask
    actions = document[mask], slot[mask]  # (N,), (N,): places of the actions
    value = values.new_zeros(len(lengths), n_slots + 1).index_put(actions, values[mask])  # (D, K+1)
    delta = reward + gamma * value[:, 1:] - value[:, :-1]  # (D, K); V is 0 after the last action
    running = delta.new_zeros(len(lengths))  # (D,)
    columns = []
    for column in reversed(delta.unbind(1)):  # from the last action to the first
        running = column + gamma * lam * running
        columns.append(running)
    advantage = torch.stack(columns[::-1], 1)[actions]  # (N,)
    advantages = torch.zeros_like(rewards).masked_scatter(mask, advantage)
    return advantages, torch.where(mask, advantages + values, 0.0)


def discounted_returns(
    rewards: Tensor, mask: Tensor, lengths: Sequence[int], gamma: float
) -> Tensor:
    """Return (T,) Σ_k γ^k r_{t+k} over action tokens: GAE without values."""
    return gae(rewards, torch.zeros_like(rewards), mask, lengths, gamma, 1.0)[0]


def _time_axis(mask: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, int]:
    """Return (T,) document, (T,) index of the last action up to each token (or 0), most actions."""
    counts = torch.tensor(lengths, dtype=torch.int64)  # also where a rank has no documents
    n = int(counts.sum())
    document = torch.arange(len(lengths)).repeat_interleave(counts, output_size=n).to(mask.device)
    starts = (counts.cumsum(0) - counts).to(mask.device)
    seen = mask.cumsum(0)  # (T,) actions up to and including each token
    before = (seen - mask.long())[starts]  # (D,) actions in earlier documents
    slot = (seen - before[document] - 1).clamp(min=0)  # tokens before the first action: 0
    return document, slot, int(slot.max()) + 1 if n else 1


def whiten(x: Tensor, mask: Tensor, world_sum: WorldSum, shift_mean: bool = True) -> Tensor:
    """Return (T,) x with mean 0 and variance 1 over the masked tokens of all ranks; 0 elsewhere.

    The sums are float64, so that they hardly depend on how tokens are dealt out to the ranks.
    """
    picked = x[mask].double()  # (N,)
    count, total = world_sum(torch.stack([picked.new_tensor(len(picked)), picked.sum()]))
    mean = total / count.clamp(min=1)  # over all ranks
    variance = world_sum((picked - mean).square().sum()) / (count - 1).clamp(min=1)
    scale = torch.rsqrt(variance + 1e-8)  # equal values become 0, not NaN
    shifted = (x - mean) * scale + (0.0 if shift_mean else mean)
    return torch.where(mask, shifted, 0.0).to(x.dtype)


def group_advantages(outcomes: list[float], groups: Sequence[Hashable], scale: bool) -> list[float]:
    """Return GRPO's advantages: outcome minus group mean, over the deviation if `scale`.

    A group of equal outcomes has no gradient: its advantages are 0.
    """
    members: dict[Hashable, list[float]] = {}
    for outcome, group in zip(outcomes, groups, strict=True):
        members.setdefault(group, []).append(outcome)
    advantages = []
    for outcome, group in zip(outcomes, groups, strict=True):
        peers = members[group]
        mean = sum(peers) / len(peers)
        variance = sum((peer - mean) ** 2 for peer in peers) / max(len(peers) - 1, 1)  # unbiased
        advantages.append((outcome - mean) / (variance**0.5 + 1e-4 if scale else 1.0))
    return advantages


def informative(outcomes: list[float], groups: list[int]) -> list[bool]:
    """Return which rollouts are in groups of differing outcomes: dynamic sampling keeps these."""
    seen: dict[int, set[float]] = {}
    for outcome, group in zip(outcomes, groups, strict=True):
        seen.setdefault(group, set()).add(outcome)
    return [len(seen[group]) > 1 for group in groups]


def document_sums(x: Tensor, mask: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the (D,) sums of x over each document's action tokens."""
    document = _time_axis(mask, lengths)[0]  # (T,)
    return x.new_zeros(len(lengths)).index_add(0, document, torch.where(mask, x, 0.0))


def sequence_weights(mask: Tensor, lengths: Sequence[int], world_sum: WorldSum) -> Tensor:
    """Return (T,) weights ∝ 1 / (actions in the document): the mean over tokens, then rollouts.

    Over all ranks they average 1 per action token, so that a mean over tokens becomes that mean.
    """
    counts = document_sums(torch.ones_like(mask, dtype=torch.float32), mask, lengths)  # (D,)
    n_actions, n_documents = world_sum(torch.stack([counts.sum(), (counts > 0).float().sum()]))
    weights = n_actions / n_documents.clamp(min=1) / counts.clamp(min=1)  # (D,)
    return weights[_time_axis(mask, lengths)[0]] * mask


def enumeration_weights(old_logprobs: Tensor, branching: Tensor) -> Tensor:
    """Return (T,) π(a) · N(s) / N(s, a) on openers where the tree tried acts in turn, else 1.

    The tree takes an act with certainty, the policy with probability π(a), and the opener stands in
    all N(s, a) rollouts below it. Their weights sum to N(s) · π(a), so that trying every act gives
    the policy gradient at s, as a sum over the acts.
    """
    return torch.where(branching > 0, old_logprobs.exp() * branching, 1.0)


# ---- Losses ----


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Return PPO's clipped surrogate, summed over action tokens.

    `epsilon_high` widens the upper bound (clip-higher); `dual_clip` c > 1 bounds the loss of bad
    actions by c·|A|; `weights` (T,) multiply each token (importance weights, sequence means).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # masked tokens may be infinite
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    high = 1.0 + (epsilon if epsilon_high is None else epsilon_high)
    unclipped = -advantages * ratio  # (T,)
    clipped = -advantages * ratio.clamp(1.0 - epsilon, high)
    loss = torch.maximum(unclipped, clipped)  # the pessimistic one: a loss, so the larger
    if dual_clip is not None:
        bounded = torch.minimum(loss, -advantages * dual_clip)
        loss = torch.where(advantages < 0, bounded, loss)
    if weights is not None:
        loss = loss * weights
    with torch.no_grad():
        metrics = {
            "clip_share": ((clipped > unclipped) & mask).sum(),
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
            "ratio_max": ratio.max(),
        }
    return torch.where(mask, loss, 0.0).sum(), metrics


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Metrics]:
    """Return Σ ½ (V − R)², or the larger error of V clipped to within `clip` of its old value."""
    values = torch.where(mask, values, 0.0)  # other tokens may be infinite
    old_values, returns = (torch.where(mask, x, 0.0) for x in (old_values, returns))
    error = 0.5 * (values - returns).square()
    held = values.clamp(old_values - clip, old_values + clip)  # (T,) within it equal to the bit
    held_error = 0.5 * (held - returns).square()
    metrics = {"value_clip_share": ((held_error > error) & mask).sum()}
    return torch.where(mask, torch.maximum(error, held_error), 0.0).sum(), metrics


def importance_weights(
    old_logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, cap: float
) -> tuple[Tensor, Metrics]:
    """Return (T,) min(π_trainer / π_engine, cap): truncated importance sampling.

    In bfloat16 a token's ratio differed from 1 by up to 5 %. The metrics use the uncapped ratio.
    """
    log_ratio = torch.where(mask, old_logprobs - sampling_logprobs, 0.0)  # (T,)
    ratio = log_ratio.exp()
    metrics = {
        "mismatch_ratio": (ratio * mask).sum(),
        "mismatch_ratio_max": ratio.max(),
        "mismatch_capped_share": ((ratio > cap) & mask).sum(),
        "mismatch_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
    }
    return ratio.clamp(max=cap) * mask, metrics
