"""Monte Carlo tree search over reasoning acts, independent of any model, text or reward.

One simulation is select -> expand -> evaluate -> backup. `expand` and `value` are awaited, so that
simulations of many trees run at once and the engine batches them. Both phases use this file (arXiv
2502.13389). Unexplored acts come first, by prior where there is one; PUCT, an option, weighs them.
Departures from the textbook:

1. `expand` returns the whole path down to a leaf, and every step of it becomes a node. So each pass
   ends in a leaf, and a node's visits are the sum of its children's.
2. Several simulations may be in flight. Each counts as a visit of value 0 (virtual loss). The one
   that needs the fewest tokens lands first, so the tree is a function of its seeds alone.
3. A subtree with nothing left to try is not entered again: it could only repeat a leaf.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from rftt.engines.lanes import Lanes, Meter
from rftt.types import Step

DRAWN = ""
"""In place of an act: the policy draws the next act itself, so that nothing is forced."""

Selection = Literal["uct", "puct"]
Successors = Callable[[str | None], tuple[str, ...]]  # acts that may follow an act (None: the root)


@dataclass(eq=False)
class Node:
    """A state of the search: the steps from the root to here."""

    id: int
    parent: Node | None
    step: Step | None  # None at the root
    depth: int
    key: tuple[str, ...]
    """Acts from the root, each numbered among its equal siblings: what seeds derive from."""
    untried: list[str] = field(default_factory=list)  # an act named twice may be explored twice
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    value_sum: float = 0.0
    in_flight: int = 0  # simulations that have passed through and not yet landed
    terminal: bool = False

    @property
    def q(self) -> float:
        """Mean value; 0 before the first visit."""
        return self.value_sum / self.visits if self.visits else 0.0

    @property
    def is_right(self) -> bool:
        """Whether a leaf has value 1: the grader's verdict, where the grader values paths."""
        return self.terminal and self.q == 1.0

    @property
    def act(self) -> str | None:
        return self.step.act if self.step else None

    def path(self) -> list[Node]:
        """Return the nodes from the first below the root to this one."""
        nodes: list[Node] = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


@dataclass(frozen=True)
class Choice:
    """What one simulation explores: `act` below `node`."""

    node: Node
    act: str
    key: tuple[str, ...]  # of the node to come
    meter: Meter = field(default_factory=Meter, compare=False)  # of the simulation's tokens


