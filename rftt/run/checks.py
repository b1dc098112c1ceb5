"""Check a run: whether prompts fit, whether the policy writes the acts, how accurate it is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from math import exp
from statistics import fmean
from typing import TYPE_CHECKING

from rftt.engines.base import for_each
from rftt.engines.chat import decode, encode_chat
from rftt.engines.sampler import Sampler, pose
from rftt.prompts import question_messages
from rftt.rewards import solves
from rftt.rollout import sample
from rftt.types import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.learner.fsdp import World
    from rftt.run.config import RLConfig


def check_prompts(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    system_prompt: str | None,
    max_model_len: int,
) -> None:
    """Raise UserError, before the run, if a question leaves no room for a response."""
    long = [
        problem.id
        for problem in dict.fromkeys(problems)
        if len(encode_chat(tokenizer, question_messages(problem.question, system_prompt)))
        >= max_model_len - 1
    ]
    if long:
        raise UserError(
            f"{len(long)} prompts do not fit max_model_len={max_model_len}: problems "
            f"{', '.join(long[:5])}{' …' * (len(long) > 5)}; raise it or leave them out."
        )


def check_warm(cfg: RLConfig, sampler: Sampler, problems: Sequence[Problem]) -> None:
    """Raise UserError if a tree's policy does not begin its responses with functional tokens.

    `allow_cold_start` skips the check.
    """
    if cfg.sampling_method == "normal" or cfg.allow_cold_start:
        return

    async def opened(problem: Problem) -> float:
        task = pose(sampler, problem, cfg.system_prompt)
        return sum(map(exp, (await task.log_priors((), "root")).values()))

    share = fmean(asyncio.run(for_each(problems, opened, in_flight=len(problems))))
    if share < 0.5:
        raise UserError(
            f"{sampler.tokenizer.name_or_path} assigns {share:.3f} total probability to functional "
            "tokens at the root (expected > 0.5). Start from an SFT checkpoint (train_sft.py) or "
            "set allow_cold_start: true."
        )


def greedy_accuracy(
    cfg: RLConfig, sampler: Sampler, problems: list[Problem], world: World
) -> float:
    """Return the share of the problems that greedy decoding solves, over all ranks."""
    greedy = replace(sampler, temperature=0.0)

    async def one(problem: Problem) -> bool:
        [rollout] = await sample(pose(greedy, problem, cfg.system_prompt), n=1)
        text = decode(sampler.tokenizer, rollout.response_ids)
        return solves(problem, text, rollout.finish)

    mine = problems[world.rank :: world.size]
    solved = asyncio.run(for_each(mine, one, in_flight=max(1, len(mine))))
    return world.sum(float(sum(solved))) / len(problems)
