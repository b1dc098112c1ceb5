"""Outcome and process -> one reward per step (arXiv 2502.13389). The last step ends the response.

A reward is never invented. Without a process reward model (PRM) a step earns 0. A rollout that the
PRM refuses is left out and counted. A PRM that is down stops the round (graders/prm.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from rftt.engines.chat import decode
from rftt.graders.math import grade
from rftt.graders.prm import ProcessModel, Unscored, score_paths, segment_text
from rftt.mcts import Value
from rftt.run.cli import load_function
from rftt.types import Problem, Rollout, Step, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.run.config import RLConfig
    from rftt.tokens import FunctionIds


@dataclass(frozen=True)
class Reward:
    """Judges rollouts: the grader decides on the answer, the PRM, if any, on the steps."""

    cfg: RLConfig
    tokenizer: PreTrainedTokenizerBase
    ids: FunctionIds | None
    """None for a policy without functional tokens."""
    prm: ProcessModel | None

    async def score(self, rollouts: Sequence[Rollout]) -> list[Rollout | Unscored]:
        """Return every rollout with a reward on each step, or the reason why the PRM refuses it.

        Raise UserError when the PRM is down.
        """
        paths = [
            (r.problem.question, [segment_text(self.tokenizer, s, self.ids) for s in r.step_ids()])
            for r in rollouts
        ]
        scores = await score_paths(self.prm, paths) if self.prm else [None] * len(rollouts)
        return [
            process if isinstance(process, Unscored) else self.score_one(rollout, process)
            for rollout, process in zip(rollouts, scores, strict=True)
        ]

    def score_one(self, rollout: Rollout, process: Sequence[float] | None) -> Rollout:
        """Score one rollout, given its (S,) process scores or None without a PRM."""
        text = decode(self.tokenizer, rollout.response_ids)  # the grader reads text
        return score_rollout(self.cfg, rollout, text, process, functional=self.ids is not None)


def accepted(found: Sequence[Rollout | Unscored], log: Callable[[str], None]) -> list[Rollout]:
    """Return the scored rollouts by group, and log how many the PRM refused.

    Raise UserError where it refused all of them.
    """
    rollouts = [rollout for rollout in found if isinstance(rollout, Rollout)]
    refused = [reason for reason in found if isinstance(reason, Unscored)]
    if refused and not rollouts:
        raise UserError(f"the PRM refuses all of {len(refused)} paths; the first: {refused[0]}.")
    if refused:
        log(f"the PRM refuses {len(refused)} paths: they are left out")
    return sorted(rollouts, key=lambda rollout: rollout.group)


def solves(problem: Problem, text: str, finish: str, answer_format: str = "boxed") -> bool:
    """Return whether a response has the right answer; a truncated one has none."""
    gold = str(problem.answer)
    return finish != "length" and grade(text, gold, problem.question, answer_format).correct


def graded(problem: Problem, text_of: Callable[[Sequence[Step]], str]) -> Value:
    """Return a value of paths: 1 if the answer is right. For training: it needs the gold answer."""
    if problem.answer is None:
        raise UserError(f"problem {problem.id} has no gold answer to search with.")
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
    *,
    functional: bool = True,
) -> Rollout:
    """Grade a rollout and give every step its reward; a truncated one has no answer.

    `text` is the decoded response. `process` holds (S,) scores in [0, 1], or None without a PRM.
    Only a `functional` policy, one with functional tokens, can be required to write whole segments.
    """
    if rollout.problem.answer is None:
        raise UserError(f"problem {rollout.problem.id} has no gold answer to reward against.")
    correct, answer = solves(rollout.problem, text, rollout.finish), rollout.answer
    malformed = functional and cfg.malformed_responses == "reject" and "" in rollout.acts
    if rollout.finish == "length" or malformed:
        correct, answer = False, None  # it earns what no answer earns
    if cfg.reward_function is not None:  # the user's own instead of the paper's amounts
        last = own_reward(cfg.reward_function, rollout.problem, text)
    else:
        last = last_reward(cfg, correct, answer, process[-1] if process is not None else None)
    before = process[:-1] if process is not None else [0.0] * (len(rollout.acts) - 1)
    rewards = (*before, last)  # (S,)
    if cfg.reward_scheme == "gain":
        rewards = tuple(after - before for before, after in pairwise((0.0, *rewards)))
    scores = tuple(process or ())
    return replace(rollout, outcome=float(correct), step_rewards=rewards, step_scores=scores)


def last_reward(cfg: RLConfig, correct: bool, answer: str | None, process: float | None) -> float:
    """Return the reward of the last step; `process` is its own score, None without a PRM."""
    if cfg.reward_scheme == "blend":
        return 0.6 * correct + 0.4 * (process or 0.0)
    if correct:
        return cfg.correct_reward
    if answer is not None:
        return cfg.wrong_reward
    if process is not None and cfg.reward_scheme == "paper":
        return process
    return cfg.no_answer_reward


def own_reward(function: str, problem: Problem, text: str) -> float:
    """Call the user's function. Raise UserError where it does not return a finite number."""
    value = load_function("reward_function", function)(problem, text)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"reward_function returned {value!r} for problem {problem.id}, no number.")
    return float(value)
