"""Phase 2: an act is a token. Trees and plain samples of a policy -> rollouts to learn from.

Every search is a coroutine that reads like the textbook for ONE problem; the engine batches.
Departure from the paper (arXiv 2502.13389): in mode `free` a rollout is one request. The tree
forces the opener, then the policy runs to `</output>` and chooses every later act itself, so that
rollouts stay samples of the policy. The same request returns the priors of all nodes on the path.
Mode `stepwise` is the paper's: one request per act, and each later act is the policy's most likely.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from rftt.engines.base import Sampling, for_each
from rftt.engines.chat import decode, encode_chat, eos_id
from rftt.graders.math import canonical, extract
from rftt.mcts import Choice, Explore, Tree, Value, grow
from rftt.prompts import question_messages
from rftt.rewards import graded
from rftt.tokens import ACTS, FunctionIds, parse_response, successors
from rftt.types import Completion, Problem, Rollout, Step, UserError, seed_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.engines.base import Engine
    from rftt.run.config import EvalConfig, RLConfig


@dataclass(frozen=True)
class Learned:
    """How a policy is sampled. `ids` is None for a policy without functional tokens (plain CoT)."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    ids: FunctionIds | None
    temperature: float
    max_tokens: int
    """Budget of a whole response."""
    max_depth: int
    seed: int
    stepwise: bool = False
    answer_format: str = "boxed"
    forbidden: tuple[str, ...] = ()
    """Acts that neither the policy nor a tree may begin."""
    children_per_act: int = 1

    @property
    def functions(self) -> FunctionIds:
        assert self.ids is not None, "a tree over functional tokens needs them"
        return self.ids

    def acts_after(self, act: str | None) -> tuple[str, ...]:
        """Return the acts to try below a step by `act` (None: the root), repeated if allowed."""
        allowed = tuple(a for a in successors(act, "learned") if a not in self.forbidden)
        return allowed * self.children_per_act

    def room(self, n_prompt: int, n_used: int) -> int:
        """Return how many tokens the response may still take."""
        return min(self.max_tokens, self.engine.max_model_len - n_prompt) - n_used

    @property
    def stops(self) -> tuple[int, ...]:
        """Token ids that end a response."""
        eos = eos_id(self.tokenizer)
        return (self.ids.end, eos) if self.ids else (eos,)

    def sampling(self, max_tokens: int, *key: object) -> Sampling:
        return Sampling(
            max_tokens,
            self.temperature,
            seed=seed_for(self.seed, *key),
            stop_ids=self.stops,
            banned_ids=tuple(self.functions.open[act] for act in self.forbidden),
            watch_ids=self.ids.openers if self.ids else (),  # their log-probs are the priors
            watch_after=self.ids.closers if self.ids else (),  # an act may begin behind these
        )


def sampler_of(
    cfg: RLConfig | EvalConfig,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    ids: FunctionIds | None,
    *,
    stepwise: bool = False,
    answer_format: str = "boxed",
) -> Learned:
    """Return how a run samples its policy."""
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
    """Return log π(act | question), the priors at the root. The one sampled token is not used."""
    completion = await ctx.engine.generate(prompt, ctx.sampling(1, problem.id, "root"))  # one token
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
    """Return the same steps, with the response's answer on the last one if the response ended."""
    text = decode(ctx.tokenizer, [*before, *(t for step in steps for t in step.token_ids)])
    ended = steps[-1].token_ids[-1] in ctx.stops  # a truncated response has no answer
    answer = extract(text, ctx.answer_format) if ended else None
    return [*steps[:-1], replace(steps[-1], answer=answer)]


def whole(step: Step, ids: FunctionIds | None) -> bool:
    """Return whether the step is a segment from its opener to its own closer."""
    return ids is not None and step.act != "" and step.token_ids[-1] == ids.close[step.act]


