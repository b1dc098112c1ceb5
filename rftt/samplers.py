"""Samplers: one problem in, its rollouts or its tree out; thousands run at once.

Every sampler is a coroutine that reads like the textbook for ONE problem; the engine batches.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate
from math import exp
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rftt.graders.math import canonical, grade
from rftt.graders.prm import ProcessModel, Unscored, reduce, score_paths, segment_text
from rftt.mcts import Choice, Node, Tree, Value, grow
from rftt.rollout import (
    Learned,
    Prompted,
    cut,
    expand_learned,
    expand_prompted,
    root_act_logprobs,
    visible,
    whole,
    with_answer,
)
from rftt.run.data import decode, encode_chat, question_messages
from rftt.tokens import successors
from rftt.types import Problem, Rollout, Step, UserError, seed_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
R = TypeVar("R")
Explore = Callable[..., Awaitable[None]]
"""How a tree grows: `grow` (mcts.py), or beam.py's with its width bound; same arguments."""


async def for_each(
    items: Sequence[T], work: Callable[[T], Awaitable[R]], *, in_flight: int
) -> list[R]:
    """Await `work` on every item, at most `in_flight` at once; results keep the order of the items.

    The first failure cancels the others and is raised as it is.
    """
    gate = asyncio.Semaphore(in_flight)

    async def guarded(item: T) -> R:
        async with gate:
            return await work(item)

    tasks = [asyncio.create_task(guarded(item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


# ---- Values of a finished path ----


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


def agreement() -> Value:
    """Share of the answers found so far in this tree that agree with this path's (inference)."""
    found: Counter[str] = Counter()

    async def value(steps: Sequence[Step]) -> float:
        answer = steps[-1].answer
        if answer is None:
            return 0.0
        found[canonical(answer)] += 1
        return found[canonical(answer)] / found.total()

    return value


def processed(
    ctx: Learned, prm: ProcessModel, problem: Problem, how: Literal["min", "mean", "last", "prod"]
) -> Value:
    """What a process reward model thinks of an answered path; of one that it refuses, nothing."""

    async def value(steps: Sequence[Step]) -> float:
        if steps[-1].answer is None:
            return 0.0
        texts = [segment_text(ctx.tokenizer, step.token_ids, ctx.ids) for step in steps]
        try:
            return reduce(await prm.score(problem.question, texts), how)
        except Unscored:
            return 0.0

    return value


# ---- Phase 1 ----


async def prompted_tree(
    ctx: Prompted,
    problem: Problem,
    *,
    simulations: int,
    exploration_weight: float,
    in_flight: int,
    explore: Explore = grow,
) -> Tree:
    """Functional tree search with prompts; leaf value = the grader's verdict (PAPER §1)."""
    acts_after, seed = partial(successors, phase="prompted"), seed_for(ctx.seed, problem.id)
    tree = Tree(acts_after, ctx.max_depth, exploration_weight, seed)
    expand = partial(expand_prompted, ctx, problem)
    value = graded(problem, visible)
    await explore(tree, expand, value, simulations=simulations, in_flight=in_flight)
    return tree


async def score_steps(prm: ProcessModel, tree: Tree, problem: Problem) -> int:
    """A process score on every step of a prompted tree; returns how many paths `prm` refuses.

    Steps that paths share get one score: it tells of a step and what stands before it.
    """
    paths = [[node for node in leaf.path() if node.step] for leaf in tree.leaves()]
    texts = [[node.step.text for node in path if node.step] for path in paths]
    found = await score_paths(prm, [(problem.question, steps) for steps in texts])
    for path, scores in zip(paths, found, strict=True):
        for node, score in zip(path, [] if isinstance(scores, Unscored) else scores, strict=False):
            node.step = replace(node.step, score=score) if node.step else None
    return sum(isinstance(scores, Unscored) for scores in found)


# ---- Phase 2, and evaluation ----


async def learned_tree(
    ctx: Learned,
    problem: Problem,
    prompt: list[int],
    *,
    simulations: int,
    exploration_weight: float,
    in_flight: int,
    explore: Explore = grow,
    value: Value | None = None,
) -> Tree:
    """Tree over functional tokens. Without `value` the gold answer is, or agreement, if hidden."""
    seed = seed_for(ctx.seed, problem.id)
    tree = Tree(ctx.acts_after, ctx.max_depth, exploration_weight, seed)
    tree.act_logprobs = await root_act_logprobs(ctx, problem, prompt)

    async def expand(choice: Choice) -> list[Step]:
        opener_logprob = tree.priors(choice.node)[choice.act]
        return await expand_learned(ctx, problem, prompt, choice, opener_logprob)

    def text_of(steps: Sequence[Step]) -> str:
        return decode(ctx.tokenizer, [token for step in steps for token in step.token_ids])

    if value is None:
        value = agreement() if problem.answer is None else graded(problem, text_of)
    await explore(tree, expand, value, simulations=simulations, in_flight=in_flight)
    return tree


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


def tree_rollouts(
    ctx: Learned, tree: Tree, problem: Problem, prompt: list[int], *, group: int, mask_forced: bool
) -> list[Rollout]:
    """One rollout per leaf, in the order in which they were found."""
    rollouts: list[Rollout] = []
    newest = 0  # nodes up to here were paid for by earlier rollouts
    for leaf in tree.leaves():
        path = [(node.id, node.step) for node in leaf.path() if node.step]
        rollout = _rollout(
            ctx, problem, prompt, [step for _, step in path], group=group, mask_forced=mask_forced
        )
        n_new = sum(len(step.token_ids) - step.forced for id, step in path if id > newest)
        nodes = tuple(id for id, _ in path)
        rollouts.append(replace(rollout, n_generated=n_new, nodes=nodes))
        newest = leaf.id
    return rollouts


async def sample(
    ctx: Learned, problem: Problem, prompt: list[int], *, n: int, group: int
) -> list[Rollout]:
    """`n` independent responses: the plain alternative to the tree."""

    async def one(i: int) -> Rollout:
        sampling = ctx.sampling(ctx.room(len(prompt), 0), problem.id, i)
        steps = with_answer(ctx, [], cut(await ctx.engine.generate(prompt, sampling), ctx.ids))
        return _rollout(ctx, problem, prompt, steps, group=group, mask_forced=False)

    return list(await asyncio.gather(*map(one, range(n))))


def tree_record(
    tree: Tree, problem: Problem, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """The tree as JSON: what a reader, a picture or a test wants to know of each node."""

    def prior(node: Node) -> float | None:
        """π(act | parent); None where nobody knows it (phase 1)."""
        known = tree.priors(node.parent) if node.parent else {}
        return exp(known[node.act]) if node.act in known else None

    def text(step: Step) -> str:
        return decode(tokenizer, step.token_ids) if tokenizer else step.text

    nodes = [
        {
            "id": node.id,
            "parent": node.parent.id if node.parent else None,
            "act": node.act,
            "text": text(node.step) if node.step else "",
            "visits": node.visits,
            "q": node.q,
            "prior": prior(node),
            "score": node.step.score if node.step else None,
            "answer": node.step.answer if node.step else None,
            "terminal": node.terminal,
        }
        for node in tree.nodes
    ]
    return {"problem": asdict(problem), "nodes": nodes}


def _rollout(
    ctx: Learned,
    problem: Problem,
    prompt: list[int],
    steps: Sequence[Step],
    *,
    group: int,
    mask_forced: bool,
) -> Rollout:
    tokens = [token for step in steps for token in step.token_ids]
    forced = tuple(step.forced and i == 0 for step in steps for i in range(len(step.token_ids)))
    return Rollout(
        problem=problem,
        prompt_ids=tuple(prompt),
        response_ids=tuple(tokens),
        sampling_logprobs=tuple(logprob for step in steps for logprob in step.logprobs),
        action_mask=tuple(not (mask_forced and opener) for opener in forced),
        forced=forced,
        step_ends=tuple(end - 1 for end in accumulate(len(step.token_ids) for step in steps)),
        acts=tuple(step.act if whole(step, ctx.ids) else "" for step in steps),
        finish="stop" if tokens[-1] in ctx.stops else "length",
        group=group,
        n_generated=len(tokens),
        answer=steps[-1].answer,
    )


def check_prompts(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    system_prompt: str | None,
    max_model_len: int,
) -> None:
    """Before the run: raise UserError where a question leaves no room for a response."""
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


def encode_question(ctx: Learned, problem: Problem, system_prompt: str | None) -> list[int]:
    """The prompt of a policy: the question, and nothing else."""
    prompt = encode_chat(ctx.tokenizer, question_messages(problem.question, system_prompt))
    if ctx.room(len(prompt), 1) <= 0:
        raise UserError(
            f"problem {problem.id} has {len(prompt)} prompt tokens; max_model_len is "
            f"{ctx.engine.max_model_len}."
        )
    return prompt
