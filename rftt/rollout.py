"""From a tree's choice to the steps that follow it: by prompts (phase 1) or by tokens (phase 2).

Departures from the paper (PAPER §1):
1. Phase 1 asks for a child when it is chosen, not for all children of a node at once: the visited
   paths have the same distribution, and replies that no path uses are never paid for.
2. Phase 2, mode `free`: one request per rollout. The tree forces the opener, then the policy runs
   to `</output>` and chooses every later act itself, so that rollouts stay samples of the policy.
   The priors of all nodes passed come out of the same request. Mode `stepwise` is the paper's: one
   request per act, and each later act is the policy's most likely one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING

from rftt.engines.base import Counters
from rftt.graders.math import extract
from rftt.mcts import Choice
from rftt.run.data import decode, eos_id
from rftt.tokens import (
    ACTS,
    FUNCTIONS,
    FunctionIds,
    Messages,
    ask,
    clip_reply,
    parse,
    sentences,
    successors,
)
from rftt.types import Completion, Problem, Reply, Sampling, Step, seed_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.engines import Chat
    from rftt.engines.base import Engine
    from rftt.run.config import EvalConfig, RLConfig


# ---- Phase 1: prompts ----


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
    """Replies and their tokens, of the problem that a copy of this works on."""


def visible(steps: Sequence[Step]) -> str:
    """The solution so far as the instruct model reads it."""
    return "\n".join(step.text for step in steps)


async def reply(ctx: Prompted, messages: Messages, act: str | None, *key: object) -> Reply:
    """One answer of the model, kept to the act's limits where it is one act's (None: it is not)."""
    limit = min(FUNCTIONS[act].max_tokens, ctx.max_tokens) if act else ctx.max_tokens
    sampling = Sampling(limit, ctx.temperature, seed=seed_for(ctx.seed, *key))
    said = await ctx.chat(messages, sampling)
    ctx.spent.requests += said.n_prompt > 0  # else the messages left no room for a reply
    ctx.spent.generated_tokens += said.n_generated
    return replace(said, text=clip_reply(act, said.text)) if act else said


async def expand_prompted(ctx: Prompted, problem: Problem, choice: Choice) -> list[Step]:
    """The chosen act, then random acts of the grammar until a step states the final answer.

    A reply that is empty or cut off ends the path without an answer.
    """
    steps = [node.step for node in choice.node.path() if node.step]
    known = len(steps)
    random = Random(seed_for(ctx.seed, problem.id, choice.key))
    acts = [choice.act]
    while acts:
        step, whole = await _child(ctx, problem, steps, acts, choice.key)
        steps.append(step)
        if step.answer is not None or not whole or not step.text or len(steps) >= ctx.max_depth:
            break
        acts = list(successors(step.act, "prompted"))
        random.shuffle(acts)
    return steps[known:]


async def _child(
    ctx: Prompted, problem: Problem, steps: list[Step], acts: list[str], key: tuple[str, ...]
) -> tuple[Step, bool]:
    """A reply to the first of `acts` that will do: direct answers that run long are passed over."""
    said, act = Reply("", whole=False), acts[0]
    for act in acts:
        messages = ask(act, problem.question, visible(steps))
        said = await reply(ctx, messages, act, problem.id, key, len(steps), act)
        if act != "direct_answer" or len(sentences(said.text)) <= ctx.max_direct_sentences:
            break
    states = said.whole and act in ("direct_answer", "next_step")
    return Step(act, said.text, answer=extract(said.text) if states else None), said.whole


# ---- Phase 2: functional tokens ----


@dataclass(frozen=True)
class Learned:
    """A policy that speaks functional tokens. `ids` is None for one that does not (plain CoT)."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    ids: FunctionIds | None
    temperature: float
    max_tokens: int
    """Of a whole response."""
    max_depth: int
    seed: int
    stepwise: bool = False
    answer_format: str = "boxed"
    forbidden: tuple[str, ...] = ()
    """Acts that neither the policy nor a tree may open."""
    children_per_act: int = 1

    @property
    def functions(self) -> FunctionIds:
        assert self.ids is not None, "a tree over functional tokens needs them"
        return self.ids

    def acts_after(self, act: str | None) -> tuple[str, ...]:
        """What a tree may try below a step by `act` (None: the root), as often as it is here."""
        allowed = tuple(a for a in successors(act, "learned") if a not in self.forbidden)
        return allowed * self.children_per_act

    def room(self, n_prompt: int, n_used: int) -> int:
        """Tokens that the response may still take."""
        return min(self.max_tokens, self.engine.max_model_len - n_prompt) - n_used

    @property
    def stops(self) -> tuple[int, ...]:
        """A response ends with one of these."""
        eos = eos_id(self.tokenizer)
        return (self.ids.end, eos) if self.ids else (eos,)

    def sampling(self, max_tokens: int, *key: object) -> Sampling:
        return Sampling(
            max_tokens,
            self.temperature,
            seed=seed_for(self.seed, *key),
            stop_ids=self.stops,
            banned_ids=tuple(self.functions.open[act] for act in self.forbidden),
            watch_ids=self.ids.openers if self.ids else (),
            watch_after=self.ids.closers if self.ids else (),
        )