async def _free(
    ctx: Learned,
    key: tuple[object, ...],
    prompt: list[int],
    before: list[int],
    choice: Choice,
    opener_logprob: float,
) -> list[Step]:
    """Send one request: the policy runs to the end of its response."""
    opener = ctx.functions.open[choice.act]
    budget = ctx.room(len(prompt), len(before) + 1)  # one token is the forced opener
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
    """Send one request per act; each later act is the most likely one that the grammar allows.

    The policy draws no opener itself, so all of them count as forced.
    """
    ids, act, steps, used = ctx.functions, choice.act, [], list(before)
    stops = (*ids.closers, *ids.openers, eos_id(ctx.tokenizer))  # one act ends with any of these
    while (budget := ctx.room(len(prompt), len(used) + 1)) > 0:
        sampling = replace(ctx.sampling(budget, *key, len(steps)), stop_ids=stops)
        completion = await ctx.engine.generate([*prompt, *used, ids.open[act]], sampling)
        (step,) = cut(completion, ids, ids.open[act], opener_logprob)
        steps.append(step)
        used += step.token_ids  # the next act reads this one
        depth = choice.node.depth + len(steps)  # of the node that this step becomes
        if step.token_ids[-1] != ids.close[act] or act == "output" or depth >= ctx.max_depth:
            break
        if ctx.room(len(prompt), len(used)) <= 0 or not ctx.acts_after(act):
            break
        peek = await ctx.engine.generate([*prompt, *used], ctx.sampling(1, *key, len(steps), "act"))
        act_logprobs = dict(zip(ACTS, peek.watched[0], strict=True))
        steps[-1] = replace(steps[-1], act_logprobs=act_logprobs)
        act = max(ctx.acts_after(act), key=act_logprobs.__getitem__)  # greedy, as in the paper
        opener_logprob = act_logprobs[act]
    return steps or [Step(act, "", (ids.open[act],), (opener_logprob,), forced=True)]


def cut(
    completion: Completion,
    ids: FunctionIds | None,
    opener: int | None = None,
    opener_logprob: float = 0.0,
) -> list[Step]:
    """Cut a completion (behind a forced opener, if any) into steps, with the priors between them.

    Text outside whole segments becomes one last step. Its act is "" unless the tree forced it.
    """
    forced = opener is not None
    tokens = ((opener,) if opener is not None else ()) + completion.token_ids
    logprobs = ((opener_logprob,) if forced else ()) + completion.logprobs
    spans, covered = parse_response(tokens, ids) if ids else ([], 0)  # whole segments first
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


# ---- From trees and samples to rollouts ----


def agreement() -> Value:
    """Return a value for inference: how many of the answers so far agree with the path's."""
    found: Counter[str] = Counter()

    async def value(steps: Sequence[Step]) -> float:
        answer = steps[-1].answer
        if answer is None:
            return 0.0
        found[canonical(answer)] += 1  # this path agrees with itself
        return found[canonical(answer)] / found.total()

    return value


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
    """Grow a tree over functional tokens.

    `value` is by default the grader's verdict, or agreement where the gold answer is hidden.
    """
    seed = seed_for(ctx.seed, problem.id)
    tree = Tree(ctx.acts_after, ctx.max_depth, exploration_weight, seed)
    tree.act_logprobs = await root_act_logprobs(ctx, problem, prompt)  # priors of the first acts

    async def expand(choice: Choice) -> list[Step]:
        opener_logprob = tree.priors(choice.node)[choice.act]
        return await expand_learned(ctx, problem, prompt, choice, opener_logprob)

    def text_of(steps: Sequence[Step]) -> str:
        return decode(ctx.tokenizer, [token for step in steps for token in step.token_ids])

    if value is None:
        value = agreement() if problem.answer is None else graded(problem, text_of)
    await explore(tree, expand, value, simulations=simulations, in_flight=in_flight)
    return tree


def tree_rollouts(
    ctx: Learned, tree: Tree, problem: Problem, prompt: list[int], *, group: int, mask_forced: bool
) -> list[Rollout]:
    """Return one rollout per leaf, in the order in which they were found."""
    rollouts: list[Rollout] = []
    newest = 0  # tokens of nodes up to this id are counted by earlier rollouts
    for leaf in tree.leaves():
        path = [(node.id, node.step) for node in leaf.path() if node.step]
        rollout = _rollout(
            ctx, problem, prompt, [step for _, step in path], group=group, mask_forced=mask_forced
        )
        n_new = sum(len(step.token_ids) - step.forced for id, step in path if id > newest)
        nodes = tuple(id for id, _ in path)
        rollouts.append(replace(rollout, n_generated=n_new, nodes=nodes))
        newest = leaf.id  # nodes are numbered as they are found
    return rollouts


