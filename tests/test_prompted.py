"""Test prompted.py with a scripted model: where a path of prompted acts ends."""

import asyncio

import pytest

from rftt.prompted import expand_prompted
from tests.test_rollout import BOXED, PROBLEM, Letters, choose, prompted


def test_prompted_path_ends_with_a_stated_answer():
    ctx, engine = prompted(["Think of pairs.", *["2+2 is \\boxed{4}"] * 9])
    steps = asyncio.run(expand_prompted(ctx, PROBLEM, choose("next_step")))
    assert steps[0].act == "next_step"
    assert steps[0].text == "Think of pairs."
    assert steps[-1].answer == "4"
    assert all(step.answer is None for step in steps[:-1])
    second_prompt = Letters().decode(engine.asked[1][0])
    assert "2+2?" in second_prompt
    assert "Think of pairs." in second_prompt


@pytest.mark.parametrize("reply", ["", [165, 166], BOXED], ids=["empty", "cut off", "boxed"])
@pytest.mark.parametrize("act", ["analysis", "direct_answer"])
def test_prompted_path_ends_where_the_model_has_nothing_to_say(reply, act):
    steps = asyncio.run(expand_prompted(prompted([reply])[0], PROBLEM, choose(act)))
    assert len(steps) == 1
    assert steps[0].answer is None


def test_prompted_depth_is_bounded():
    ctx, _ = prompted(["a step"] * 50, max_depth=3)
    assert len(asyncio.run(expand_prompted(ctx, PROBLEM, choose("clarify")))) <= 3


def test_simulation_passes_over_long_direct_answers_but_the_tree_may_choose_one():
    long = "A. B. C. D. E. \\boxed{4}"
    (step,) = asyncio.run(expand_prompted(prompted([long])[0], PROBLEM, choose("direct_answer")))
    assert step.answer == "4"
    requests = set()
    for seed in range(20):
        ctx, engine = prompted(["x.", long, long], seed=seed)
        steps = asyncio.run(expand_prompted(ctx, PROBLEM, choose("subquestion")))
        assert [step.act for step in steps] == ["subquestion", "next_step"]
        requests.add(len(engine.asked))
    assert requests == {2, 3}  # 3: a direct answer was drawn first and passed over
