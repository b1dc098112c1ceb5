"""Test prompted.py with a scripted model: where a path of prompted acts ends."""

import asyncio

import pytest

from rftt.prompted import draw, expand_prompted
from tests.test_rollout import PROBLEM, Letters, choose, prompted


def test_prompted_path_ends_with_a_stated_answer():
    ctx, engine = prompted(
        ["Think of pairs.", *(f"Is it {i}? It is {i}: \\boxed{{4}}" for i in range(9))]
    )
    steps = asyncio.run(expand_prompted(ctx, PROBLEM, choose("next_step")))
    assert steps[0].act == "next_step"
    assert steps[0].text == "Think of pairs."
    assert steps[-1].answer == "4"
    assert all(step.answer is None for step in steps[:-1])
    second_prompt = Letters().decode(engine.asked[1][0])
    assert "2+2?" in second_prompt
    assert "Think of pairs." in second_prompt


@pytest.mark.parametrize(
    ("reply", "reason"),
    [("", "empty"), ([165, 166], "cut_off"), ("So \\boxed{4", "cut_off"), ("It is 4.", "no_box")],
)
def test_a_reply_that_never_keeps_its_contract_ends_the_path(reply, reason):
    ctx, engine = prompted([reply] * 3, contract_tries=3)
    (step,) = asyncio.run(expand_prompted(ctx, PROBLEM, choose("direct_answer")))
    assert step.refused == reason
    assert step.answer is None
    assert ctx.refusals == {f"contract_direct_answer_{reason}": 3}
    assert len({sampling.seed for _, sampling in engine.asked}) == 3  # each try has its own


def test_a_refused_reply_is_asked_for_again_and_then_forgotten():
    ctx, engine = prompted(["It is 4.", "So it is \\boxed{4}."])
    (step,) = asyncio.run(expand_prompted(ctx, PROBLEM, choose("direct_answer")))
    assert (step.text, step.answer, step.refused) == ("So it is \\boxed{4}.", "4", None)
    assert engine.asked[0][0] == engine.asked[1][0]  # the refused reply is not shown to the model
    assert ctx.refusals == {"contract_direct_answer_no_box": 1}


def test_after_an_act_without_a_fit_reply_another_one_is_asked_for():
    for seed in range(9):
        replies = ["How many? 4.", "I say nothing", "So \\boxed{4}."]
        ctx, _ = prompted(replies, contract_tries=1, seed=seed)
        steps = asyncio.run(expand_prompted(ctx, PROBLEM, choose("subquestion")))
        if "contract_direct_answer_no_box" in ctx.refusals:  # the act that was drawn first
            assert [step.act for step in steps] == ["subquestion", "next_step"]
            assert steps[-1].answer == "4"
            return
    raise AssertionError("no seed draws the direct answer first")


def test_a_reply_whose_truncated_end_is_cleaned_away_is_whole():
    truncated = [*Letters().encode("How many? 4.\nAnd now I wi")]
    ctx, _ = prompted([truncated, "So \\boxed{4}."])
    steps = asyncio.run(expand_prompted(ctx, PROBLEM, choose("subquestion")))
    assert (steps[0].text, steps[0].refused) == ("How many? 4.", None)


@pytest.mark.cases
def test_drawn_checks_are_trimmed_and_counted_and_may_not_leak_the_answer():
    replies = [
        "No, 2+2 is not 5. So it is 4.",  # only its beginning keeps the answer to itself
        "It is 4 and not 5.",
        "\\boxed{",
        "I wrote 5, but it is less.",
    ]
    ctx, engine = prompted(replies)
    parts = {"wrong": "2+2=5", "correct": "2+2=4"}
    kept = asyncio.run(draw(ctx, PROBLEM, "verify", "", n=4, **parts))
    assert kept == ["No, 2+2 is not 5.", "I wrote 5, but it is less."]
    assert ctx.refusals == {"contract_verify_leaks_answer": 1, "contract_verify_cut_off": 1}
    shown = Letters().decode(engine.asked[0][0])
    assert shown.index("2+2?") < shown.index("2+2=5") < shown.index("2+2=4")


def test_prompted_depth_is_bounded():
    ctx, _ = prompted([f"How is step {i}? Good." for i in range(50)], max_depth=3)
    assert len(asyncio.run(expand_prompted(ctx, PROBLEM, choose("clarify")))) <= 3


def test_simulation_passes_over_long_direct_answers_but_the_tree_may_choose_one():
    long, limit = "A. B. \\boxed{4}", {"max_direct_sentences": 2}
    ctx, _ = prompted([long], **limit)
    (step,) = asyncio.run(expand_prompted(ctx, PROBLEM, choose("direct_answer")))
    assert step.answer == "4"
    requests = set()
    for seed in range(20):
        ctx, engine = prompted(["x? y.", long, "\\boxed{4}."], seed=seed, **limit)
        steps = asyncio.run(expand_prompted(ctx, PROBLEM, choose("subquestion")))
        assert [step.act for step in steps] == ["subquestion", "next_step"]
        requests.add(len(engine.asked))
    assert requests == {2, 3}  # 3: a direct answer was drawn first and passed over
