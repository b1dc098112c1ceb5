"""Test credit on a tree against slow definitions: advantages, process scores, forks."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from random import Random
from statistics import fmean
from typing import Any, Literal

import pytest

from rftt import rl
from rftt.batch import collate, spread_steps
from rftt.learner import credit
from rftt.learner.credit import min_form, prof_keep
from rftt.mcts import DRAWN, Tree, grow
from rftt.rewards import score_rollout
from rftt.rollout import Explorer, act_entropy, fork_points
from rftt.run.config import RLConfig
from rftt.types import Problem, Rollout, Step, UserError
from tests.test_rollout import CLOSE, Letters, learned, segment

PROBLEM = Problem("p", "2+2?", "4")


def config(**changes: object) -> RLConfig:
    needed = {"output_dir": "o", "model_name_or_path": "m", "train_file": "t", "learning_rate": 1}
    return RLConfig(**{**needed, **changes})  # type: ignore[arg-type]


def rollout(group: int, nodes: tuple[int, ...], reward: float, **changes: object) -> Rollout:
    n_steps = len(nodes) or 2
    made = Rollout(
        problem=PROBLEM,
        prompt_ids=(1, 2),
        response_ids=tuple(range(2 * n_steps)),
        sampling_logprobs=(-1.0,) * (2 * n_steps),
        action_mask=(True,) * (2 * n_steps),
        step_ends=tuple(range(1, 2 * n_steps, 2)),
        acts=("next_step",) * n_steps,
        finish="stop",
        group=group,
        n_generated=2 * n_steps,
        outcome=float(reward == 1.0),
        step_rewards=(0.0,) * (n_steps - 1) + (reward,),
        nodes=nodes,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def forest(seed: int) -> list[Rollout]:
    """Groups of rollouts that are the leaves of random trees; one group of one, one of samples."""
    random, rollouts = Random(seed), []
    for group in range(3):
        paths: list[tuple[int, ...]] = [(1, 2)]
        newest = 2
        for _ in range(random.randrange(1, 7)):
            stem = random.choice(paths)
            stem = stem[: random.randrange(len(stem))]
            new = tuple(range(newest + 1, newest + 2 + random.randrange(3)))
            newest = new[-1]
            paths.append(stem + new)
        rollouts += [rollout(group, path, random.choice([0.0, 0.1, 1.0])) for path in paths]
    rollouts.append(rollout(3, (1, 2), 1.0))
    rollouts += [rollout(4, (), reward) for reward in (0.0, 1.0, 1.0)]
    return rollouts


def stems(rollouts: list[Rollout]) -> list[tuple[object, ...]]:
    """A rollout's steps as values: equal prefixes are the same node."""
    return [
        (r.group, *(r.nodes or ((i, step) for step in range(len(r.step_ends)))))
        for i, r in enumerate(rollouts)
    ]


def through(rollouts: list[Rollout], stem: tuple[object, ...]) -> list[int]:
    return [i for i, path in enumerate(stems(rollouts)) if path[: len(stem)] == stem]


# ---- Advantages ----


def slow_treerl(rollouts: list[Rollout]) -> list[list[float]]:
    def relative(i: int) -> float:
        others = [
            r.reward for j, r in enumerate(rollouts) if r.group == rollouts[i].group and j != i
        ]
        return rollouts[i].reward - fmean(others) if others else 0.0

    def value(stem: tuple[object, ...]) -> float:
        return fmean(relative(i) for i in through(rollouts, stem))

    found = []
    for path in stems(rollouts):
        row = []
        for n in range(2, len(path) + 1):
            gain = (value(path[:n]) - value(path[:1])) + (value(path[:n]) - value(path[: n - 1]))
            row.append(gain / len(through(rollouts, path[:n])) ** 0.5)
        found.append(row)
    return found


def slow_spo(rollouts: list[Rollout]) -> list[list[float]]:
    paths = stems(rollouts)

    def value(stem: tuple[object, ...]) -> float:
        if stem in paths:
            return rollouts[paths.index(stem)].reward
        n = len(stem) + 1
        children = {path[:n] for path in paths if len(path) >= n and path[: n - 1] == stem}
        return fmean(value(child) for child in sorted(children, key=repr))

    found = []
    for i, path in enumerate(paths):
        row = []
        for n in range(2, len(path) + 1):
            first = min(through(rollouts, path[:n]))
            row.append(value(path[:n]) - value(path[: n - 1]) if first == i else 0.0)
        found.append(row)
    return found


