"""Outcome and process -> one reward per step (PAPER §1). The last step of a rollout is its finish.

A reward is never invented: without a process reward model a step earns 0, and a score that could
not be had stops the run where it is asked for, not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rftt.rewards.grader import grade
from rftt.schema import Problem, Rollout, UserError


@dataclass(frozen=True)
class RewardScheme:
    correct: float
    """The answer is right."""
    wrong: float
    """There is an answer, and it is wrong."""
    no_answer: float
    """The response ended without one."""
    blend: bool = False
    """Last step = 0.6 x correct + 0.4 x process score, as found in the official code."""
    whole_segments: bool = False
    """A response with text outside its segments has no answer, whatever it says."""
    custom: Callable[[Problem, str], object] | None = None
    """The user's own: what the last step earns, instead of all of the above."""


def score(
    rollout: Rollout, text: str, scheme: RewardScheme, process: Sequence[float] | None = None
) -> Rollout:
    """Grade a rollout and give every step its reward; one cut off by its budget has no answer.

    `text` is the decoded response; `process` holds (S,) scores in [0, 1], or None without a PRM.
    """
    gold = rollout.problem.answer
    if gold is None:
        raise UserError(f"problem {rollout.problem.id} has no gold answer to reward against.")
    correct = grade(text, gold, rollout.problem.question).correct
    process = process or [0.0] * len(rollout.acts)
    answer = rollout.answer
    if rollout.finish == "length" or (scheme.whole_segments and "" in rollout.acts):
        correct, answer = False, None
    finish = finish_reward(correct, answer, process[-1], scheme)
    if scheme.custom is not None:
        finish = own_reward(scheme.custom, rollout.problem, text)
    return replace(rollout, outcome=float(correct), step_rewards=(*process[:-1], finish))


def finish_reward(correct: bool, answer: str | None, process: float, scheme: RewardScheme) -> float:
    """What the last step earns; `process` is its own score, 0 without a PRM."""
    if scheme.blend:
        return 0.6 * correct + 0.4 * process
    if correct:
        return scheme.correct
    return scheme.wrong if answer is not None else scheme.no_answer


def own_reward(function: Callable[[Problem, str], object], problem: Problem, text: str) -> float:
    """What the user's function says. Raises UserError where that is not a finite number."""
    value = function(problem, text)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"reward_function returned {value!r} for problem {problem.id}, no number.")
    return float(value)