async def sample(
    ctx: Learned, problem: Problem, prompt: list[int], *, n: int, group: int
) -> list[Rollout]:
    """Sample `n` independent responses: the plain alternative to the tree."""

    async def one(i: int) -> Rollout:
        sampling = ctx.sampling(ctx.room(len(prompt), 0), problem.id, i)
        steps = with_answer(ctx, [], cut(await ctx.engine.generate(prompt, sampling), ctx.ids))
        return _rollout(ctx, problem, prompt, steps, group=group, mask_forced=False)

    return list(await asyncio.gather(*map(one, range(n))))


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
        prompt_ids=tuple(prompt),  # (P,)
        response_ids=tuple(tokens),  # (R,)
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


def encode_question(ctx: Learned, problem: Problem, system_prompt: str | None) -> list[int]:
    """Return the ids of a policy's prompt: the question, after a system prompt if there is one."""
    prompt = encode_chat(ctx.tokenizer, question_messages(problem.question, system_prompt))
    if ctx.room(len(prompt), 1) <= 0:
        raise UserError(
            f"problem {problem.id} has {len(prompt)} prompt tokens; max_model_len is "
            f"{ctx.engine.max_model_len}."
        )
    return prompt


# ---- Explorers: problems -> rollouts ----


@dataclass
class TreeExplorer:
    """Explores with a search tree over functional tokens; every path of it is a rollout."""

    cfg: RLConfig
    sampler: Learned
    example: tuple[Tree, Problem] | None = None
    """The newest tree of group 0, for readers."""

    async def rollouts(
        self, problems: Sequence[tuple[int, Problem]], *, seed: int
    ) -> list[Rollout]:
        """Return the rollouts of every (group, problem)."""
        cfg, mask_forced = self.cfg, self.cfg.forced_actions == "mask"

        async def explore(ctx: Learned, group: int, problem: Problem, prompt: list[int]):
            tree = await learned_tree(
                ctx,
                problem,
                prompt,
                simulations=cfg.num_generations,
                exploration_weight=cfg.exploration_weight,
                in_flight=cfg.leaves_in_flight,
            )
            if group == 0:
                self.example = tree, problem
            return tree_rollouts(ctx, tree, problem, prompt, group=group, mask_forced=mask_forced)

        return await _explore_all(explore, self.sampler, problems, cfg.system_prompt, seed)


@dataclass
class SampleExplorer:
    """Explores with independent responses: the control without a tree."""

    cfg: RLConfig
    sampler: Learned
    example: None = None

    async def rollouts(
        self, problems: Sequence[tuple[int, Problem]], *, seed: int
    ) -> list[Rollout]:
        """Return the rollouts of every (group, problem)."""

        async def explore(ctx: Learned, group: int, problem: Problem, prompt: list[int]):
            return await sample(ctx, problem, prompt, n=self.cfg.num_generations, group=group)

        return await _explore_all(explore, self.sampler, problems, self.cfg.system_prompt, seed)


async def _explore_all(
    explore: Callable[[Learned, int, Problem, list[int]], Awaitable[list[Rollout]]],
    sampler: Learned,
    problems: Sequence[tuple[int, Problem]],
    system_prompt: str | None,
    seed: int,
) -> list[Rollout]:
    """Explore all problems at once, with a seed for each: the engine batches their requests."""

    async def one(item: tuple[int, Problem]) -> list[Rollout]:
        group, problem = item
        ctx = replace(sampler, seed=seed_for(seed, group))  # a problem may come twice in a step
        return await explore(ctx, group, problem, encode_question(ctx, problem, system_prompt))

    return list(chain(*await for_each(problems, one, in_flight=max(1, len(problems)))))
