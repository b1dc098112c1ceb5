"""Test pair choice, cross verification and branch merging on trees built by hand."""

import asyncio
from dataclasses import replace

import pytest

from rftt.curate import Omitted, choose_pairs, curate, disjoint_correct, traces
from rftt.graders.math import extract
from rftt.graders.prm import Unscored, score_steps
from rftt.mcts import Choice, Tree
from rftt.run.config import SearchConfig
from rftt.tokens import ACTS, FunctionIds, render
from rftt.types import Problem, Step

PROBLEM = Problem("p", "Eva has 19 pens, triples them, sells 3. How many?", "54")
RULES = SearchConfig(output_dir="o", model_name_or_path="m", train_file="t")


def build(*paths):
    """A tree of (act, text) paths; equal beginnings are shared."""
    tree = Tree(lambda _: ACTS * 3, max_depth=15, exploration_weight=2.0, seed=0)
    for path in paths:
        node, rest = tree.root, list(path)
        while rest and (
            child := next((c for c in node.children if (c.act, c.step.text) == rest[0]), None)
        ):
            node, rest = child, rest[1:]
        steps = [Step(act, text, answer=extract(text)) for act, text in rest]
        choice = Choice(node, rest[0][0], (*node.key, f"{len(node.children)}"))
        for passed in (tree.root, *node.path()):
            passed.in_flight += 1
        tree.land(choice, steps, float(steps[-1].answer == PROBLEM.answer))
    return tree


PLAN = ("analysis", "First triple, then sell.")
RIGHT = [PLAN, ("next_step", "Triples? 57."), ("next_step", "Sells 3? \\boxed{54}")]
WRONG = [PLAN, ("direct_answer", "58, 55. \\boxed{55}")]
OTHER = [("subquestion", "Triples? 19*3=57."), ("direct_answer", "54. \\boxed{54}")]


def says(verify=("19*3=57, not 58.",), refine=("Redo it from the tripling.",)):
    async def draw(act, so_far, *, n, **parts):
        return list({"verify": verify, "refine": refine}[act])

    return draw


class Doubter:
    """A PRM that dislikes equations and 58, and reads no path that says `unreadable`."""

    async def score(self, question, steps):
        if any("unreadable" in step for step in steps):
            raise Unscored("no")
        return [0.1 if "58" in step else 0.2 if "=" in step else 0.9 for step in steps]

    def close(self): ...


def test_process_scores_of_a_tree_choose_the_pair():
    unread = [PLAN, ("direct_answer", "unreadable \\boxed{1}")]
    tree = build(RIGHT, WRONG, OTHER, unread)
    good, bad = choose_pairs(traces(tree, PROBLEM), RULES)[0]
    assert (good.nodes, bad.nodes) == ((1, 2, 3), (1, 7))  # most steps; few steps, long text
    assert asyncio.run(score_steps(Doubter(), tree, PROBLEM)) == 1
    assert [node.step.score for node in tree.nodes[1:]] == [0.9, 0.9, 0.9, 0.1, 0.2, 0.9, None]
    good, bad = choose_pairs(traces(tree, PROBLEM), RULES)[0]
    assert (good.nodes, bad.nodes) == ((1, 2, 3), (1, 4))
    last = replace(RULES, prm_reduce="last")
    object.__setattr__(tree.nodes[3].step, "score", 0.5)
    good, _ = choose_pairs(traces(tree, PROBLEM), last)[0]
    assert good.nodes == (5, 6)  # its mean is lower, its last step better


def test_merged_row_is_prefix_wrong_verify_refine_correct_output():
    rows, counts = asyncio.run(curate(build(RIGHT, WRONG), PROBLEM, says(), RULES))
    merged, plain = rows
    assert [(s["act"], s["text"]) for s in merged["steps"]] == [
        PLAN,
        WRONG[1],
        ("verify", "19*3=57, not 58."),
        ("refine", "Redo it from the tripling."),
        *RIGHT[1:],
        ("output", "The final answer is \\boxed{54}."),
    ]
    assert [bool(s.get("wrong")) for s in merged["steps"]] == [False, True] + [False] * 5
    assert merged["shared_steps"] == 1
    assert merged["failed_nodes"] == [4]
    assert merged["path_nodes"] == [1, 2, 3]
    assert plain["kind"] == "plain"
    assert counts == {"kept_merged": 1, "kept_plain": 1}


