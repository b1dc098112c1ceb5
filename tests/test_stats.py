"""Test run/stats.py against brute force and hand-worked cases."""

import json
import math
import random
from fractions import Fraction
from itertools import combinations
from types import SimpleNamespace

import pytest

from rftt.batch import collate
from rftt.run.stats import (
    learned_metrics,
    majority,
    mean_ci,
    paired_bootstrap,
    pass_at_k,
    readable,
    rollout_metrics,
)
from rftt.tokens import ACTS
from rftt.types import Problem, Rollout


@pytest.mark.oracle
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_enumerates_every_draw(n: int) -> None:
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = [any(draw) for draw in combinations(samples, k)]
            assert pass_at_k(n, c, k) == pytest.approx(float(Fraction(sum(draws), len(draws))))


@pytest.mark.invariant
def test_pass_at_k_never_falls_with_k_and_pass_at_1_is_the_mean() -> None:
    for c in range(65):
        curve = [pass_at_k(64, c, k) for k in range(1, 65)]
        assert curve == sorted(curve)
        assert curve[0] == pytest.approx(c / 64)
    assert pass_at_k(5000, 1, 2500) == pytest.approx(0.5)  # where a product of floats would drift


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["1", "2", "2"], "2"),
        (["1", "2", "2", "1"], "1"),  # a tie goes to the first seen
        ([None, None, None, "7"], "7"),  # no answer never wins against one
        ([None, None], None),
        ([], None),
        (["3", " 4", "4 ", "4"], " 4"),  # equal by key, returned as first written
    ],
)
def test_majority(answers: list[str | None], winner: str | None) -> None:
    assert majority(answers, str.strip) == winner


@pytest.mark.oracle
def test_mean_ci_matches_the_normal_interval_of_a_large_sample() -> None:
    rng = random.Random(1)
    values = [float(rng.random() < 0.7) for _ in range(2000)]
    mean, low, high = mean_ci(values, seed=3)
    half = 1.96 * (mean * (1 - mean) / len(values)) ** 0.5
    assert mean == pytest.approx(sum(values) / len(values))
    assert low == pytest.approx(mean - half, abs=0.15 * half)
    assert high == pytest.approx(mean + half, abs=0.15 * half)


@pytest.mark.oracle
def test_mean_ci_covers_the_truth_nineteen_times_in_twenty() -> None:
    rng, hits, trials = random.Random(5), 0, 300
    for trial in range(trials):
        _, low, high = mean_ci([rng.gauss(2, 1) for _ in range(40)], seed=trial, resamples=300)
        hits += low <= 2 <= high
    assert 0.90 <= hits / trials <= 0.98


@pytest.mark.oracle
@pytest.mark.parametrize(("n", "rate"), [(30, 0.03), (30, 0.5), (80, 0.97)])
def test_intervals_of_verdicts_cover_the_truth(n: int, rate: float) -> None:
    """Sum over all outcomes: exact, where a bootstrap covers 57 % at n = 30 and p = 0.03."""
    covered = 0.0
    for right in range(n + 1):
        share, low, high = mean_ci([1.0] * right + [0.0] * (n - right))
        assert 0 <= low <= share <= high <= 1
        if low <= rate <= high:
            covered += math.comb(n, right) * rate**right * (1 - rate) ** (n - right)
    assert 0.92 <= covered <= 0.99


def test_differences_of_verdicts_are_no_verdicts() -> None:
    """Wilson's interval never contains 0 if one verdict is 1, so it must not judge a difference."""
    assert paired_bootstrap([1.0, 0.0, 0.0, 0.0], [0.0] * 4)[1] == 0.0


def test_mean_ci_repeats_itself_by_seed_and_refuses_nothing_at_all() -> None:
    values = [0.0, 0.81, 0.97, 0.513, 0.258]
    assert mean_ci(values, seed=1) == mean_ci(values, seed=1) != mean_ci(values, seed=2)
    with pytest.raises(ValueError, match="at least one"):
        mean_ci([])


def test_paired_bootstrap_sees_a_difference_that_separate_intervals_hide() -> None:
    rng = random.Random(0)
    difficulty = [rng.random() for _ in range(100)]
    a, b = [d + 0.05 + rng.gauss(0, 0.01) for d in difficulty], difficulty
    difference, low, high = paired_bootstrap(a, b)
    assert 0.04 < low < difference < high < 0.06
    assert mean_ci(a)[1] < mean_ci(b)[2]  # the two intervals overlap
    assert paired_bootstrap(b, a)[0] == pytest.approx(-difference)
    with pytest.raises(ValueError, match="equal lengths"):
        paired_bootstrap([1.0], [1.0, 2.0])


def rollout(group: int, rewards: tuple[float, ...], **changes: object) -> Rollout:
    fields = {
        "problem": Problem(f"p{group}", "What is 3 + 4?", "7"),
        "prompt_ids": (1, 2, 3),
        "response_ids": (4, 5, 6, 7),
        "sampling_logprobs": (0.0,) * 4,
        "action_mask": (True,) * 4,
        "step_ends": (1, 3),
        "acts": ("analysis", "output"),
        "finish": "stop",
        "group": group,
        "n_generated": 4,
        "outcome": float(sum(rewards) == 1),
        "step_rewards": rewards,
    }
    return Rollout(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.oracle
def test_rollout_metrics_by_hand() -> None:
    cut = {"finish": "length", "acts": ("next_step", ""), "n_generated": 2, "step_ends": (0, 1)}
    rollouts = [
        rollout(0, (0.0, 1.0)),
        rollout(0, (0.5, 0.5), action_mask=(False, True, True, True)),  # as good as its neighbour
        rollout(1, (0.0, 1.0)),
        rollout(1, (0.0, 0.0), response_ids=(4, 5), action_mask=(True, False), **cut),
    ]
    metrics = rollout_metrics(rollouts)
    shares = {f"acts/{act}": 0.0 for act in ACTS}
    shares |= {"acts/analysis": 3 / 8, "acts/output": 3 / 8, "acts/next_step": 1 / 8}
    assert metrics == pytest.approx(
        shares
        | {"accuracy": 0.75, "reward": 0.75, "response_length": 3.5, "truncated_share": 0.25}
        | {"malformed_share": 0.25, "groups_equal": 0.5, "rollouts": 4, "tokens_generated": 14}
    )
    n_actions = collate(rollouts, mask_truncated=True).n_actions
    assert learned_metrics(rollouts, 3, n_actions) == pytest.approx(
        {"groups_dropped": 1, "tokens_trained": 26, "masked_share": 3 / 14}
    )


def test_a_rollout_is_readable_as_json() -> None:
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    row = readable(rollout(0, (0.0, 1.0), answer="7"), tokenizer)  # type: ignore[arg-type]
    assert json.loads(json.dumps(row))["response"] == "4 5 6 7"
    assert (row["gold"], row["answer"], row["outcome"]) == ("7", "7", 1.0)
