"""Test rl.py against slow oracles: loops over one document, written from the formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rftt import rl
from rftt.learner import offline
from rftt.learner.model import critic_metrics

Case = tuple[Tensor, Tensor, Tensor, tuple[int, ...]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(a: Tensor, b: Tensor | list[float], atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), atol=atol, rtol=1e-5)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """(T,) rewards, values and mask of a few documents; the first token is never an action."""
    lengths = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = sum(lengths)
    rewards, values = torch.randn(2, n, generator=generator)
    mask = torch.rand(n, generator=generator) < 0.6
    first = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    mask[first] = False
    return rewards, values, mask, lengths


def oracle_gae(case: Case, gamma: float, lam: float) -> tuple[list[float], list[float]]:
    rewards, values, mask, lengths = (x.tolist() if isinstance(x, Tensor) else x for x in case)
    advantages, returns, start = [0.0] * len(rewards), [0.0] * len(rewards), 0
    for length in lengths:
        tokens = range(start, start + length)
        actions = [t for t in tokens if mask[t]]
        start += length
        if not actions:
            continue
        earned = dict.fromkeys(actions, 0.0)
        for t in tokens:
            earned[max([a for a in actions if a <= t], default=actions[0])] += rewards[t]
        for i, t in enumerate(actions):
            for k, u in enumerate(actions[i:]):
                bootstrap = values[actions[i + k + 1]] if i + k + 1 < len(actions) else 0.0
                delta = earned[u] + gamma * bootstrap - values[u]
                advantages[t] += (gamma * lam) ** k * delta
            returns[t] = advantages[t] + values[t]
    return advantages, returns


@pytest.mark.oracle
@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_matches_its_oracle(case: Case, gamma: float, lam: float) -> None:
    advantages, returns = rl.gae(*case, gamma, lam)
    expected = oracle_gae(case, gamma, lam)
    close(advantages, expected[0])
    close(returns, expected[1])


@pytest.mark.oracle
@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from([0.5, 1.0]))
def test_discounted_returns_match_their_oracle(case: Case, gamma: float) -> None:
    rewards, _, mask, lengths = case
    zero_values = (rewards, torch.zeros_like(rewards), mask, lengths)
    close(
        rl.discounted_returns(rewards, mask, lengths, gamma), oracle_gae(zero_values, gamma, 1.0)[0]
    )


@pytest.mark.invariant
@settings(deadline=None, max_examples=40)
@given(cases())
def test_undiscounted_return_of_the_first_action_is_the_reward_sum(case: Case) -> None:
    rewards, _, mask, lengths = case
    returns = rl.discounted_returns(rewards, mask, lengths, 1.0)
    for reward, value, keep in zip(
        *(x.split(lengths) for x in (rewards, returns, mask)), strict=True
    ):
        if keep.any():
            close(value[keep][0], reward.sum().item())


@pytest.mark.oracle
@settings(deadline=None, max_examples=40)
@given(cases(), st.booleans())
def test_whiten_matches_its_oracle(case: Case, shift: bool) -> None:
    x, _, mask, _ = case
    picked = [value for value, keep in zip(x.tolist(), mask.tolist(), strict=True) if keep]
    mean = sum(picked) / max(len(picked), 1)
    variance = sum((value - mean) ** 2 for value in picked) / max(len(picked) - 1, 1)
    expected = [
        ((value - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift else mean)) * keep
        for value, keep in zip(x.tolist(), mask.tolist(), strict=True)
    ]
    close(rl.whiten(x, mask, lambda t: t, shift_mean=shift), expected, atol=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages_match_their_oracle(scale: bool) -> None:
    outcomes, groups = [1.0, 0.0, 0.1, 1.0, 1.0, 0.0], [7, 7, 3, 3, 7, 9]
    expected = []
    for outcome, group in zip(outcomes, groups, strict=True):
        peers = torch.tensor([o for o, g in zip(outcomes, groups, strict=True) if g == group])
        deviation = peers.std().item() if len(peers) > 1 else 0.0
        centred = outcome - peers.mean().item()
        expected.append(centred / (deviation + 1e-4) if scale else centred)
    assert rl.group_advantages(outcomes, groups, scale) == pytest.approx(expected, abs=1e-5)


@pytest.mark.invariant
def test_a_group_of_equal_outcomes_teaches_nothing() -> None:
    assert rl.group_advantages([0.1, 0.1, 0.1], [0, 0, 0], scale=True) == pytest.approx([0, 0, 0])
    assert rl.informative([0.1, 0.1, 1.0, 0.0], [0, 0, 1, 1]) == [False, False, True, True]


@pytest.mark.oracle
def test_sequence_weights_match_their_oracle() -> None:
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0], dtype=torch.bool)
    weights = rl.sequence_weights(mask, (4, 2, 2), lambda t: t)
    close(weights, [0, 0.75, 0.75, 0, 0, 1.5, 0, 0])  # 3 actions over 2 documents with any
    x = torch.arange(8.0)
    assert (weights * x).sum().item() / 3 == pytest.approx(((1 + 2) / 2 + 5) / 2)


@pytest.mark.oracle
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.sampled_from([None, 0.4]),
    st.sampled_from([None, 1.5]),
    st.booleans(),
)
def test_policy_loss_matches_its_oracle(
    seed: int, high: float | None, dual: float | None, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    new, old, advantages, weights = torch.randn(4, 12, generator=generator)
    mask = torch.rand(12, generator=generator) < 0.7
    loss, metrics = rl.policy_loss(
        new, old, advantages, mask,
        epsilon=0.2, epsilon_high=high, dual_clip=dual, weights=weights if weighted else None,
    )  # fmt: skip
    total, clipped, kl, largest = 0.0, 0, 0.0, 1.0
    for t in range(12):
        if not mask[t]:
            continue
        a, r = advantages[t].item(), math.exp(new[t] - old[t])
        surrogate = min(a * r, a * min(max(r, 0.8), 1.2 if high is None else 1.4))
        clipped += surrogate < a * r
        if dual and a < 0:
            surrogate = max(surrogate, dual * a)
        total -= surrogate * (weights[t].item() if weighted else 1.0)
        kl += (r - 1) - math.log(r)
        largest = max(largest, r)
    assert loss.item() == pytest.approx(total, rel=1e-4, abs=1e-4)
    assert metrics["clip_share"].item() == clipped
    assert metrics["approx_kl"].item() == pytest.approx(kl, rel=1e-4, abs=1e-4)
    assert metrics["ratio_max"].item() == pytest.approx(largest, rel=1e-4)


@pytest.mark.invariant
def test_policy_loss_ignores_garbage_outside_the_mask() -> None:
    new = torch.tensor([0.1, float("inf"), -0.3], requires_grad=True)
    mask = torch.tensor([True, False, True])
    loss, _ = rl.policy_loss(new, torch.zeros(3), torch.ones(3), mask, epsilon=10.0)
    loss.backward()
    assert new.grad is not None
    close(new.grad, [-math.exp(0.1), 0.0, -math.exp(-0.3)])


@pytest.mark.oracle
@pytest.mark.parametrize("clip", [math.inf, 0.2])
def test_value_loss_matches_its_oracle(clip: float) -> None:
    generator = torch.Generator().manual_seed(3)
    values, old, returns = torch.randn(3, 10, generator=generator)
    mask = torch.arange(10) % 3 > 0
    loss, metrics = rl.value_loss(values, old, returns, mask, clip)
    total, clipped = 0.0, 0
    for v, o, r, keep in zip(*(x.tolist() for x in (values, old, returns, mask)), strict=True):
        held = min(max(v, o - clip), o + clip)
        total += 0.5 * max((v - r) ** 2, (held - r) ** 2) * keep
        clipped += keep and (held - r) ** 2 > (v - r) ** 2
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert metrics["value_clip_share"].item() == clipped


@pytest.mark.oracle
def test_kl_estimates_match_their_oracle_in_expectation() -> None:
    """Σ p·estimate over the vocabulary: the exact KL for k1 and k3, its gradient for k2."""
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    logp, logq = logits.log_softmax(-1), torch.randn(9, dtype=torch.float64).log_softmax(-1)
    exact = sum(
        p * (math.log(p) - q) for p, q in zip(logp.exp().tolist(), logq.tolist(), strict=True)
    )
    for kind in ("k1", "k3"):
        assert (logp.exp() * rl.kl_estimate(logp, logq, kind)).sum().item() == pytest.approx(exact)
    assert (rl.kl_estimate(logp, logq, "k3") >= 0).all()
    wanted = torch.autograd.grad((logp.exp() * (logp - logq)).sum(), logits, retain_graph=True)[0]
    as_loss = (logp.exp().detach() * rl.kl_estimate(logp, logq, "k2")).sum()
    close(torch.autograd.grad(as_loss, logits)[0], wanted, atol=1e-9)


@pytest.mark.oracle
def test_token_rewards_match_their_oracle() -> None:
    rewards, logprobs, ref = torch.randn(3, 6)
    mask = torch.tensor([0, 1, 1, 0, 1, 1], dtype=torch.bool)
    expected = [
        r - 0.1 * (p - q) * m
        for r, p, q, m in zip(*(x.tolist() for x in (rewards, logprobs, ref, mask)), strict=True)
    ]
    close(rl.token_rewards(rewards, logprobs, ref, mask, 0.1), expected)
    assert rl.token_rewards(rewards, logprobs, None, mask, 0.1) is rewards


@pytest.mark.oracle
def test_importance_weights_match_their_oracle() -> None:
    old, sampled = torch.tensor([[0.0, -1.0, -0.2, -9.0], [0.0, -1.5, -0.1, 0.0]])
    mask = torch.tensor([False, True, True, False])
    weights, metrics = rl.importance_weights(old, sampled, mask, cap=1.5)
    close(weights, [0.0, 1.5, math.exp(-0.1), 0.0])
    assert metrics["mismatch_ratio"].item() == pytest.approx(math.exp(0.5) + math.exp(-0.1))
    assert metrics["mismatch_ratio_max"].item() == pytest.approx(math.exp(0.5))
    assert metrics["mismatch_capped_share"].item() == 1


@pytest.mark.oracle
def test_critic_metrics_match_their_oracle() -> None:
    values, returns = torch.randn(2, 30)
    mask = torch.rand(30) < 0.8
    expected = 1 - (returns - values)[mask].var() / returns[mask].var()
    found = critic_metrics(values, returns, mask, lambda t: t)
    assert found == {"explained_variance": pytest.approx(expected.item(), rel=1e-4)}
    equal = critic_metrics(values, torch.ones(30), mask, lambda t: t)
    assert equal == {"explained_variance": 0.0}
    assert critic_metrics(None, None, mask, lambda t: t) == {}


@pytest.mark.oracle
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_loss_matches_its_oracle(smoothing: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 5)
    loss, metrics = offline.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3, smoothing)
    total, right = 0.0, 0
    for w, x, ref_w, ref_x in zip(
        *(pair.tolist() for pair in (chosen, rejected, ref_chosen, ref_rejected)), strict=True
    ):
        margin = 0.3 * ((w - ref_w) - (x - ref_x))
        p = 1 / (1 + math.exp(-margin))
        total -= (1 - smoothing) * math.log(p) + smoothing * math.log(1 - p)
        right += margin > 0
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert metrics["dpo_accuracy"].item() == right


@pytest.mark.oracle
def test_sft_loss_and_document_sums_match_their_oracle() -> None:
    logprobs, mask = torch.arange(6.0), torch.tensor([0, 1, 0, 0, 1, 1], dtype=torch.bool)
    assert offline.sft_loss(logprobs, mask).item() == -(1 + 4 + 5)
    close(rl.document_sums(logprobs, mask, (3, 3)), [1.0, 9.0])


def test_adaptive_kl_moves_towards_its_target() -> None:
    start = rl.AdaptiveKL(coef=0.1, target=0.05, horizon=1000)
    assert start.update(0.5, 100).coef == pytest.approx(0.1 * 1.02)
    assert start.update(0.0, 100).coef == pytest.approx(0.1 * 0.98)
    assert start.update(0.05, 100).coef == pytest.approx(0.1)
    assert start.update(math.nan, 100) == start  # a skipped update must not spoil those after it


# ---- Values that no sum may meet ----


def test_values_behind_the_mask_may_be_infinite() -> None:
    mask = torch.tensor([False, True])
    logprobs = torch.tensor([-math.inf, -1.0], requires_grad=True)
    rewards = rl.token_rewards(
        torch.zeros(2), logprobs.detach(), torch.tensor([0.0, -2.0]), mask, 0.5
    )
    close(rewards, [0.0, -0.5])
    values = torch.tensor([math.inf, 1.0], requires_grad=True)
    old, returns = torch.tensor([math.nan, 1.0]), torch.tensor([-math.inf, 3.0])
    loss, _ = rl.value_loss(values, old, returns, mask, 0.2)
    loss.backward()
    assert loss.item() == 2.0
    close(values.grad if values.grad is not None else torch.zeros(2), [0.0, -2.0])


def test_a_ratio_beyond_float32_has_a_finite_gradient() -> None:
    """e^100 is infinite in float32, and 0 x inf in the backward pass is NaN."""
    new = torch.tensor([-0.1, -200.1], requires_grad=True)
    old, mask = torch.tensor([-100.1, -0.1]), torch.ones(2, dtype=torch.bool)
    for advantage in (1.0, -1.0):
        loss, metrics = rl.policy_loss(new, old, torch.full((2,), advantage), mask, epsilon=0.2)
        (gradient,) = torch.autograd.grad(loss, new)
        assert gradient.isfinite().all()
        assert all(math.isfinite(float(metric)) for metric in metrics.values())


def test_the_value_clip_does_not_count_rounding() -> None:
    """Inside the range V + (x - V) differs from x in its last bit; the clip must not act there."""
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(4096, generator=generator)
    values = old + 0.1 * torch.rand(4096, generator=generator)  # within the range of 0.2
    returns = torch.randn(4096, generator=generator)
    mask = torch.ones(4096, dtype=torch.bool)
    assert rl.value_loss(values, old, returns, mask, 0.2)[1]["value_clip_share"] == 0


# ---- Openers that the tree forces ----


@pytest.mark.oracle
def test_enumeration_weights_give_the_exact_gradient() -> None:
    """A node s whose acts the tree tried in turn: N(s) x the gradient of the policy's value."""
    logits = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    counts, values = [5, 1, 2], torch.tensor([0.2, 1.0, 0.5], dtype=torch.float64)  # N(s, a), Q(a)
    logprobs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * values).sum(), logits, retain_graph=True)
    act = torch.tensor([0] * 5 + [1] + [2] * 2)  # one opener per rollout below s
    branching = torch.tensor([sum(counts) / n for n in counts], dtype=torch.float64)[act]
    weights = rl.enumeration_weights(logprobs.detach()[act], branching)
    surrogate = (weights * values[act] * logprobs[act]).sum()
    (estimate,) = torch.autograd.grad(surrogate, logits)
    close(estimate, sum(counts) * exact, atol=1e-12)
    assert rl.enumeration_weights(torch.zeros(2), torch.zeros(2)).tolist() == [1.0, 1.0]
