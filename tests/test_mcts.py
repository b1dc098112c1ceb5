"""Test the search against hand-worked trees, a textbook implementation and its invariants."""

import asyncio
import math
from random import Random

import pytest

from rftt.engines.lanes import Lanes, Meter
from rftt.mcts import Node, Tree, grow
from rftt.tokens import successors
from rftt.types import Step, seed_for


def learned(act):
    return successors(act, "learned")


def make_tree(grammar=learned, depth=6, c=2.0, seed=0):
    return Tree(grammar, max_depth=depth, exploration_weight=c, seed=seed)


def land(tree, acts, value):
    """One simulation that explores exactly `acts` below whatever `select` offers."""
    choice = tree.select()
    return tree.land(choice, [Step(choice.act, ""), *(Step(act, "") for act in acts)], value)


@pytest.mark.oracle
def test_uct_of_a_hand_worked_tree():
    """Two children with 3 and 1 visits: Q 2/3 and 0, N 4."""
    tree = make_tree(lambda act: ("a", "b") if act is None else (), c=1.5)
    for visits, total in ((3, 2.0), (1, 0.0)):
        choice = tree.select()
        leaf = tree.land(choice, [Step(choice.act, "")], 0.0)
        leaf.visits, leaf.value_sum = visits, total
    tree.root.visits = 4
    first, second = tree.root.children
    assert tree.uct(first) == pytest.approx(2 / 3 + 1.5 * math.sqrt(math.log(4) / 3))
    assert tree.uct(second) == pytest.approx(0 + 1.5 * math.sqrt(math.log(4) / 1))


@pytest.mark.oracle
def test_virtual_loss_counts_as_visits_worth_nothing():
    tree = make_tree(lambda act: ("a", "b"), c=1.0)
    land(tree, ["a"], 1.0)
    land(tree, ["a"], 0.0)
    child = tree.root.children[0]
    before = tree.uct(child)
    assert before == pytest.approx(1.0 + math.sqrt(math.log(2) / 1))
    assert tree.select().node is child
    assert tree.uct(child) == pytest.approx(1.0 / 2 + math.sqrt(math.log(3) / 2))


def test_unexplored_acts_come_first_by_prior():
    tree = make_tree(lambda act: ("a", "b", "c") if act is None else ())
    tree.root_log_priors = {"a": -2.3, "b": -0.4, "c": -1.6}
    assert [tree.select().act for _ in range(3)] == ["b", "c", "a"]
    assert tree.select() is None  # all claimed, none landed


@pytest.mark.oracle
def test_serial_search_equals_the_textbook():
    """Same choices as a recursive UCT written from the formulas, over 60 simulations."""

    def reward(acts):
        return Random("/".join(acts)).random()

    def length(acts):
        return 1 + seed_for(acts[0], len(acts)) % 3

    async def expand(choice):
        acts = [*(node.act for node in choice.node.path()), choice.act]
        steps = [Step(choice.act, "")]
        while len(acts) < 6 and len(steps) < length(acts) and learned(acts[-1]):
            acts.append(learned(acts[-1])[0])
            steps.append(Step(acts[-1], ""))
        return steps

    async def value(steps):
        return reward([step.act for step in steps])

    tree = make_tree(seed=3)
    asyncio.run(grow(tree, expand, value, simulations=60))
    assert [(n.key, n.visits) for n in tree.nodes] == _textbook(60, 3, expand, reward)


def _textbook(simulations, seed, expand, reward):
    rng, table, order = Random(seed), {}, []

    def add(key, act):
        untried = list(learned(act)) if len(key) < 6 else []
        rng.shuffle(untried)
        table[key] = {"untried": untried, "kids": [], "n": 0, "w": 0.0, "leaf": False}
        order.append(key)
        return table[key]

    def live(key):
        node = table[key]
        return not node["leaf"] and (bool(node["untried"]) or any(live(k) for k in node["kids"]))

    add((), None)
    for _ in range(simulations):
        if not live(()):
            break
        key = ()
        while not table[key]["untried"]:
            parent = table[key]
            key = max(
                (k for k in parent["kids"] if live(k)),
                key=lambda k: (
                    table[k]["w"] / table[k]["n"]
                    + 2.0 * math.sqrt(math.log(parent["n"]) / table[k]["n"])
                ),
            )
        act = table[key]["untried"][0]
        fake = Node(0, None, None, 0, ())
        fake.path = lambda key=key: [type("N", (), {"act": k.split(".")[0]}) for k in key]
        choice = type("C", (), {"node": fake, "act": act})
        for step in asyncio.run(expand(choice)):
            name = f"{step.act}.{table[key]['untried'].count(step.act)}"
            table[key]["untried"].remove(step.act)
            child = (*key, name)
            table[key]["kids"].append(child)
            add(child, step.act)
            key = child
        table[key]["leaf"], table[key]["untried"] = True, []
        total = reward([k.split(".")[0] for k in key])
        for depth in range(len(key) + 1):
            table[key[:depth]]["n"] += 1
            table[key[:depth]]["w"] += total
    return [(key, table[key]["n"]) for key in order]


