"""Phase 1: an act is a prompt. An instruct model is asked to extend a solution, act by act.

Departure from the paper (arXiv 2502.13389): a child is asked for when it is chosen, not all
children of a node at once. The visited paths have the same distribution, and replies that no path
uses are never paid for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

from rftt.engines.base import Counters, Reply, Sampling
from rftt.engines.chat import Chat
from rftt.graders.math import extract
from rftt.mcts import Choice, Explore, Tree, grow
from rftt.prompts import Messages, ask, clip_reply, sentences
from rftt.rewards import graded
from rftt.tokens import FUNCTIONS, successors
from rftt.types import Problem, Step, seed_for


@dataclass(frozen=True)
class Prompted:
    """An instruct model that is asked for one act at a time."""

    chat: Chat
    temperature: float
    max_tokens: int
    max_depth: int
    max_direct_sentences: int
    seed: int
    spent: Counters = field(default_factory=Counters)
    """Replies and their tokens; each problem gets a copy of its own."""


def visible(steps: Sequence[Step]) -> str:
    """Return the solution so far, as the instruct model reads it."""
    return "\n".join(step.text for step in steps)


async def reply(ctx: Prompted, messages: Messages, act: str | None, *key: object) -> Reply:
    """Return one reply of the model, clipped to the limits of `act` unless that is None."""
    limit = min(FUNCTIONS[act].max_tokens, ctx.max_tokens) if act else ctx.max_tokens
    sampling = Sampling(limit, ctx.temperature, seed=seed_for(ctx.seed, *key))
    said = await ctx.chat(messages, sampling)
    ctx.spent.requests += said.n_prompt > 0  # 0: no room was left for a reply
    ctx.spent.generated_tokens += said.n_generated
    return replace(said, text=clip_reply(act, said.text)) if act else said


async def expand_prompted(ctx: Prompted, problem: Problem, choice: Choice) -> list[Step]:
    """Take the chosen act, then random allowed acts until a step states the final answer.

    A reply that is empty or cut off ends the path without an answer.
    """
    steps = [node.step for node in choice.node.path() if node.step]
    known = len(steps)  # these are in the tree already
    random = Random(seed_for(ctx.seed, problem.id, choice.key))
    acts = [choice.act]  # the first act is the tree's choice
    while acts:
        step, whole = await _child(ctx, problem, steps, acts, choice.key)
        steps.append(step)
        if step.answer is not None or not whole or not step.text or len(steps) >= ctx.max_depth:
            break
        acts = list(successors(step.act, "prompted"))
        random.shuffle(acts)  # later acts are random
    return steps[known:]


async def _child(
    ctx: Prompted, problem: Problem, steps: list[Step], acts: list[str], key: tuple[str, ...]
) -> tuple[Step, bool]:
    """Ask for the first of `acts` whose reply fits: long direct answers are skipped."""
    said, act = Reply("", whole=False), acts[0]
    for act in acts:
        messages = ask(act, problem.question, visible(steps))
        said = await reply(ctx, messages, act, problem.id, key, len(steps), act)
        if act != "direct_answer" or len(sentences(said.text)) <= ctx.max_direct_sentences:
            break
    states = said.whole and act in ("direct_answer", "next_step")
    return Step(act, said.text, answer=extract(said.text) if states else None), said.whole


async def prompted_tree(
    ctx: Prompted,
    problem: Problem,
    *,
    simulations: int,
    exploration_weight: float,
    in_flight: int,
    explore: Explore = grow,
) -> Tree:
    """Search with prompts; a leaf's value is the grader's verdict (arXiv 2502.13389)."""
    acts_after, seed = partial(successors, phase="prompted"), seed_for(ctx.seed, problem.id)
    tree = Tree(acts_after, ctx.max_depth, exploration_weight, seed)
    expand = partial(expand_prompted, ctx, problem)
    value = graded(problem, visible)
    await explore(tree, expand, value, simulations=simulations, in_flight=in_flight)
    return tree