def slow_treepo(rollouts: list[Rollout]) -> list[list[float]]:
    found = []
    for i, path in enumerate(stems(rollouts)):
        subtrees = [through(rollouts, path[:n]) for n in range(1, len(path))]
        subtrees = [inside for inside in subtrees if len(inside) > 1]
        gains = [rollouts[i].reward - fmean(rollouts[j].reward for j in g) for g in subtrees]
        total = sum(map(len, subtrees))
        gain = sum(len(g) * a for g, a in zip(subtrees, gains, strict=True)) / total if total else 0
        found.append([gain] * (len(path) - 1))
    return found


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("fast", "slow"),
    [
        (credit.treerl_advantages, slow_treerl),
        (credit.spo_advantages, slow_spo),
        (credit.treepo_advantages, slow_treepo),
    ],
)
def test_tree_advantages_match_their_definition(
    fast: Callable[[list[Rollout]], credit.Steps],
    slow: Callable[[list[Rollout]], list[list[float]]],
) -> None:
    for seed in range(60):
        rollouts = forest(seed)
        found, expected = fast(rollouts), slow(rollouts)
        assert [len(row) for row in found] == [len(r.step_ends) for r in rollouts]
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=1e-8)


@pytest.mark.invariant
def test_equal_rewards_of_a_tree_teach_nothing() -> None:
    rollouts = [replace(r, step_rewards=(0.1,) * len(r.step_ends)) for r in forest(0)]
    equal = [replace(r, step_rewards=(*(0.0,) * (len(r.acts) - 1), 0.1)) for r in rollouts]
    assert {x for row in credit.spo_advantages(equal) for x in row} == {0.0}
    for advantages in (credit.treerl_advantages, credit.treepo_advantages):
        assert all(abs(x) < 1e-12 for row in advantages(equal) for x in row)


@pytest.mark.invariant
def test_a_tree_of_one_level_is_a_group() -> None:
    """Plain samples: TreePO is reward minus mean, SPO the same on the first step."""
    rollouts = [rollout(0, (), reward) for reward in (0.0, 1.0, 1.0, 0.1)]
    expected = [r.reward - fmean(o.reward for o in rollouts) for r in rollouts]
    assert [row[0] for row in credit.treepo_advantages(rollouts)] == pytest.approx(expected)
    assert [row[0] for row in credit.spo_advantages(rollouts)] == pytest.approx(expected)
    assert [row[1] for row in credit.spo_advantages(rollouts)] == [0.0] * 4


def test_numbers_of_steps_stand_on_their_tokens() -> None:
    rollouts = [rollout(0, (1, 2), 1.0), rollout(0, (1, 3, 4), 0.0)]
    spread = spread_steps(rollouts, [(0.5, -1.0), (2.0, 3.0, 4.0)])
    assert spread.tolist() == [0, 0, 0.5, 0.5, -1, -1, 0, 0, 2, 2, 3, 3, 4, 4]
    assert spread.shape == collate(rollouts).rewards.shape


# ---- Process scores ----


@pytest.mark.oracle
def test_pure_min_form_matches_its_definition() -> None:
    random = Random(0)
    for _ in range(100):
        scores = [random.random() for _ in range(random.randrange(1, 9))]
        signed = [2 * score - 1 for score in scores]
        total = sum(math.exp(-p / 0.1) for p in signed)
        expected = [math.exp(-p / 0.1) / total * p for p in signed]
        assert min_form(scores) == pytest.approx(expected)


@pytest.mark.invariant
def test_pure_pays_no_length() -> None:
    """Any further step adds at most 0.2785 T to the sum; the plain sum of scores adds it all."""
    random = Random(1)
    for _ in range(300):
        scores = [random.random() for _ in range(random.randrange(1, 9))]
        longer = [*scores, random.random()]
        assert sum(min_form(longer)) - sum(min_form(scores)) <= 0.02785
    assert sum(min_form([0.9, 0.2, 0.8])) == pytest.approx(2 * 0.2 - 1, abs=0.01)