@pytest.mark.invariant
@pytest.mark.parametrize("in_flight", [1, 3, 8])
def test_visits_are_conserved(in_flight):
    tree, _ = _random_search(in_flight=in_flight, simulations=50)
    for node in tree.nodes:
        assert node.in_flight == 0
        if not node.terminal:
            assert node.visits == sum(child.visits for child in node.children)
            assert node.value_sum == pytest.approx(sum(c.value_sum for c in node.children))
    assert tree.root.visits == len(tree.leaves()) == 50


@pytest.mark.invariant
@pytest.mark.parametrize(
    ("in_flight", "engine_tells"), [(1, True), (4, True), (8, True), (4, False)]
)
def test_tree_does_not_depend_on_who_finishes_first(in_flight, engine_tells):
    """Whatever is late, and whether or not the engine tells how far its requests are."""
    how = {"in_flight": in_flight, "simulations": 40}
    expected, _ = _random_search(**how)
    for seed in range(5):
        late, _ = _random_search(**how, delays=Random(seed), engine_tells=engine_tells)
        assert [(n.key, n.visits, n.value_sum) for n in late.nodes] == [
            (n.key, n.visits, n.value_sum) for n in expected.nodes
        ]


@pytest.mark.oracle
def test_the_simulation_with_the_fewest_tokens_lands_first():
    """Lanes of 5, 2 and 2 tokens; then one of 4 starts at 2 and one of 3 at 2: 2, 2, 5, 5, 6."""

    async def landed():
        lanes, order = Lanes(), []
        waiting = iter([("d", 4), ("e", 3)])

        def start(name, n):
            async def work():
                await asyncio.sleep(0)
                meter.end(n)
                return n

            meter = Meter()
            lanes.start(name, work(), meter)

        for name, n in (("a", 5), ("b", 2), ("c", 2)):
            start(name, n)
        while lanes:
            order.append((await lanes.first())[0])
            if new := next(waiting, None):
                start(*new)
        return order

    assert asyncio.run(landed()) == ["b", "c", "a", "e", "d"]


def test_a_short_simulation_does_not_wait_for_the_end_of_a_long_one():
    async def first():
        lanes = Lanes()
        long, short = Meter(), Meter()

        async def ends():
            short.end(3)

        lanes.start("long", asyncio.Event().wait(), long)  # its request never ends
        lanes.start("short", ends(), short)
        landing = asyncio.create_task(lanes.first())
        for n in (1, 2, 3):
            long.see(n)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not landing.done()  # the long one, which is older, may still end at 3
        long.see(4)
        choice, _ = await landing
        lanes.cancel()
        return choice

    assert asyncio.run(first()) == "short"


@pytest.mark.invariant
@pytest.mark.parametrize("in_flight", [1, 4])
def test_keys_and_requests_are_unique(in_flight):
    tree, asked = _random_search(in_flight=in_flight, simulations=60)
    keys = [node.key for node in tree.nodes]
    assert len(set(keys)) == len(keys)
    assert len(set(asked)) == len(asked)
    assert set(asked) <= set(keys)


@pytest.mark.invariant
def test_depth_and_grammar_bound_the_choices():
    tree, _ = _random_search(in_flight=2, simulations=80)
    assert all(node.depth <= 6 for node in tree.nodes)
    for node in tree.nodes:
        for child in node.children:
            assert child.act in learned(node.act)


def test_search_ends_when_nothing_is_left():
    tree = make_tree(lambda act: ("a", "a") if act is None else ())

    async def expand(choice):
        return [Step(choice.act, "")]

    async def value(steps):
        return 1.0

    asyncio.run(grow(tree, expand, value, simulations=99, in_flight=4))
    assert tree.root.visits == 2


def test_failed_expansion_stops_the_search_and_cancels_the_rest():
    cancelled = []

    async def expand(choice):
        if choice.act == "analysis":
            await asyncio.sleep(0)
            raise RuntimeError("engine died")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(choice.act)
            raise

    async def value(steps):
        return 0.0

    tree = make_tree()
    tree.root_log_priors = {"analysis": 0.0}

    async def run():
        with pytest.raises(RuntimeError, match="engine died"):
            await grow(tree, expand, value, simulations=4, in_flight=4)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert len(cancelled) == 3


def _random_search(in_flight, simulations, delays=None, engine_tells=False):
    """Paths of random acts; rewards from the path; `delays` shuffles who finishes first.

    A simulation has two requests, whose lengths follow from its key.
    """
    tree, asked = make_tree(seed=5), []

    async def expand(choice):
        asked.append(choice.key)
        rng = Random(seed_for(0, choice.key))
        steps, depth = [Step(choice.act, "")], choice.node.depth + 1
        while depth < 6 and rng.random() < 0.8 and learned(steps[-1].act):
            steps.append(Step(rng.choice(learned(steps[-1].act)), ""))
            depth += 1
        for tokens in (rng.randrange(20), rng.randrange(20)):
            for n in range(tokens):
                for _ in range(delays.randrange(3) if delays else 0):
                    await asyncio.sleep(0)
                if engine_tells:
                    choice.meter.see(n + 1)
            choice.meter.end(tokens)
        return steps

    async def value(steps):
        return Random("/".join(step.act for step in steps)).random()

    asyncio.run(grow(tree, expand, value, simulations=simulations, in_flight=in_flight))
    return tree, asked
