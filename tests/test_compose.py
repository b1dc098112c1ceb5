"""Rewards: the paper's amounts, the blend, and what counts as an answer at all."""

import pytest

from rftt.rewards.compose import RewardScheme, score
from rftt.schema import Problem, Rollout, UserError

PAPER = RewardScheme(correct=1.0, wrong=0.1, no_answer=0.0)
BLEND = RewardScheme(correct=1.0, wrong=0.1, no_answer=0.0, blend=True)
WHOLE = RewardScheme(correct=1.0, wrong=0.1, no_answer=0.0, whole_segments=True)


def rollout(answer, finish="stop", acts=("analysis", "output"), gold="4"):
    return Rollout(
        problem=Problem("p", "2+2?", gold),
        prompt_ids=(1,),
        response_ids=(2, 3),
        sampling_logprobs=(-1.0, -1.0),
        action_mask=(True, True),
        step_ends=(0, 1),
        acts=acts,
        finish=finish,
        group=0,
        n_generated=2,
        answer=answer,
    )


def text(answer):
    return "so" if answer is None else f"<output>\\boxed{{{answer}}}</output>"


@pytest.mark.parametrize(
    ("scheme", "answer", "process", "rewards", "outcome"),
    [
        (PAPER, "4", None, (0.0, 1.0), 1.0),
        (PAPER, "5", None, (0.0, 0.1), 0.0),
        (PAPER, None, None, (0.0, 0.0), 0.0),
        (PAPER, "4", [0.7, 0.2], (0.7, 1.0), 1.0),
        (BLEND, "4", [0.7, 0.5], (0.7, 0.6 + 0.4 * 0.5), 1.0),
        (BLEND, "5", [0.7, 0.5], (0.7, 0.4 * 0.5), 0.0),
        (BLEND, "4", None, (0.0, 0.6), 1.0),
    ],
)
def test_oracle_reward_of_every_step(scheme, answer, process, rewards, outcome):
    scored = score(rollout(answer), text(answer), scheme, process)
    assert scored.step_rewards == pytest.approx(rewards)
    assert scored.outcome == outcome


def test_a_response_cut_off_by_its_budget_has_no_answer():
    scored = score(rollout("4", finish="length"), text("4"), PAPER)
    assert (scored.outcome, scored.step_rewards) == (0.0, (0.0, 0.0))


def test_text_outside_whole_segments_is_refused_on_request():
    broken = rollout("4", acts=("analysis", ""))
    assert score(broken, text("4"), PAPER).outcome == 1.0
    assert score(broken, text("4"), WHOLE).step_rewards == (0.0, 0.0)
    assert score(rollout("4"), text("4"), WHOLE).outcome == 1.0


def test_a_problem_without_gold_answer_cannot_be_rewarded():
    with pytest.raises(UserError, match="p has no gold answer"):
        score(rollout("4", gold=None), text("4"), PAPER)


def test_the_users_own_function_pays_the_last_step_and_leaves_the_outcome_to_the_grader():
    def shortness(problem: Problem, response: str) -> float:
        return len(problem.question) / len(response)

    own = RewardScheme(correct=1.0, wrong=0.1, no_answer=0.0, custom=shortness)
    scored = score(rollout("4"), text("4"), own, [0.7, 0.2])
    assert scored.step_rewards == (0.7, 4 / len(text("4")))
    assert scored.outcome == 1.0


@pytest.mark.parametrize("value", [None, "1", float("nan")])
def test_a_users_function_must_return_a_number(value):
    own = RewardScheme(correct=1.0, wrong=0.1, no_answer=0.0, custom=lambda problem, text: value)
    with pytest.raises(UserError, match=r"reward_function returned .* for problem p"):
        score(rollout("4"), text("4"), own)
