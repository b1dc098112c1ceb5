"""Outcome and process -> one reward per step (arXiv 2502.13389). Its finish is the last step.

A reward is never invented: without a process reward model a step earns 0; a rollout that the model
refuses is left out and counted; a model that is down stops the round (graders/prm.py).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

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


def reward(
    cfg: RLConfig,
    tokenizer: PreTrainedTokenizerBase,
    ids: FunctionIds | None,
    prm: ProcessModel | None,
    gather: Callable[[Any], list[Any]],
    say: Callable[[str], None],
    found: Sequence[Rollout],
) -> list[Rollout]:
    """All ranks' rollouts by group, with a reward on every step; says how many a PRM refuses.

    Raises UserError on all ranks at once when it is down, or refuses all that any rank has: the run
    goes on from its last checkpoint.
    """
    try:
        (own, refused), failure = asyncio.run(reward_all(cfg, tokenizer, ids, prm, found)), ""
    except UserError as error:
        own, refused, failure = [], [], str(error)
    shares = gather((own, refused, failure))
    if failure := next((failure for *_, failure in shares if failure), ""):
        raise UserError(failure)
    rollouts = sorted(chain(*(own for own, *_ in shares)), key=lambda rollout: rollout.group)
    reasons = list(chain(*(refused for _, refused, _ in shares)))
    if reasons and not rollouts:
        raise UserError(f"the PRM refuses all of {len(reasons)} paths; the first: {reasons[0]}.")
    if reasons:
        say(f"the PRM refuses {len(reasons)} paths: they are left out")
    return rollouts


async def reward_all(
    cfg: RLConfig,
    tokenizer: PreTrainedTokenizerBase,
    ids: FunctionIds | None,
    prm: ProcessModel | None,
    rollouts: Sequence[Rollout],
) -> tuple[list[Rollout], list[str]]:
    """Every rollout graded, with a reward on each step; and why the PRM refuses the others.

    Raises UserError when the PRM is down.
    """
    functional = ids is not None
    paths = [
        (r.problem.question, [segment_text(tokenizer, step, ids) for step in r.step_ids()])
        for r in rollouts
    ]
    found = await score_paths(prm, paths) if prm else [None] * len(rollouts)
    rewarded = [
        score_rollout(
            cfg, rollout, decode(tokenizer, rollout.response_ids), process, functional=functional
        )
        for rollout, process in zip(rollouts, found, strict=True)
        if process is None or isinstance(process, list)
    ]
    return rewarded, [str(process) for process in found if isinstance(process, Unscored)]


def solves(problem: Problem, text: str, finish: str, answer_format: str = "boxed") -> bool:
    """Whether a response has the right answer; one that was cut off by its budget has none."""
    gold = str(problem.answer)
    return finish != "length" and grade(text, gold, problem.question, answer_format).correct


def graded(problem: Problem, text_of: Callable[[Sequence[Step]], str]) -> Value:
    """1 if the answer is right: training only, for it needs the gold answer."""
    if problem.answer is None:
        raise UserError(f"problem {problem.id} has no gold answer to search with.")
    gold = problem.answer

    async def value(steps: Sequence[Step]) -> float:
        if steps[-1].answer is None:  # cut off, or it never came to an answer
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
    """Grade a rollout and give every step its reward; one cut off by its budget has no answer.

    `text` is the decoded response; `process` holds (S,) scores in [0, 1], or None without a PRM.
    Whole segments can be asked only of a policy that speaks `functional` tokens.
    """
    if rollout.problem.answer is None:
        raise UserError(f"problem {rollout.problem.id} has no gold answer to reward against.")
    known, process = process is not None, process or [0.0] * len(rollout.acts)
    correct, answer = solves(rollout.problem, text, rollout.finish), rollout.answer
    malformed = functional and cfg.malformed_responses == "reject" and "" in rollout.acts
    if rollout.finish == "length" or malformed:
        correct, answer = False, None
    finish = finish_reward(cfg, correct, answer, process[-1] if known else None)
    if cfg.reward_function is not None:
        finish = own_reward(cfg.reward_function, rollout.problem, text)
    rewards = (*process[:-1], finish)
    if cfg.reward_scheme == "gain":
        rewards = tuple(after - before for before, after in pairwise((0.0, *rewards)))
    scores = tuple(process) if known else ()
    return replace(rollout, outcome=float(correct), step_rewards=rewards, step_scores=scores)


def finish_reward(cfg: RLConfig, correct: bool, answer: str | None, process: float | None) -> float:
    """What the last step earns; `process` is its own score, None without a PRM."""
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
    """What the user's function says. Raises UserError where that is not a finite number."""
    value = load_function("reward_function", function)(problem, text)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"reward_function returned {value!r} for problem {problem.id}, no number.")
    return float(value)
