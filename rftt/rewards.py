"""Outcome and process -> one reward per step (arXiv 2502.13389). The last step ends the response.

A reward is never invented. Without a process reward model (PRM) a step earns 0. A rollout that the
PRM refuses is left out and counted. A PRM that is down stops the round (graders/prm.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from rftt.graders.math import grade
from rftt.learner.credit import inside_segments, min_form
from rftt.mcts import Value
from rftt.run.own_rewards import weighted
from rftt.types import Problem, Rollout, Step, UserError

if TYPE_CHECKING:
    from rftt.run.config import RLConfig


def solves(problem: Problem, text: str, finish: str, answer_format: str = "boxed") -> bool:
    """Return whether a response has the right answer; a truncated one has none."""
    gold = str(problem.answer)
    return finish != "length" and grade(text, gold, problem.question, answer_format).correct


def graded(problem: Problem, text_of: Callable[[Sequence[Step]], str]) -> Value:
    """Return a value of paths: 1 if the answer is right. For training: it needs the gold answer."""
    if problem.answer is None:
        raise UserError(f"problem {problem.id} has no gold answer, which a training search needs.")
    gold = problem.answer

    async def value(steps: Sequence[Step]) -> float:
        if steps[-1].answer is None:  # truncated, or without a final answer
            return 0.0
        return float(grade(text_of(steps), gold, problem.question).correct)

    return value


def score_rollout(
    cfg: RLConfig,
    rollout: Rollout,
    text: str,
    process: Sequence[float] | None = None,
    parts: dict[str, float] | None = None,
    *,
    functional: bool = True,
) -> Rollout:
    """Grade a rollout and give every step its reward; a truncated one has no answer.

    `text` is the decoded response. `process` holds (S,) scores in [0, 1], or None without a PRM.
    `parts` are the numbers of the user's functions, which replace the paper's amounts. Only a
    `functional` policy, one with functional tokens, can be required to write whole segments.
    """
    if rollout.problem.answer is None:
        raise UserError(f"problem {rollout.problem.id} has no gold answer, which its reward needs.")
    correct, answer = solves(rollout.problem, text, rollout.finish), rollout.answer
    malformed = functional and "" in rollout.acts
    if rollout.finish == "length" or (malformed and cfg.malformed_responses == "reject"):
        correct, answer = False, None  # it earns what no answer earns
    scores = tuple(process or ())  # (S,)
    # Scores of a truncated response are not paid, or running on could pay more than answering.
    paid = scores if rollout.finish == "stop" or cfg.score_truncated else ()  # (S,)
    if parts:
        finish = weighted(cfg, parts)
    else:
        finish = last_reward(cfg, correct, answer, paid[-1] if paid else None)
    rewards = [*[0.0] * (len(rollout.acts) - 1), finish]
    if paid:
        rewards = step_rewards(cfg, paid, finish)
    if malformed:
        rewards[-1] -= cfg.malformed_penalty
        if cfg.malformed_responses == "mask":
            rollout = replace(rollout, action_mask=inside_segments(rollout))
    return replace(
        rollout,
        outcome=float(correct),
        step_rewards=tuple(rewards),
        step_scores=scores,
        reward_parts=parts or {},
    )


def step_rewards(cfg: RLConfig, scores: Sequence[float], finish: float) -> list[float]:
    """Return the reward of each step from (S,) process scores and the reward of the finish."""
    match cfg.reward_scheme:
        case "paper" | "blend":
            return [*scores[:-1], finish]
        case "gain":  # what the step adds to the one before it; the sum telescopes
            levels = [0.0, *scores[:-1], finish]
            return [after - before for before, after in pairwise(levels)]
        case "min":
            *rewards, last = min_form(scores)
            return [*rewards, last + finish]
        case "prof":  # scores choose rollouts and are not paid
            return [0.0] * (len(scores) - 1) + [finish]


def last_reward(cfg: RLConfig, correct: bool, answer: str | None, process: float | None) -> float:
    """Return the reward of the last step; `process` is its own score, None without a PRM."""
    if cfg.reward_scheme == "blend":  # the official code's weights
        return 0.6 * correct + 0.4 * (process or 0.0)
    if correct:
        return cfg.correct_reward
    if answer is not None:
        return cfg.wrong_reward  # above 0 by default: an answer beats none (arXiv 2502.13389)
    if process is not None and cfg.reward_scheme == "paper":
        return process
    return cfg.no_answer_reward