def speaker(
    cfg: RLConfig | EvalConfig,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    ids: FunctionIds | None,
    *,
    stepwise: bool = False,
    answer_format: str = "boxed",
) -> Learned:
    """The policy of a run, as its config wants it sampled."""
    return Learned(
        engine=engine,
        tokenizer=tokenizer,
        ids=ids,
        temperature=cfg.temperature,
        max_tokens=cfg.max_completion_length,
        max_depth=cfg.search_depth,
        seed=cfg.seed,
        stepwise=stepwise,
        answer_format=answer_format,
        forbidden=tuple(cfg.forbidden_acts),
        children_per_act=cfg.children_per_act,
    )


async def root_act_logprobs(ctx: Learned, problem: Problem, prompt: list[int]) -> dict[str, float]:
    """log π(act | question), for the first choice of a tree: one token, sampled in vain."""
    completion = await ctx.engine.generate(prompt, ctx.sampling(1, problem.id, "root"))
    return dict(zip(ACTS, completion.watched[0], strict=True))


async def expand_learned(
    ctx: Learned, problem: Problem, prompt: list[int], choice: Choice, opener_logprob: float
) -> list[Step]:
    """Force the chosen opener and let the policy finish the response."""
    before = [token for node in choice.node.path() if node.step for token in node.step.token_ids]
    explore = _stepwise if ctx.stepwise else _free
    steps = await explore(ctx, (problem.id, choice.key), prompt, before, choice, opener_logprob)
    return with_answer(ctx, before, steps)


def with_answer(ctx: Learned, before: list[int], steps: list[Step]) -> list[Step]:
    """The same steps; the last one knows the answer of the response, if that came to its end."""
    text = decode(ctx.tokenizer, [*before, *(t for step in steps for t in step.token_ids)])
    ended = steps[-1].token_ids[-1] in ctx.stops
    answer = extract(text, ctx.answer_format) if ended else None
    return [*steps[:-1], replace(steps[-1], answer=answer)]


def whole(step: Step, ids: FunctionIds | None) -> bool:
    """Whether the step is a segment from its opener to its own closer."""
    return ids is not None and step.act != "" and step.token_ids[-1] == ids.close[step.act]


async def _free(
    ctx: Learned,
    key: tuple[object, ...],
    prompt: list[int],
    before: list[int],
    choice: Choice,
    opener_logprob: float,
) -> list[Step]:
    """One request: the policy runs to the end of its response."""
    opener = ctx.functions.open[choice.act]
    budget = ctx.room(len(prompt), len(before) + 1)
    if budget <= 0:
        return [Step(choice.act, "", (opener,), (opener_logprob,), forced=True)]
    completion = await ctx.engine.generate([*prompt, *before, opener], ctx.sampling(budget, *key))
    return cut(completion, ctx.functions, opener, opener_logprob)


async def _stepwise(
    ctx: Learned,
    key: tuple[object, ...],
    prompt: list[int],
    before: list[int],
    choice: Choice,
    opener_logprob: float,
) -> list[Step]:
    """One request per act; each later act is the most likely one that the grammar allows.

    No opener is the policy's own draw then, so all of them count as forced.
    """
    ids, act, steps, used = ctx.functions, choice.act, [], list(before)
    stops = (*ids.closers, *ids.openers, eos_id(ctx.tokenizer))
    while (budget := ctx.room(len(prompt), len(used) + 1)) > 0:
        sampling = replace(ctx.sampling(budget, *key, len(steps)), stop_ids=stops)
        completion = await ctx.engine.generate([*prompt, *used, ids.open[act]], sampling)
        (step,) = cut(completion, ids, ids.open[act], opener_logprob)
        steps.append(step)
        used += step.token_ids
        depth = choice.node.depth + len(steps)
        if step.token_ids[-1] != ids.close[act] or act == "output" or depth >= ctx.max_depth:
            break
        if ctx.room(len(prompt), len(used)) <= 0 or not ctx.acts_after(act):
            break
        peek = await ctx.engine.generate([*prompt, *used], ctx.sampling(1, *key, len(steps), "act"))
        act_logprobs = dict(zip(ACTS, peek.watched[0], strict=True))
        steps[-1] = replace(steps[-1], act_logprobs=act_logprobs)
        act = max(ctx.acts_after(act), key=act_logprobs.__getitem__)
        opener_logprob = act_logprobs[act]
    return steps or [Step(act, "", (ids.open[act],), (opener_logprob,), forced=True)]


def cut(
    completion: Completion,
    ids: FunctionIds | None,
    opener: int | None = None,
    opener_logprob: float = 0.0,
) -> list[Step]:
    """Cut a completion (behind a forced opener, if any) into steps, with the priors between them.

    What belongs to no whole segment becomes one last step; its act is "" unless the tree forced it.
    """
    forced = opener is not None
    tokens = ((opener,) if opener is not None else ()) + completion.token_ids
    logprobs = ((opener_logprob,) if forced else ()) + completion.logprobs
    spans, covered = parse(tokens, ids) if ids else ([], 0)
    pieces = [(span.act, span.start, span.stop) for span in spans]
    if covered < len(tokens):
        act = ACTS[ids.openers.index(opener)] if ids and opener is not None and not spans else ""
        pieces.append((act, covered, len(tokens)))
    return [
        Step(
            act,
            "",
            tokens[start:stop],
            logprobs[start:stop],
            forced=forced and start == 0,
            act_logprobs=dict(zip(ACTS, completion.watched.get(stop - forced, ()), strict=False)),
        )
        for act, start, stop in pieces
    ]
