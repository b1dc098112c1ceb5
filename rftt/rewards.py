"""Outcome and process -> one reward per step (arXiv 2502.13389). The last step ends the response.

A reward is never invented. Without a process reward model (PRM) a step earns 0. A rollout that the
PRM refuses is left out and counted. A PRM that is down stops the round (graders/prm.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rftt.engines.chat import decode
from rftt.graders.math import grade
from rftt.graders.prm import ProcessModel, Unscored, score_paths, segment_text
from rftt.mcts import Value
from rftt.run.cli import own_reward
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
    ids: FunctionIds | None  # None for a policy without functional tokens
    prm: ProcessModel | None

    async def score(self, rollouts: Sequence[Rollout]) -> list[Rollout | Unscored]:
        """Return every rollout with a reward on each step, or the reason why the PRM refuses it.

        Raise UserError when the PRM is down.
        """
        if self.prm is None:
            return [self._score_one(rollout, None) for rollout in rollouts]
        paths = []
        for rollout in rollouts:
            texts = [segment_text(self.tokenizer, ids, self.ids) for ids in rollout.step_ids()]
            paths.append((rollout.problem.question, texts))
        found: list[Rollout | Unscored] = []
        for rollout, scores in zip(rollouts, await score_paths(self.prm, paths), strict=True):
            if isinstance(scores, Unscored):
                found.append(scores)
            else:
                found.append(self._score_one(rollout, scores))
        return found

    def _score_one(self, rollout: Rollout, process: Sequence[float] | None) -> Rollout:
        text = decode(self.tokenizer, rollout.response_ids)  # the grader reads text
        return score_rollout(self.cfg, rollout, text, process, functional=self.ids is not None)


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
    *,
    functional: bool = True,
) -> Rollout:
    """Grade a rollout and give every step its reward; a truncated one has no answer.

    `text` is the decoded response. `process` holds (S,) scores in [0, 1], or None without a PRM.
    Only a `functional` policy, one with functional tokens, can be required to write whole segments.
    """
    if rollout.problem.answer is None:
        raise UserError(f"problem {rollout.problem.id} has no gold answer, which its reward needs.")
    correct, answer = solves(rollout.problem, text, rollout.finish), rollout.answer
    malformed = functional and cfg.malformed_responses == "reject" and "" in rollout.acts
    if rollout.finish == "length" or malformed:
        correct, answer = False, None  # it earns what no answer earns
    scores = tuple(process or ())  # (S,)
    rewards = [*scores] or [0.0] * len(rollout.acts)  # (S,)
    if cfg.reward_function is not None:  # the user's own instead of the paper's amounts
        rewards[-1] = own_reward(cfg.reward_function, rollout.problem, text)
    else:
        rewards[-1] = last_reward(cfg, correct, answer, scores[-1] if scores else None)
    if cfg.reward_scheme == "gain":  # what the step adds to the one before it; the sum telescopes
        before = [0.0, *rewards[:-1]]
        rewards = [reward - old for reward, old in zip(rewards, before, strict=True)]
    return replace(rollout, outcome=float(correct), step_rewards=tuple(rewards), step_scores=scores)


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