def slow_prof(rollouts: list[Rollout], n_kept: int) -> list[Rollout]:
    """One rollout leaves at a time: of the larger class, then the least consistent one."""
    kept = list(rollouts)
    right = sum(r.outcome == 1.0 for r in rollouts)
    wrong = len(rollouts) - right
    n = len(rollouts) - n_kept
    best = min(
        (abs((right - k) - (wrong - (n - k))), -k, k)
        for k in range(max(0, n - wrong), min(n, right) + 1)
    )[2]
    for outcome, leaving in ((1.0, best), (0.0, n - best)):
        members = [r for r in rollouts if (r.outcome == 1.0) == (outcome == 1.0)]
        sign = 1 if outcome == 1.0 else -1
        members.sort(key=lambda r: sign * fmean(2 * s - 1 for s in r.step_scores))
        for r in members[:leaving]:
            kept.remove(r)
    return kept


@pytest.mark.oracle
def test_prof_keeps_consistent_rollouts_of_balanced_classes() -> None:
    for seed in range(60):
        random = Random(seed)
        group = [
            rollout(0, (), random.choice([0.0, 1.0]), problem=Problem(f"p{i}", "?"),
                    step_scores=(random.random(), random.random()))
            for i in range(8)
        ]  # fmt: skip
        found, expected = prof_keep(group, 0.5), slow_prof(group, 4)
        assert len(found) == 4
        right = [sum(r.outcome for r in kept) for kept in (found, expected)]
        gaps = [abs(2 * n - 4) for n in right]
        assert gaps[0] == gaps[1]
        if right[0] == right[1]:
            assert found == expected


def test_prof_drops_one_step_responses_first_and_judges_each_problem() -> None:
    short = rollout(0, (1,), 0.0, step_scores=(0.0,))  # most consistent, but a single step
    others = [rollout(0, (1, 2), 0.0, step_scores=(0.9, 0.9)) for _ in range(3)]
    assert short not in prof_keep([short, *others], 0.5)
    alone = rollout(1, (1, 2), 1.0, step_scores=(0.1, 0.1))
    assert alone in prof_keep([short, *others, alone], 0.5)


@pytest.mark.parametrize("scheme", ["paper", "blend", "gain", "min", "prof"])
def test_a_truncated_response_earns_no_process_score(
    scheme: Literal["paper", "blend", "gain", "min", "prof"],
) -> None:
    cut = rollout(0, (1, 2), 0.0, finish="length", answer=None)
    settings = {"reward_scheme": scheme, "use_prm": True, "prm_url": "http://127.0.0.1:1"}
    settings |= {"no_answer_reward": -0.25}
    scored = score_rollout(config(**settings), cut, "so", [0.9, 0.8])
    expected = 0.0 if scheme == "blend" else -0.25  # the blend has weights and no such amount
    assert scored.reward == pytest.approx(expected)
    assert scored.step_scores == (0.9, 0.8)
    if scheme == "paper":  # the official code's
        official = score_rollout(config(**settings, score_truncated=True), cut, "so", [0.9, 0.8])
        assert official.step_rewards == (0.9, 0.8)


def test_schemes_pay_what_they_say() -> None:
    right = rollout(0, (1, 2, 3), 0.0, answer="4")
    text, scores = "<output>\\boxed{4}</output>", [0.9, 0.2, 0.8]
    settings = {"use_prm": True, "prm_url": "http://127.0.0.1:1"}
    prof = score_rollout(config(reward_scheme="prof", **settings), right, text, scores)
    assert prof.step_rewards == (0.0, 0.0, 1.0)
    low = score_rollout(config(reward_scheme="min", **settings), right, text, scores)
    assert low.reward == pytest.approx(1.0 + sum(min_form(scores)))
    for scheme in ("min", "prof"):
        with pytest.raises(UserError, match="needs process scores; set use_prm"):
            config(reward_scheme=scheme)


def test_the_form_of_a_response_may_be_paid() -> None:
    whole = rollout(0, (1, 2), 0.0, answer="4")
    loose = replace(whole, acts=("next_step", ""))
    cfg = config(malformed_penalty=0.2)
    rewards = [score_rollout(cfg, r, "\\boxed{4}").reward for r in (whole, loose)]
    assert rewards == pytest.approx([1.0, 0.8])
    masked = score_rollout(config(malformed_responses="mask"), loose, "\\boxed{4}")
    assert masked.reward == 1.0
    assert masked.action_mask == (True, True, False, False)  # the text after the segment
    plain = score_rollout(cfg, loose, "\\boxed{4}", functional=False)
    assert plain.reward == 1.0


def test_gains_need_an_undiscounted_return() -> None:
    """With a discount they no longer cancel, and a longer response earns more."""
    with pytest.raises(UserError, match=r"reward_scheme=gain needs gamma=1, got 0\.9"):
        config(reward_scheme="gain", gamma=0.9)


