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
from rftt.run.own_rewards import own_rewards, weighted
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
        texts = [decode(self.tokenizer, rollout.response_ids) for rollout in rollouts]
        parts = await own_rewards(self.cfg, rollouts, texts)
        process = await self._process_scores(rollouts)
        functional = self.ids is not None
        found: list[Rollout | Unscored] = []
        for rollout, text, own, scores in zip(rollouts, texts, parts, process, strict=True):
            if isinstance(scores, Unscored):
                found.append(scores)
                continue
            scored = score_rollout(self.cfg, rollout, text, scores, own, functional=functional)
            found.append(scored)
        return found

    async def _process_scores(
        self, rollouts: Sequence[Rollout]
    ) -> Sequence[list[float] | Unscored | None]:
        """Return the (S,) scores of each rollout, None for all of them without a PRM."""
        if self.prm is None:
            return [None] * len(rollouts)
        paths = []
        for rollout in rollouts:
            steps = [segment_text(self.tokenizer, ids, self.ids) for ids in rollout.step_ids()]
            paths.append((rollout.problem.question, steps))
        return await score_paths(self.prm, paths)


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
    malformed = functional and cfg.malformed_responses == "reject" and "" in rollout.acts
    if rollout.finish == "length" or malformed:
        correct, answer = False, None  # it earns what no answer earns
    scores = tuple(process or ())  # (S,)
    rewards = [*scores] or [0.0] * len(rollout.acts)  # (S,)
    if parts:
        rewards[-1] = weighted(cfg, parts)
    else:
        rewards[-1] = last_reward(cfg, correct, answer, scores[-1] if scores else None)
    if cfg.reward_scheme == "gain":  # what the step adds to the one before it; the sum telescopes
        before = [0.0, *rewards[:-1]]
        rewards = [reward - old for reward, old in zip(rewards, before, strict=True)]
    return replace(
        rollout,
        outcome=float(correct),
        step_rewards=tuple(rewards),
        step_scores=scores,
        reward_parts=parts or {},
    )


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
