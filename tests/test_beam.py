"""Test beam search and DVTS on trees with known values, and over a scripted engine."""

import asyncio
from functools import partial

import pytest

from rftt.beam import beam_search
from rftt.engines.sampler import Task
from rftt.mcts import Tree
from rftt.prompted import prompted_tree
from rftt.rollout import learned_tree, tree_rollouts
from rftt.types import Step
from tests.test_rollout import CLOSE, PROBLEM, learned, prompted, segment

ACTS = ("a", "b", "c", "d")


def search(worth, *, depth=4, **how):
    """A tree of four acts everywhere. `expand` goes to full depth by "a"; `worth` values a path."""
    tree = Tree(lambda _: ACTS, max_depth=depth, exploration_weight=0.0, seed=0)
    asked = []

    async def expand(choice):
        asked.append(path_of(choice.node) + choice.act)
        for _ in range(choice.key.__hash__() % 3):  # lookaheads finish in any order
            await asyncio.sleep(0)
        acts = [choice.act, *"a" * (depth - choice.node.depth - 1)]
        return [Step(act, "") for act in acts]

    async def value(steps):
        return worth("".join(step.act for step in steps))

    asyncio.run(beam_search(tree, expand, value, **how))
    return tree, asked


def path_of(node):
    return "".join(n.act for n in node.path())


def alphabetical(path):
    """Later letters are better, the first one most: the best leaf is dddd."""
    return sum(ACTS.index(act) * 4.0**-i for i, act in enumerate(path))


@pytest.mark.oracle
def test_wide_enough_beam_finds_the_best_leaf_level_by_level():
    tree, asked = search(alphabetical, simulations=99, width=1, branching=4)
    assert sorted(asked[:4]) == list(ACTS)
    assert sorted(asked[4:7]) == ["db", "dc", "dd"]  # da is known from the lookahead of d
    assert sorted(asked[7:10]) == ["ddb", "ddc", "ddd"]
    assert sorted(asked[10:]) == ["dddb", "dddc", "dddd"]
    assert max(tree.leaves(), key=lambda leaf: leaf.q).value_sum == alphabetical("dddd")


@pytest.mark.oracle
def test_beam_keeps_the_best_of_all_and_dvts_the_best_of_each_subtree():
    """All of d is better than all of c: a beam of two leaves c, two subtrees do not."""
    _, asked = search(alphabetical, simulations=99, width=2, branching=2)
    assert sorted(asked[:4]) == list(ACTS)
    assert {path[0] for path in asked[4:6]} == {"c", "d"}  # both are kept, one more act each
    beam = search(alphabetical, simulations=99, width=2, branching=4, depth=3)[1]
    assert {path[:2] for path in beam if len(path) == 3} == {"dc", "dd"}
    _, asked = search(alphabetical, simulations=99, width=1, branching=2, subtrees=2)
    first = [asked[:2], asked[2:4]]
    assert sorted(first[0] + first[1]) == list(ACTS)
    assert {path[0] for path in asked[4:]} == {max(pair) for pair in first}


@pytest.mark.invariant
@pytest.mark.parametrize("how", [{"width": 2}, {"width": 1, "subtrees": 3}], ids=["beam", "dvts"])
@pytest.mark.parametrize("simulations", [1, 5, 11])
def test_budget_and_values_add_up(how, simulations):
    tree, asked = search(alphabetical, simulations=simulations, branching=3, **how)
    assert len(asked) == len(set(asked)) == len(tree.leaves()) == simulations
    assert tree.root.visits == simulations
    assert tree.root.value_sum == pytest.approx(sum(leaf.value_sum for leaf in tree.leaves()))
    assert all(node.in_flight == 0 for node in tree.nodes)
    for node in tree.nodes:
        if node.children:
            assert node.visits == sum(child.visits for child in node.children)


@pytest.mark.invariant
@pytest.mark.parametrize("how", [{"width": 3}, {"width": 1, "subtrees": 3}], ids=["beam", "dvts"])
def test_tree_does_not_depend_on_what_is_in_flight(how):
    trees = [
        search(alphabetical, simulations=20, branching=2, in_flight=n, **how)[0] for n in (1, 4, 99)
    ]
    grown = [[(node.key, node.visits, node.value_sum) for node in tree.nodes] for tree in trees]
    assert grown[0] == grown[1] == grown[2]


def test_search_ends_where_nothing_is_left():
    tree, asked = search(alphabetical, depth=2, simulations=99, width=16, branching=4)
    assert len(tree.leaves()) == len(asked) == 16


def test_prompted_beam_asks_the_engine_and_pays_for_every_token():
    ctx, engine = prompted(["Think of pairs.", *["2+2 is \\boxed{4}", "It is \\boxed{5}"] * 40])
    explore = partial(beam_search, width=1, subtrees=2, branching=2)
    how = {"simulations": 6, "exploration_weight": 0.0, "in_flight": 2}
    tree = asyncio.run(prompted_tree(ctx, PROBLEM, **how, explore=explore))
    assert 4 <= len(tree.leaves()) <= 6
    assert {leaf.value_sum for leaf in tree.leaves()} <= {0.0, 1.0}
    assert 0 < tree.root.value_sum < len(tree.leaves())
    assert ctx.spent.generated_tokens == engine.generated > 0


def test_beam_over_functional_tokens_takes_likely_acts_first():
    """The script's priors fall in the order of ACTS: of the root's acts, clarify is likeliest."""
    bodies = [[165, CLOSE[act]] for act in ("clarify", "analysis", "clarify", "clarify")]
    ends = [*segment("next_step", "y"), *segment("output", "\\boxed{4}")]
    ctx = learned([[*body, *ends] for body in bodies])
    explore = partial(beam_search, width=1, branching=2)
    how = {"simulations": 3, "exploration_weight": 0.0, "in_flight": 1}
    task = Task(ctx, PROBLEM, [7])
    tree = asyncio.run(learned_tree(task, **how, explore=explore))
    assert [node.act for node in tree.root.children] == ["clarify", "analysis"]
    assert len(tree.leaves()) == 3
    rollouts = tree_rollouts(task, tree, mask_forced=True)
    assert sum(r.n_generated for r in rollouts) + 1 == ctx.engine.generated
