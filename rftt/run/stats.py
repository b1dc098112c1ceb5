"""Compute the figures of evaluations and runs, and write rollouts and trees as readable records.

Confidence intervals are over *problems*, because answers to the same problem are not independent.
Every resample is drawn from a seed, so that a table can be reproduced. This module does not import
torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from math import comb, exp, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from rftt.engines.chat import decode
from rftt.mcts import Node, Tree
from rftt.run.own_rewards import part_metrics
from rftt.tokens import ACTS
from rftt.types import Problem, Rollout, Step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Z_95 = 1.959964
"""Quantile of the normal distribution for a two-sided interval of 95 %."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the probability that k of n samples, c of them correct, contain a correct one.

    It is 1 − C(n−c, k) / C(n, k), the unbiased estimator of arXiv 2107.03374. Both binomials are
    whole numbers, so nothing is rounded before the division.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def majority(answers: Sequence[str | None], key: Callable[[str], Hashable]) -> str | None:
    """Return the most frequent answer, as first written. Answers with equal `key` are the same.

    On a tie the answer that occurs first wins. None (no answer) is returned only if all are None.
    """
    given = [(answer, key(answer)) for answer in answers if answer is not None]
    counts = Counter(group for _, group in given)
    if not counts:
        return None
    best = max(counts, key=counts.__getitem__)  # the first of the maxima: dicts keep their order
    return next(answer for answer, group in given if group == best)


def mean_ci(
    values: Sequence[float], *, seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """Return (mean, low, high): the mean over problems and its 95 % interval.

    Verdicts, which are 0 or 1, get Wilson's interval: a bootstrap of 30 verdicts of which 3 % are 1
    covers the truth in 57 % of the cases only. Other values get a percentile bootstrap.
    """
    if values and set(values) <= {0.0, 1.0}:
        return wilson(values)
    return bootstrap(values, seed=seed, resamples=resamples)


def wilson(verdicts: Sequence[float]) -> tuple[float, float, float]:
    """Return (share, low, high) of verdicts that are 0 or 1, by Wilson's score interval (1927)."""
    n, share = len(verdicts), sum(verdicts) / len(verdicts)
    centre = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * sqrt(share * (1 - share) / n + (Z_95 / (2 * n)) ** 2)
    return share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def bootstrap(values: Sequence[float], *, seed: int, resamples: int) -> tuple[float, float, float]:
    """Return (mean, low, high) by a percentile bootstrap: of width 0 if all values are equal."""
    if not values:
        raise ValueError("an interval needs at least one value")
    data, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [data[rng.integers(len(data), size=len(data))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(data.mean()), float(low), float(high)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """Return (difference, low, high) of mean(a) − mean(b) over the same problems in the same order.

    Pairing removes the variance that the problems' difficulty adds to both means.
    """
    if len(a) != len(b):
        raise ValueError(f"paired_bootstrap needs equal lengths, got {len(a)} and {len(b)}")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return bootstrap(differences, seed=seed, resamples=resamples)


def rollout_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Return means over the rollouts explored in a step. docs/metrics.md explains each key."""
    n = len(rollouts)
    acts = [act for rollout in rollouts for act in rollout.acts]
    groups: dict[int, set[float]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, set()).add(rollout.reward)
    scores = [score for rollout in rollouts for score in rollout.step_scores]
    process = {"process_reward": sum(scores) / len(scores)} if scores else {}
    return (
        process
        | {
            "accuracy": sum(r.outcome for r in rollouts) / n,
            "reward": sum(r.reward for r in rollouts) / n,
            "response_length": sum(len(r.response_ids) for r in rollouts) / n,
            "truncated_share": sum(r.finish == "length" for r in rollouts) / n,
            "malformed_share": sum("" in r.acts for r in rollouts) / n,
            "rollouts": float(n),
            "tokens_generated": float(sum(r.n_generated for r in rollouts)),
            "groups_equal": sum(len(rewards) == 1 for rewards in groups.values()) / len(groups),
        }
        | {f"acts/{act}": acts.count(act) / max(len(acts), 1) for act in ACTS}
        | part_metrics(rollouts)
    )


def nothing_to_learn(step: int, explored: list[Rollout], n_groups: int) -> str:
    """Return the warning about a step in which no group has differing rewards."""
    solved = sum(rollout.outcome for rollout in explored) / len(explored)
    return (
        f"step {step}: all {n_groups} groups have equal rewards; nothing to learn (solve rate "
        f"{solved:.2f}). Too easy, too hard, or answers that do not parse: read samples/."
    )


def learned_metrics(rollouts: list[Rollout], n_picked: int, n_actions: float) -> dict[str, float]:
    """Return the metrics of the rollouts that are learned from.

    They come from `n_picked` explored problems, and `n_actions` of their tokens enter the loss.
    """
    n_response = sum(len(rollout.response_ids) for rollout in rollouts)
    return {
        "groups_dropped": float(n_picked - len({rollout.group for rollout in rollouts})),
        "tokens_trained": float(n_response + sum(len(r.prompt_ids) for r in rollouts)),
        "masked_share": 1.0 - n_actions / n_response,
    }


def examples(
    rollouts: list[Rollout], tokenizer: PreTrainedTokenizerBase, n: int = 4
) -> list[dict[str, Any]]:
    """Return one readable rollout of each of the first `n` groups."""
    one_per_group = {rollout.group: rollout for rollout in rollouts}.values()
    return [readable(rollout, tokenizer) for rollout in list(one_per_group)[:n]]


def readable(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a rollout in readable form. Each step has a text, an act and a reward."""
    return {
        "id": rollout.problem.id,
        "question": rollout.problem.question,
        "gold": rollout.problem.answer,
        "response": tokenizer.decode(list(rollout.response_ids)),
        "answer": rollout.answer,
        "outcome": rollout.outcome,
        "acts": rollout.acts,
        "steps": [tokenizer.decode(list(step)) for step in rollout.step_ids()],
        "step_rewards": rollout.step_rewards,
        "finish": rollout.finish,
    }


def tree_record(
    tree: Tree, problem: Problem, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Return a tree as JSON-compatible data, for tree pages, PRM training and tests.

    With a `tokenizer` texts are decoded from token ids. In phase 1 steps already contain text.
    """

    def prior(node: Node) -> float | None:
        """Return π(act | parent), or None in phase 1, which has no priors."""
        known = tree.log_priors(node.parent) if node.parent else {}
        return exp(known[node.act]) if node.act in known else None

    def text(step: Step) -> str:
        return decode(tokenizer, step.token_ids) if tokenizer else step.text

    nodes = [
        {
            "id": node.id,
            "parent": node.parent.id if node.parent else None,
            "act": node.act,
            "text": text(node.step) if node.step else "",
            "visits": node.visits,
            "q": node.q,
            "prior": prior(node),
            "score": node.step.score if node.step else None,
            "answer": node.step.answer if node.step else None,
            "refused": node.step.refused if node.step else None,
            "terminal": node.terminal,
        }
        for node in tree.nodes
    ]
    return {"problem": asdict(problem), "nodes": nodes}
