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
from rftt.prompts import question_messages
from rftt.rewards import solves
from rftt.rollout import Learned, encode_question, root_act_logprobs, sample
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


async def check_warm(ctx: Learned, problems: Sequence[Problem], system_prompt: str | None) -> None:
    """Raise UserError where the policy does not open its responses with functional tokens."""

    async def opened(problem: Problem) -> float:
        prompt = encode_question(ctx, problem, system_prompt)
        return sum(map(exp, (await root_act_logprobs(ctx, problem, prompt)).values()))

    share = fmean(await for_each(problems, opened, in_flight=len(problems)))
    if share < 0.5:
        raise UserError(
            f"{ctx.tokenizer.name_or_path} assigns {share:.3f} total probability to functional "
            "tokens at the root (expected > 0.5). Start from an SFT checkpoint (train_sft.py) or "
            "set allow_cold_start: true."
        )


def greedy_accuracy(cfg: RLConfig, policy: Learned, problems: list[Problem], world: World) -> float:
    """Share of the problems that greedy decoding solves, over all ranks."""
    greedy = replace(policy, temperature=0.0)

    async def one(problem: Problem) -> bool:
        prompt = encode_question(greedy, problem, cfg.system_prompt)
        (rollout,) = await sample(greedy, problem, prompt, n=1, group=0)
        text = decode(policy.tokenizer, rollout.response_ids)
        return solves(problem, text, rollout.finish)

    mine = problems[world.rank :: world.size]
    solved = asyncio.run(for_each(mine, one, in_flight=max(1, len(mine))))
    return world.sum(float(sum(solved))) / len(problems)