class Tree:
    """The nodes of one problem's search, and the rule by which it grows."""

    def __init__(
        self,
        successors: Successors,
        max_depth: int,
        exploration_weight: float,
        seed: int,
        selection: Selection = "uct",
    ) -> None:
        self.successors = successors
        self.max_depth = max_depth
        self.exploration_weight = exploration_weight
        self.selection = selection
        self.random = Random(seed)  # the order of acts of equal prior, and where forks begin
        self.root_log_priors: dict[str, float] = {}  # log π(act | root); a step brings its own
        self.nodes: list[Node] = []
        self.root = self._add(None, None, ())

    def select(self) -> Choice | None:
        """Walk down to a node with an unexplored act and claim that act.

        Return None if nothing is left to try, at least until a simulation in flight lands.
        """
        if not self.is_open(self.root):
            return None
        node = self.root
        while child := self._child_to_enter(node):
            node = child
        return self.claim(node)

    def _child_to_enter(self, node: Node) -> Node | None:
        """Return the best open child, or None if an unexplored act of the node comes first."""
        if node.untried and self.selection == "uct":
            return None  # the paper's rule: every act once
        score = self.uct if self.selection == "uct" else self.puct
        best = max(filter(self.is_open, node.children), key=score, default=None)  # ties: the older
        if best is None or not node.untried:
            return best
        priors = self.log_priors(node)
        likeliest = max(priors.get(act, -math.inf) for act in node.untried)
        unexplored = node.q + self._prior_bonus(node, likeliest, 0)  # worth its parent's mean
        return best if self.puct(best) >= unexplored else None

    def claim(self, node: Node) -> Choice:
        """Reserve the node's likeliest unexplored act for one simulation, which must land."""
        log_priors = self.log_priors(node)
        act = max(node.untried, key=lambda act: log_priors.get(act, -math.inf))
        choice = Choice(node, act, self._child_key(node, act))
        node.untried.remove(act)  # no other simulation may choose it
        for passed in (self.root, *node.path()):
            passed.in_flight += 1  # virtual loss
        return choice

    def log_priors(self, node: Node) -> dict[str, float]:
        """Return log π(act | node); empty in phase 1, which has no policy over acts."""
        return node.step.log_priors if node.step else self.root_log_priors

    def uct(self, node: Node) -> float:
        """Return W/N + c sqrt(ln N_parent / N); a simulation in flight is a visit worth 0.

        The prior is not part of it: it only orders the unexplored acts.
        """
        assert node.parent is not None, "the root is never compared"
        visits = node.visits + node.in_flight
        parent_visits = node.parent.visits + node.parent.in_flight
        explore = math.sqrt(math.log(parent_visits) / visits)  # large for rarely visited children
        return node.value_sum / visits + self.exploration_weight * explore

    def puct(self, node: Node) -> float:
        """Return W/N + c π(act) sqrt(N_parent) / (1 + N): the prior weighs all exploration.

        A simulation in flight is a visit worth 0 (Rosin 2011; Silver et al. 2017).
        """
        assert node.parent is not None, "the root is never compared"
        visits = node.visits + node.in_flight
        log_prior = self.log_priors(node.parent).get(node.act or "", -math.inf)
        return node.value_sum / visits + self._prior_bonus(node.parent, log_prior, visits)

    def _prior_bonus(self, parent: Node, log_prior: float, visits: int) -> float:
        """Return PUCT's bonus of a child with this prior and number of visits."""
        parent_visits = parent.visits + parent.in_flight
        bonus = math.exp(log_prior) * math.sqrt(parent_visits) / (1 + visits)
        return self.exploration_weight * bonus

    def land(self, choice: Choice, steps: Sequence[Step], value: float) -> Node:
        """Graft the explored steps below the choice and back their value up; return the leaf."""
        for passed in (self.root, *choice.node.path()):
            passed.in_flight -= 1  # the virtual loss becomes a visit
        leaf = self.graft(choice, steps)
        self.backup(leaf, value)
        return leaf

    def graft(self, choice: Choice, steps: Sequence[Step]) -> Node:
        """Append `steps` as a chain of nodes; the last one is a leaf."""
        node = self._add(choice.node, steps[0], choice.key)
        for step in steps[1:]:
            key = self._child_key(node, step.act)
            explored = step.act if step.act in node.untried else DRAWN
            if explored in node.untried:  # explored now, although not chosen
                node.untried.remove(explored)
            node = self._add(node, step, key)
        node.terminal = True
        node.untried.clear()  # nothing follows a leaf
        return node

    def backup(self, leaf: Node, value: float) -> None:
        """Count a visit of this value on every node of the leaf's path."""
        for node in (self.root, *leaf.path()):  # the root counts every simulation
            node.visits += 1
            node.value_sum += value

    def is_open(self, node: Node) -> bool:
        """Return whether anything below is left to try."""
        return not node.terminal and (bool(node.untried) or any(map(self.is_open, node.children)))

    def leaves(self) -> list[Node]:
        """Return the ends of all paths, in the order in which they were found."""
        return [node for node in self.nodes if node.terminal]

    def _add(self, parent: Node | None, step: Step | None, key: tuple[str, ...]) -> Node:
        node = Node(len(self.nodes), parent, step, len(key), key)
        if node.depth < self.max_depth:
            node.untried = list(self.successors(node.act))
            self.random.shuffle(node.untried)  # else small trees would follow the table's order
        if parent is not None:
            parent.children.append(node)
        self.nodes.append(node)
        return node

    def _child_key(self, parent: Node, act: str) -> tuple[str, ...]:
        """Return the key of the next child by `act`: how often the act is untried numbers it."""
        return (*parent.key, f"{act}.{parent.untried.count(act)}")


Expand = Callable[[Choice], Coroutine[Any, Any, list[Step]]]  # the steps down to a leaf
Value = Callable[[Sequence[Step]], Awaitable[float]]  # of a whole path
Explore = Callable[..., Awaitable[None]]  # `grow`, or beam.py's with its width bound


async def grow(
    tree: Tree, expand: Expand, value: Value, *, simulations: int, in_flight: int = 1
) -> None:
    """Run up to `simulations` simulations, `in_flight` at once.

    End early when nothing is left to try. `value` is awaited in landing order.
    """
    lanes = Lanes()
    started = 0
    try:
        while True:
            while started < simulations and len(lanes) < in_flight and (choice := tree.select()):
                lanes.start(choice, expand(choice), choice.meter)
                started += 1
            if not lanes:  # all simulations have landed
                return
            choice, steps = await lanes.first()
            await settle(tree, choice, steps, value)
    finally:
        lanes.cancel()  # a failed call stops the search: it never becomes a value


async def settle(tree: Tree, choice: Choice, steps: Sequence[Step], value: Value) -> None:
    """Value the whole path of a simulation, then land it."""
    before = [node.step for node in choice.node.path() if node.step]
    tree.land(choice, steps, await value([*before, *steps]))
