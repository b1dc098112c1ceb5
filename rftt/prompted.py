"""Phase 1: an act is a prompt. An instruct model is asked to extend a solution, act by act.

Departure from the paper (arXiv 2502.13389): a child is asked for when it is chosen, not all
children of a node at once. The visited paths have the same distribution, and replies that no path
uses are never paid for.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

from rftt.engines.base import Counters, Reply, Sampling
from rftt.engines.chat import Chat
from rftt.engines.lanes import Meter
from rftt.graders.math import extract
from rftt.mcts import Choice, Explore, Tree, grow
from rftt.prompts import Messages, Prompts, sentences
from rftt.rewards import graded
from rftt.run.contract import breach, clean, fresh, leaks, misquotes, trimmed
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
    prompts: Prompts
    contract_tries: int
    """Replies asked for, each with another seed, until one keeps its act's contract."""
    control: Callable[[str], bool]  # finds control text, which no step may contain
    continues: bool = False
    """Whether the chat continues a reply that the messages begin, which an API cannot."""
    spent: Counters = field(default_factory=Counters)
    """Replies and their tokens; each problem gets a copy of its own."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Refused replies by `contract_<act>_<reason>`; each problem gets a copy of its own."""
    meter: Meter | None = None  # counts the tokens of a simulation, if a local engine samples them

    def breach(self, act: str, problem: Problem, so_far: str, text: str) -> str | None:
        """Return the reason for which `text` breaks its act's contract, or None."""
        return breach(self.prompts, act, text, self.control, problem.question, so_far)


def visible(steps: Sequence[Step]) -> str:
    """Return the solution so far, as the instruct model reads it."""
    return "\n".join(step.text for step in steps)


async def reply(ctx: Prompted, messages: Messages, act: str | None, *key: object) -> Reply:
    """Return one reply of the model; unless `act` is None, clean and within the act's limits."""
    limit = min(FUNCTIONS[act].max_tokens, ctx.max_tokens) if act else ctx.max_tokens
    sampling = Sampling(limit, ctx.temperature, seed=seed_for(ctx.seed, *key), meter=ctx.meter)
    said = await ctx.chat(messages, sampling)
    ctx.spent.requests += said.n_prompt > 0  # 0: no room was left for a reply
    ctx.spent.generated_tokens += said.n_generated
    if act is None:
        return said
    text = clean(ctx.prompts, act, said.text)
    # A truncated reply is whole again where cleaning has removed its end.
    whole = said.whole or not said.text.rstrip().endswith(text)
    return replace(said, text=text, whole=whole)


async def expand_prompted(ctx: Prompted, problem: Problem, choice: Choice) -> list[Step]:
    """Take the chosen act, then random allowed acts until a step states the final answer.

    The path ends without an answer if no act that may follow gives a fit reply.
    """
    ctx = replace(ctx, meter=choice.meter)
    steps = [node.step for node in choice.node.path() if node.step]
    known = len(steps)  # these are in the tree already
    random = Random(seed_for(ctx.seed, problem.id, choice.key))
    acts = [choice.act]  # the first act is the tree's choice
    while acts:
        step = await _child(ctx, problem, steps, acts, choice.key)
        steps.append(step)
        if step.answer is not None or step.refused or len(steps) >= ctx.max_depth:
            break
        acts = list(successors(step.act, "prompted"))
        random.shuffle(acts)  # later acts are random
    return steps[known:]


async def _child(
    ctx: Prompted, problem: Problem, steps: list[Step], acts: list[str], key: tuple[str, ...]
) -> Step:
    """Ask for the first of `acts` whose reply fits; if none does, return the last one's.

    Refused replies are passed over, and so are long direct answers.
    """
    step = Step("", "")
    for act in acts:
        step = await _ask_step(ctx, problem, visible(steps), act, key, len(steps))
        long = act == "direct_answer" and len(sentences(step.text)) > ctx.max_direct_sentences
        if step.refused is None and not long:
            break
    return step


async def _ask_step(ctx: Prompted, problem: Problem, so_far: str, act: str, *key: object) -> Step:
    """Ask for one act, up to `contract_tries` times, until a reply keeps its contract."""
    messages = ctx.prompts.ask(act, problem.question, so_far, continues=ctx.continues)
    refused = partial(ctx.breach, act, problem, so_far)
    text, reason = "", None
    for number in range(ctx.contract_tries):
        said = await reply(ctx, messages, act, problem.id, *key, act, number)
        text, reason = trimmed(fresh(said.text, so_far), refused, whole=said.whole)
        if reason is None:
            break
        ctx.refusals[f"contract_{act}_{reason}"] += 1
    states = act in ("direct_answer", "next_step") and reason is None
    return Step(act, text, answer=extract(text) if states else None, refused=reason)


async def draw(
    ctx: Prompted, problem: Problem, act: str, so_far: str, *, n: int, **parts: str
) -> list[str]:
    """Return those of `n` replies to `act` that keep its contract and do not leak the gold answer.

    `parts` fill the act's template (prompts.yaml). The gold answer may be named only where the
    model's own solution contains it: the `correct` steps do not count. Each reply is cut where it
    breaks the contract.
    """
    messages = ctx.prompts.ask(act, problem.question, so_far, parts)
    shown = "\n".join([so_far, *parts.values()])
    own = [text for name, text in parts.items() if name != "correct"]
    known = "\n".join([problem.question, so_far, *own])

    def refused(text: str) -> str | None:
        reason = ctx.breach(act, problem, shown, text)
        if reason is None and leaks(text, str(problem.answer), known):
            return "leaks_answer"  # it would teach recall instead of checking
        if reason is None and misquotes(ctx.prompts.acts[act], text, "\n".join([so_far, *own])):
            return "misquotes"
        return reason

    asked = [reply(ctx, messages, act, problem.id, "curate", act, i) for i in range(n)]
    kept: list[str] = []
    for said in await asyncio.gather(*asked):
        text, reason = trimmed(said.text, refused, whole=said.whole)
        if reason is None:
            kept.append(text)
        else:
            ctx.refusals[f"contract_{act}_{reason}"] += 1
    return kept


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
