"""Beam search and DVTS over reasoning acts: level by level, where mcts.py goes path by path.

A level explores acts below every node kept and keeps the best nodes one step deeper. Beam search
keeps the best `width` of all; DVTS (diverse verifier tree search, Hugging Face's search-and-learn)
the best one of each of `subtrees`, which share nothing but the root. Departures:

1. Only finished paths are valued, so a candidate is worth what a lookahead from it earns: `expand`
   finishes the path, by random acts in phase 1, and `value` (grader, PRM, agreement) judges it.
   This is lookahead search (arXiv 2408.03314) up to the end of the response.
2. Lookaheads stay in the tree: curation reads them like any other path, and their next node is a
   candidate of the next level that is already paid for.
3. `simulations` bounds the lookaheads of all levels, so that every method has the same budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rftt.engines.base import for_each
from rftt.mcts import Choice, Expand, Explore, Node, Tree, Value, grow, settle
from rftt.run.config import Beam


async def beam_search(
    tree: Tree,
    expand: Expand,
    value: Value,
    *,
    simulations: int,
    in_flight: int = 1,
    width: int,
    branching: int,
    subtrees: int = 1,
) -> None:
    """Run up to `simulations` lookaheads, `in_flight` at once. DVTS: many subtrees, width 1.

    Each of `width` kept nodes gets `branching` candidates; fewer nodes get more of them each.
    Lookaheads land in the order in which they were claimed: the tree is a function of its seeds.
    """
    kept = [[tree.root] for _ in range(subtrees)]  # DVTS: one list per subtree
    while simulations > 0 and any(kept):
        # Children that earlier lookaheads left behind are candidates already paid for.
        candidates = [[child for node in nodes for child in node.children] for nodes in kept]
        claimed: list[tuple[int, Choice]] = []
        for i, nodes in enumerate(kept):
            for node in nodes:
                n_new = width * branching // len(nodes) - len(node.children)  # these count already
                n = min(n_new, len(node.untried), simulations - len(claimed))
                claimed += [(i, tree.claim(node)) for _ in range(n)]
        simulations -= len(claimed)
        paths = await for_each([choice for _, choice in claimed], expand, in_flight=in_flight)
        for (i, choice), steps in zip(claimed, paths, strict=True):
            await settle(tree, choice, steps, value)  # in the order of the claims
            candidates[i].append(choice.node.children[-1])  # the one that has just landed
        kept = [best_nodes(tree, nodes, width) for nodes in candidates]


def explorer(method: str, cfg: Beam) -> Explore:
    """Return the function by which `method` grows a tree: mcts, beam or dvts."""
    if method == "mcts":
        return grow
    width, subtrees = cfg.beam_width, 1
    if method == "dvts":
        width, subtrees = 1, cfg.beam_width
    return partial(beam_search, branching=cfg.beam_branching, width=width, subtrees=subtrees)


def best_nodes(tree: Tree, candidates: Sequence[Node], n: int) -> list[Node]:
    """Return the `n` extendable nodes of highest mean value; ties go to those found first."""
    extendable = filter(tree.is_open, candidates)
    return sorted(extendable, key=lambda node: node.q, reverse=True)[:n]