def test_verification_sees_both_continuations_of_the_shared_prefix():
    seen = []

    async def draw(act, so_far, *, n, **parts):
        seen.append((act, so_far, n, parts))
        return ["19*3=57, not 58."]

    rules = replace(RULES, verify_draws=5, contract_tries=2)
    asyncio.run(curate(build(RIGHT, WRONG), PROBLEM, draw, rules))
    right = "Triples? 57.\nSells 3? \\boxed{54}"
    assert seen == [
        ("verify", PLAN[1], 5, {"wrong": WRONG[1][1], "correct": right}),
        ("refine", f"{PLAN[1]}\n{WRONG[1][1]}", 2, {"check": "19*3=57, not 58."}),
    ]


def test_of_several_checks_the_one_that_quotes_the_mistake_is_taken():
    checks = ("I see 57 and 3.", "57 is right, not 55.", "I wrote 58, then 55, but why?", "Not 58.")
    rows, _ = asyncio.run(curate(build(RIGHT, WRONG), PROBLEM, says(verify=checks), RULES))
    assert rows[0]["steps"][2]["text"] == "Not 58."


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ({"verify": ()}, "verify_refused"),
        ({"verify": ("I see 57 and 3.",)}, "verify_names_no_mistake"),
        ({"refine": ()}, "refine_refused"),
    ],
)
def test_unfit_merges_are_counted_and_left_out(replies, reason):
    rows, counts = asyncio.run(curate(build(RIGHT, WRONG), PROBLEM, says(**replies), RULES))
    assert [row["kind"] for row in rows] == ["plain"]
    assert counts == {reason: 1, "kept_plain": 1}


def test_the_next_pair_is_tried_where_no_check_names_the_mistake():
    other = [PLAN, ("direct_answer", "Triples, so 59, sells 3, so 56: \\boxed{56}")]
    tree = build(RIGHT, WRONG, other)
    for tries, kinds in ((1, ["plain"]), (2, ["merged", "plain"])):
        draw = says(verify=("It is not 55.",))
        rows, _ = asyncio.run(curate(tree, PROBLEM, draw, replace(RULES, merge_tries=tries)))
        assert [row["kind"] for row in rows] == kinds


def test_a_wrong_path_of_right_numbers_has_no_mistake_to_name():
    wrong = [PLAN, ("direct_answer", "57. \\boxed{57}")]  # it stops too early
    _, counts = asyncio.run(curate(build(RIGHT, wrong), PROBLEM, says(), RULES))
    assert counts["no_mistake_to_name"] == 1


@pytest.mark.cases
def test_a_path_whose_analysis_states_its_answer_is_left_out():
    early = [("analysis", "It is 57 - 3 = 54."), ("direct_answer", "So \\boxed{54}.")]
    wrong = [("clarify", "We want 51."), ("direct_answer", "So \\boxed{51}.")]
    rows, counts = asyncio.run(curate(build(early, wrong), PROBLEM, says(), RULES))
    assert rows == []
    assert counts["path_answers_early"] == 2


def test_a_right_path_with_a_wrong_calculation_is_left_out():
    lucky = [PLAN, ("next_step", "19 * 3 = 58."), ("direct_answer", "58 - 3 = 54. \\boxed{54}")]
    rows, counts = asyncio.run(curate(build(lucky, OTHER), PROBLEM, says(), RULES))
    assert [row["path_nodes"] for row in rows] == [[4, 5]]
    assert counts["path_miscalculates"] == 1


def test_row_that_does_not_end_in_the_right_answer_is_left_out():
    other = Problem("p", PROBLEM.question, "55")
    tree = build(RIGHT, WRONG)
    for leaf in tree.leaves():
        leaf.value_sum = 1.0 if leaf.step.answer == "54" else 0.0  # a verdict gone wrong
    rows, counts = asyncio.run(curate(tree, other, says(), RULES))
    assert rows == []
    assert counts["row_ends_wrong"] == 2