@pytest.mark.invariant
def test_groups_of_equal_outcomes_are_equal_under_gain() -> None:
    """Sums of floats differ in their last bit: 0.1 + 0.2 - 0.3 is not 0."""
    random = Random(0)
    cfg = config(reward_scheme="gain", use_prm=True, prm_url="http://127.0.0.1:1")
    wrong = rollout(0, (1, 2, 3, 4, 5), 0.0, answer="5")
    scored = [
        score_rollout(cfg, wrong, "\\boxed{5}", [random.random() for _ in range(5)])
        for _ in range(200)
    ]
    assert rl.informative([r.reward for r in scored], [0] * 200) == [False] * 200


# ---- Forks, and trees whose acts the policy draws ----

PATH = [165, CLOSE["analysis"], *segment("next_step", "y"), *segment("output", "\\boxed{4}")]
WRONG = [*segment("analysis", "a"), *segment("next_step", "b"), *segment("output", "\\boxed{5}")]
RIGHT = [*segment("analysis", "c"), *segment("output", "\\boxed{4}")]


def scripted(replies: list) -> Any:
    """A sampler whose engine records what it was asked."""
    return learned(replies)


def forked(replies: list, rule: str = "failed", n: int = 6, roots: int = 2) -> tuple:
    ctx = scripted(replies)
    cfg = config(
        sampling_method="fork", num_generations=n, fork_roots=roots, fork_branches=2,
        fork_rule=rule, rollout_batch_size=1, train_batch_size=1, advantage_estimator="grpo",
    )  # fmt: skip
    rollouts = asyncio.run(Explorer(cfg, ctx).rollouts([(3, PROBLEM)], seed=1))
    return rollouts, ctx


@pytest.mark.oracle
def test_fork_continues_wrong_responses_with_one_request_each() -> None:
    tail = [*segment("output", "\\boxed{4}")]
    rollouts, ctx = forked([WRONG, RIGHT, tail, tail, tail, tail])
    assert len(rollouts) == 6 == len(ctx.engine.asked)
    prompt = Letters().encode(PROBLEM.question)
    prefixes = [asked[len(prompt) :] for asked, _ in ctx.engine.asked]
    assert prefixes[:2] == [[], []]
    ends = {3, 6}  # after the wrong response's first or second segment
    assert {len(prefix) for prefix in prefixes[2:]} <= ends
    assert all(WRONG[: len(prefix)] == prefix for prefix in prefixes[2:])
    assert sum(r.n_generated for r in rollouts) == ctx.engine.generated  # prefixes are paid once
    assert not any(any(r.forced) for r in rollouts)
    assert len({sampling.seed for _, sampling in ctx.engine.asked}) == 6
    for r, prefix in zip(rollouts, prefixes, strict=True):
        n = len(prefix)
        assert list(r.response_ids[:n]) == prefix
        assert r.action_mask == (False,) * n + (True,) * (len(r.response_ids) - n)
        assert bool(r.fork) == bool(n)
    assert [r.fork for r in rollouts[:2]] == [0, 0]
    shared = [{r.nodes[: r.nodes.index(r.fork) + 1] for r in rollouts if r.fork == f}
              for f in {r.fork for r in rollouts[2:]}]  # fmt: skip
    assert all(len(paths) == 1 for paths in shared)


def test_fork_with_all_roots_is_plain_sampling() -> None:
    replies = [WRONG, RIGHT, RIGHT, WRONG]
    rollouts, ctx = forked(list(replies), n=4, roots=4)
    assert [list(r.response_ids) for r in rollouts] == sorted(replies, key=len)
    assert all(all(r.action_mask) and r.fork == 0 for r in rollouts)
    assert len(ctx.engine.asked) == 4


def test_fork_without_segment_ends_samples_the_question_again() -> None:
    bare = [*segment("output", "\\boxed{4}")]
    rollouts, _ = forked([bare] * 6)
    assert len(rollouts) == 6
    assert all(r.fork == 0 and len(r.nodes) == 1 for r in rollouts)


def test_a_fork_is_not_paid_for_its_prefix() -> None:
    """Its first own token would take the prefix' scores, on which it has no influence."""
    whole = rollout(0, (1, 2, 3), 1.0, step_rewards=(0.5, 0.25, 1.0))
    mask = (False, False, False, True, True, True)  # the second step's opener is forced, say
    branch = replace(whole, action_mask=mask, fork=1)
    returns = []
    for made in (whole, branch):
        batch = collate([made])
        keep = batch.action_mask
        returns.append(rl.discounted_returns(batch.rewards, keep, batch.lengths, 1.0)[keep])
    assert returns[0].tolist() == [1.75, 1.75, 1.25, 1.25, 1.0, 1.0]
    assert returns[1].tolist() == [1.25, 1.0, 1.0]


