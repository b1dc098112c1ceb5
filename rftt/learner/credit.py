"""Give credit to single steps: by the tree that rollouts share, or by process scores.

These are published alternatives to the paper's one number per rollout. Each is a pure function of
rollouts, for any explorer whose rollouts carry `nodes`. docs/method.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from rftt.types import Rollout

# ---- Advantages on a tree: rollouts that share steps show which step made the difference ----

Steps = list[tuple[float, ...]]
"""One number per step of each rollout, (S,). A step's number holds for all its tokens."""
TreeNode = tuple[int, ...]


def tree_paths(rollouts: Sequence[Rollout]) -> list[tuple[TreeNode, ...]]:
    """Return each rollout's S + 1 nodes: its problem, then one node per step.

    Rollouts share a node if they share the steps up to it. Plain samples share only the problem.
    """
    paths = []
    for i, rollout in enumerate(rollouts):
        own = [(rollout.group, i, step) for step in range(len(rollout.step_ends))]
        shared = [(rollout.group, node) for node in rollout.nodes]
        paths.append(((rollout.group,), *(shared or own)))
    return paths


def rollouts_below(paths: Sequence[tuple[TreeNode, ...]]) -> dict[TreeNode, list[int]]:
    """Return the indices L(n) of the rollouts that pass through each node n."""
    below: dict[TreeNode, list[int]] = {}
    for i, path in enumerate(paths):
        for node in path:
            below.setdefault(node, []).append(i)
    return below


def treerl_advantages(rollouts: Sequence[Rollout]) -> Steps:
    """Return TreeRL's global plus local advantage of each step (arXiv 2506.11902).

    A(n) = (V(n) − V(root) + V(n) − V(parent)) / √|L(n)|. V(n) is the mean over L(n) of a rollout's
    reward minus the mean of the group's others, so V(root) is 0. A group of one teaches nothing.
    """
    paths = tree_paths(rollouts)
    below = rollouts_below(paths)
    relative = []  # reward minus the mean of the others
    for rollout, path in zip(rollouts, paths, strict=True):
        peers = [rollouts[i].reward for i in below[path[0]]]
        n_others = max(len(peers) - 1, 1)
        relative.append((len(peers) * rollout.reward - sum(peers)) / n_others)
    value = {node: fmean(relative[i] for i in inside) for node, inside in below.items()}
    advantages = []
    for path in paths:
        gains = []
        for parent, node in pairwise(path):
            gain = value[node] - value[path[0]] + value[node] - value[parent]  # global plus local
            gains.append(gain / math.sqrt(len(below[node])))
        advantages.append(tuple(gains))
    return advantages


def spo_advantages(rollouts: Sequence[Rollout]) -> Steps:
    """Return SPO-tree's advantage of each edge, V(child) − V(parent) (arXiv 2505.23564).

    V of a leaf is its reward, of another node the mean over its children. An edge counts once, in
    the first rollout that takes it: 0 in all others, and 0 means that the step is not trained.
    """
    paths = tree_paths(rollouts)
    children: dict[TreeNode, dict[TreeNode, None]] = {}  # a set in order
    value: dict[TreeNode, float] = {}
    for rollout, path in zip(rollouts, paths, strict=True):
        value[path[-1]] = rollout.reward
        for parent, node in pairwise(path):
            children.setdefault(parent, {})[node] = None
    depth = {node: d for path in paths for d, node in enumerate(path)}
    for node in sorted(children, key=lambda node: -depth[node]):  # from the leaves to the roots
        value[node] = fmean(value[child] for child in children[node])
    seen: set[TreeNode] = set()
    advantages = []
    for path in paths:
        new = [(parent, node) for parent, node in pairwise(path) if node not in seen]
        gains = [round(value[node] - value[parent], 9) for parent, node in new]  # 0 means 0
        n_seen = len(path) - 1 - len(new)  # steps that an earlier rollout contains
        advantages.append((*[0.0] * n_seen, *gains))
        seen.update(path)
    return advantages


def treepo_advantages(rollouts: Sequence[Rollout]) -> Steps:
    """Return TreePO's advantage, one number for all steps of a rollout (arXiv 2508.17445).

    It is the mean of R − mean(G) over the nested groups G that share the rollout's first steps,
    each weighted by its size. Groups of one are skipped.
    """
    paths = tree_paths(rollouts)
    below = rollouts_below(paths)
    advantages = []
    for rollout, path in zip(rollouts, paths, strict=True):
        weighted, weights = 0.0, 0
        for node in path[:-1]:
            inside = [rollouts[i].reward for i in below[node]]
            if len(inside) > 1:
                weighted += len(inside) * (rollout.reward - fmean(inside))
                weights += len(inside)
        advantages.append((weighted / max(weights, 1),) * (len(path) - 1))
    return advantages


TREE_ADVANTAGES = {
    "treerl": treerl_advantages,
    "spo": spo_advantages,
    "treepo": treepo_advantages,
}
"""RLConfig.tree_advantage -> its formula."""


# ---- Process scores that cannot be earned by length ----

MIN_TEMPERATURE = 0.1
"""T of PURE's soft minimum (arXiv 2504.15275)."""


def min_form(scores: Sequence[float]) -> list[float]:
    """Return PURE's rewards of the steps, whose sum is about the weakest one (arXiv 2504.15275).

    r_s = softmax(−p / T)_s · p_s with p = 2 · score − 1 in [−1, 1] and T = 0.1. One more step adds
    at most 0.2785 T, so length is not paid.
    """
    signed = [2.0 * score - 1.0 for score in scores]
    weights = [math.exp((min(signed) - p) / MIN_TEMPERATURE) for p in signed]
    return [weight * p / sum(weights) for weight, p in zip(weights, signed, strict=True)]


def prof_keep(rollouts: Sequence[Rollout], share: float) -> list[Rollout]:
    """Return the `share` of each group whose process scores fit its verdict best (PROF).

    Right rollouts with low scores and wrong ones with high scores go first, from both classes so
    that those that stay are balanced (arXiv 2509.03403). A mean over few or very many steps says
    little: such rollouts go before the others.
    """

    def consistency(rollout: Rollout) -> float:
        score = fmean(2.0 * score - 1.0 for score in rollout.step_scores)
        fits = score if rollout.outcome == 1.0 else -score
        return fits - 10.0 * (not 2 <= len(rollout.step_scores) <= 30)

    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    dropped: set[int] = set()
    for members in groups.values():
        n = len(members) - max(1, round(share * len(members)))  # to drop
        ranked = sorted(members, key=consistency)
        right = [rollout for rollout in ranked if rollout.outcome == 1.0]
        wrong = [rollout for rollout in ranked if rollout.outcome != 1.0]
        excess = round((len(right) - len(wrong) + n) / 2)  # of right ones, for balance
        n_right = min(max(excess, n - len(wrong), 0), n, len(right))
        dropped |= {id(rollout) for rollout in right[:n_right] + wrong[: n - n_right]}
    return [rollout for rollout in rollouts if id(rollout) not in dropped]


# ---- Text that no act contains ----


def inside_segments(rollout: Rollout) -> tuple[bool, ...]:
    """Return the (R,) action mask without the text outside whole segments."""
    inside: list[bool] = []
    for ids, act in zip(rollout.step_ids(), rollout.acts, strict=True):
        inside += [act != ""] * len(ids)
    return tuple(a and b for a, b in zip(rollout.action_mask, inside, strict=True))