@pytest.mark.parametrize(
    ("paths", "reason"),
    [([WRONG], "no_correct_path"), ([RIGHT], "no_wrong_path")],
)
def test_trees_without_a_pair(paths, reason):
    _, counts = asyncio.run(curate(build(*paths), PROBLEM, says(), RULES))
    assert counts[reason] == 1


def test_pair_must_share_as_many_steps_as_asked():
    usable = traces(build(OTHER, WRONG), PROBLEM)
    with pytest.raises(Omitted, match="no_shared_prefix"):
        choose_pairs(usable, replace(RULES, min_shared_steps=1))


def test_pair_is_the_best_right_and_the_worst_wrong_path_by_process_reward():
    def path(act, answer, score):
        return [("next_step", "Go."), (act, f"\\boxed{{{answer}}} {score}")]

    tree = build(*(path("next_step", a, s) for a, s in ((54, 3), (54, 9), (1, 5), (2, 4))))
    for node in tree.nodes[1:]:
        score = float(node.step.text[-1]) / 10 if node.terminal else None
        object.__setattr__(node.step, "score", score)
    good, bad = choose_pairs(traces(tree, PROBLEM), RULES)[0]
    assert good.steps[-1].text == "\\boxed{54} 9"
    assert bad.steps[-1].text == "\\boxed{2} 4"


def test_pair_for_dpo_shares_the_longest_prefix_then_is_best_and_worst():
    rules = replace(RULES, tree_pairs=True)
    worse = [PLAN, RIGHT[1], ("direct_answer", "3+1=4. 5. 6. \\boxed{55}")]
    paths = (OTHER, WRONG, RIGHT, [*RIGHT[:2], ("direct_answer", "\\boxed{55}")], worse)
    rows, counts = asyncio.run(curate(build(*paths), PROBLEM, says(), rules))
    (pair,) = (row for row in rows if row["kind"] == "pair")
    end = [("output", "The final answer is \\boxed{54}.")]
    wrong_end = [("output", "The final answer is \\boxed{55}.")]
    assert [(s["act"], s["text"]) for s in pair["chosen"]] == RIGHT + end
    assert [(s["act"], s["text"]) for s in pair["rejected"]] == worse + wrong_end
    assert counts["kept_pair"] == 1
    rows, _ = asyncio.run(curate(build(RIGHT, OTHER), PROBLEM, says(), rules))
    assert not [row for row in rows if row["kind"] == "pair"]


def test_plain_paths_share_no_step():
    again = [PLAN, ("direct_answer", "57, 54. \\boxed{54}")]
    kept = disjoint_correct(traces(build(RIGHT, again, OTHER), PROBLEM), RULES)
    assert len(kept) == 2
    assert not set(kept[0].nodes) & set(kept[1].nodes)


def test_paths_that_phase_2_could_not_write_are_left_out():
    rows, counts = asyncio.run(
        curate(build([("direct_answer", "\\boxed{54}")]), PROBLEM, says(), RULES)
    )
    assert rows == []
    assert counts["path_against_grammar"] == 1


@pytest.mark.invariant
def test_every_row_renders_to_a_response_of_whole_segments():
    from rftt.tokens import parse_response

    ids = FunctionIds(
        {act: i for i, act in enumerate(ACTS)}, {act: 8 + i for i, act in enumerate(ACTS)}
    )

    class Bytes:
        def encode(self, text, add_special_tokens):
            return [100 + byte for byte in text.encode()]

    rows, _ = asyncio.run(curate(build(RIGHT, WRONG, OTHER), PROBLEM, says(), RULES))
    assert len(rows) == 3
    for row in rows:
        response = render([(s["act"], s["text"]) for s in row["steps"]], Bytes(), ids)
        spans, covered = parse_response(response, ids)
        assert covered == len(response)
        assert [span.act for span in spans] == [s["act"] for s in row["steps"]]