def test_a_tree_credits_every_token_of_a_fork() -> None:
    ctx = scripted([WRONG, RIGHT, *[[*segment("output", "\\boxed{4}")]] * 4])
    cfg = config(
        sampling_method="fork", num_generations=6, fork_roots=2, fork_branches=2,
        rollout_batch_size=1, train_batch_size=1, advantage_estimator="tree",
    )  # fmt: skip
    rollouts = asyncio.run(Explorer(cfg, ctx).rollouts([(3, PROBLEM)], seed=1))
    assert all(all(r.action_mask) and r.fork == 0 for r in rollouts)


@pytest.mark.oracle
def test_fork_rule_uncertain_takes_the_ends_of_highest_entropy() -> None:
    tree = Tree(lambda act: (DRAWN, DRAWN) if act is None else (), 9, 0.0, seed=0)
    for p in (0.5, 0.9):
        first = Step("analysis", "", log_priors={"verify": math.log(p), "output": math.log(1 - p)})
        sure = Step("next_step", "", log_priors={"output": 0.0, "verify": -math.inf})
        choice = tree.select()
        assert choice
        tree.land(choice, [first, sure, Step("output", "")], 0.0)
    entropies = [act_entropy(tree.log_priors(node)) for node in fork_points(tree, 4, "uncertain")]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[0] == pytest.approx(math.log(2))
    assert entropies[-1] == 0.0
    assert len(fork_points(tree, 1, "random")) == 1


def test_a_drawn_tree_forces_nothing_and_branches_where_the_policy_went() -> None:
    replies = [
        [*segment("analysis", letter), *segment("output", "\\boxed{4}")] for letter in "abcdef"
    ]
    ctx = scripted(replies)
    cfg = config(
        tree_acts="drawn", tree_width=2, num_generations=4, rollout_batch_size=1,
        train_batch_size=1, leaves_in_flight=1,
    )  # fmt: skip
    explorer = Explorer(cfg, ctx)
    rollouts = asyncio.run(explorer.rollouts([(0, PROBLEM)], seed=1))
    assert len(rollouts) == 4 == len(ctx.engine.asked)  # no request for priors
    assert not any(any(r.forced) or any(r.branching) for r in rollouts)
    tree = explorer.example[0] if explorer.example else None
    assert tree
    assert len(tree.root.children) == 2
    assert len({node.key for node in tree.nodes}) == len(tree.nodes)
    assert sum(r.n_generated for r in rollouts) == ctx.engine.generated


@pytest.mark.oracle
def test_puct_tree_weighs_acts_by_their_prior() -> None:
    """Among equal values the visits of the root's acts follow the priors."""
    priors = {"analysis": math.log(0.7), "next_step": math.log(0.3)}
    acts = ("analysis", "next_step")
    tree = Tree(lambda act: acts * 40 if act is None else (), 1, 1.0, seed=0, selection="puct")
    tree.root_log_priors = priors

    async def expand(choice) -> list[Step]:
        return [Step(choice.act, "")]

    async def value(_) -> float:
        return 0.5

    asyncio.run(grow(tree, expand, value, simulations=2))
    first, second = tree.root.children
    assert [first.act, second.act] == [
        "analysis",
        "analysis",
    ]  # the likelier act comes first, twice
    expected = 0.5 + 1.0 * 0.7 * math.sqrt(2) / 2
    assert tree.puct(first) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_method": "fork", "fork_roots": 20}, "must be a multiple of fork_branches"),
        ({"sampling_method": "fork", "fork_branches": 3}, "must be a multiple of fork_branches"),
        ({"sampling_method": "fork", "rollout_mode": "stepwise"}, "stepwise forces every act"),
        ({"tree_acts": "drawn", "selection": "puct"}, "puct weighs acts by their priors"),
        ({"sampling_method": "normal", "advantage_estimator": "tree"}, "rollouts that share steps"),
        ({"advantage_estimator": "tree", "reward_scheme": "gain"}, "tree sums the rewards"),
    ],
)
def test_explorers_that_contradict_themselves_are_one_line(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)
