"""Outcome and process -> one reward per step (PAPER §1). The last step of a rollout is its finish.

A reward is never invented: without a process reward model a step earns 0; a rollout that the model
refuses is left out and counted; a model that is down stops the round (rewards/prm.py).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal

from rftt.cli import load_function
from rftt.data import decode
from rftt.rewards.grader import grade
from rftt.rewards.prm import ProcessModel, Unscored, score_paths, segment_text
from rftt.schema import Problem, Rollout, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.config import RLConfig
    from rftt.functions import FunctionIds


@dataclass(frozen=True)
class RewardScheme:
    correct: float
    """The answer is right."""
    wrong: float
    """There is an answer, and it is wrong."""
    no_answer: float
    """The response ended without one. With a PRM its last step earns its own score instead."""
    kind: Literal["paper", "blend", "gain"] = "paper"
    """What a process score does to a step's reward: config.py says."""
    whole_segments: bool = False
    """A response with text outside its segments has no answer, whatever it says."""
    custom: Callable[[Problem, str], object] | None = None
    """The user's own: what the last step earns, instead of all of the above."""


def scheme_of(cfg: RLConfig, *, functional: bool) -> RewardScheme:
    """What a run pays for; whole segments can be asked only of who speaks `functional` tokens."""
    return RewardScheme(
        correct=cfg.correct_reward,
        wrong=cfg.wrong_reward,
        no_answer=cfg.no_answer_reward,
        kind=cfg.reward_scheme,
        whole_segments=cfg.malformed_responses == "reject" and functional,
        custom=load_function("reward_function", own) if (own := cfg.reward_function) else None,
    )


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
    scheme = scheme_of(cfg, functional=ids is not None)
    paths = [(r.problem.question, step_texts(r, tokenizer, ids)) for r in rollouts]
    found = await score_paths(prm, paths) if prm else [None] * len(rollouts)
    rewarded = [
        score(rollout, decode(tokenizer, rollout.response_ids), scheme, process)
        for rollout, process in zip(rollouts, found, strict=True)
        if process is None or isinstance(process, list)
    ]
    return rewarded, [str(process) for process in found if isinstance(process, Unscored)]


def step_texts(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, ids: FunctionIds | None
) -> list[str]:
    """What a process reward model reads of each step."""
    return [segment_text(tokenizer, step, ids) for step in rollout.step_ids()]


def solves(problem: Problem, text: str, finish: str, answer_format: str = "boxed") -> bool:
    """Whether a response has the right answer; one that was cut off by its budget has none."""
    gold = str(problem.answer)
    return finish != "length" and grade(text, gold, problem.question, answer_format).correct


def score(
    rollout: Rollout, text: str, scheme: RewardScheme, process: Sequence[float] | None = None
) -> Rollout:
    """Grade a rollout and give every step its reward; one cut off by its budget has no answer.

    `text` is the decoded response; `process` holds (S,) scores in [0, 1], or None without a PRM.
    """
    if rollout.problem.answer is None:
        raise UserError(f"problem {rollout.problem.id} has no gold answer to reward against.")
    known, process = process is not None, process or [0.0] * len(rollout.acts)
    correct, answer = solves(rollout.problem, text, rollout.finish), rollout.answer
    if rollout.finish == "length" or (scheme.whole_segments and "" in rollout.acts):
        correct, answer = False, None
    finish = finish_reward(correct, answer, process[-1] if known else None, scheme)
    if scheme.custom is not None:
        finish = own_reward(scheme.custom, rollout.problem, text)
    rewards = (*process[:-1], finish)
    if scheme.kind == "gain":
        rewards = tuple(after - before for before, after in pairwise((0.0, *rewards)))
    scores = tuple(process) if known else ()
    return replace(rollout, outcome=float(correct), step_rewards=rewards, step_scores=scores)


def finish_reward(
    correct: bool, answer: str | None, process: float | None, scheme: RewardScheme
) -> float:
    """What the last step earns; `process` is its own score, None without a PRM."""
    if scheme.kind == "blend":
        return 0.6 * correct + 0.4 * (process or 0.0)
    if correct:
        return scheme.correct
    if answer is not None:
        return scheme.wrong
    return process if process is not None and scheme.kind == "paper" else scheme.no_answer


def own_reward(function: Callable[[Problem, str], object], problem: Problem, text: str) -> float:
    """What the user's function says. Raises UserError where that is not a finite number."""
    value = function(problem, text)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"reward_function returned {value!r} for problem {problem.id}, no number.")
    return float(value)
