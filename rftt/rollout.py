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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from rftt.engines.base import for_each
from rftt.engines.sampler import Sampler, Task, pose, tokens_of
from rftt.graders.math import canonical
from rftt.mcts import Choice, Explore, Tree, Value, grow
from rftt.rewards import graded
from rftt.tokens import ACTS, FunctionIds, Span, parse_response
from rftt.types import Completion, Problem, Rollout, Step, seed_for

if TYPE_CHECKING:
    from rftt.run.config import RLConfig


# ---- One simulation: from a forced opener to the end of the response ----


async def expand_learned(task: Task, choice: Choice, opener_logprob: float) -> list[Step]:
    """Force the chosen opener and let the policy finish the response."""
    before = tokens_of([node.step for node in choice.node.path() if node.step])
    ids = task.sampler.required_ids
    opener = ids.open[choice.act]
    budget = task.room(len(before) + 1)  # one token is the forced opener
    if budget <= 0:
        steps = [Step(choice.act, "", (opener,), (opener_logprob,), forced=True)]
    elif task.sampler.stepwise:
        steps = await _stepwise(task, choice, before, opener_logprob)
    else:  # one request: the policy runs to the end of its response
        completion = await task.ask([*before, opener], budget, choice.key)
        steps = cut(completion, ids, choice.act, opener_logprob)
    answer = task.answer([*before, *tokens_of(steps)])
    return [*steps[:-1], replace(steps[-1], answer=answer)]  # the last step states it


async def _stepwise(
    task: Task, choice: Choice, before: list[int], opener_logprob: float
) -> list[Step]:
    """Send one request per act; each later act is the most likely one that the grammar allows.

    The policy draws no opener itself, so all of them count as forced.
    """
    sampler, ids, act = task.sampler, task.sampler.required_ids, choice.act
    steps: list[Step] = []
    used = list(before)
    while True:
        room = task.room(len(used) + 1)  # one token is the forced opener
        response = [*used, ids.open[act]]
        completion = await task.ask(response, room, choice.key, len(steps), one_act=True)
        [step] = cut(completion, ids, act, opener_logprob)
        steps.append(step)
        used += step.token_ids  # the next act reads this one
        depth = choice.node.depth + len(steps)  # of the node that this step becomes
        following = sampler.acts_after(act)  # none after an output
        closed = step.token_ids[-1] == ids.close[act]
        if not closed or not following or depth >= sampler.max_depth or task.room(len(used)) <= 1:
            return steps
        log_priors = await task.log_priors(used, choice.key, len(steps), "act")
        steps[-1] = replace(step, log_priors=log_priors)
        act = max(following, key=log_priors.__getitem__)  # greedy, as in the paper
        opener_logprob = log_priors[act]


def cut(
    completion: Completion,
    ids: FunctionIds | None,
    forced: str | None = None,
    opener_logprob: float = 0.0,
) -> list[Step]:
    """Cut a completion into steps by token id, with the priors between them.

    `forced` is the act whose opener the tree put before the completion, if it did so.
    Text outside whole segments becomes one last step. Its act is "" unless the tree forced it.
    """
    tokens, logprobs = completion.token_ids, completion.logprobs
    n_forced = 0  # tokens before the completion
    if ids is not None and forced is not None:
        tokens, logprobs = (ids.open[forced], *tokens), (opener_logprob, *logprobs)
        n_forced = 1
    spans: list[Span] = []
    covered = 0
    if ids is not None:
        spans, covered = parse_response(tokens, ids)  # whole segments first
    if covered < len(tokens):
        act = "" if spans else forced  # after a segment nothing is forced
        spans.append(Span(act or "", covered, len(tokens)))
    steps = []
    for span in spans:
        watched = completion.watched.get(span.stop - n_forced)  # nothing at the very end
        log_priors = dict(zip(ACTS, watched, strict=True)) if watched else {}
        step = Step(
            span.act,
            "",
            tokens[span.start : span.stop],
            logprobs[span.start : span.stop],
            forced=span.start < n_forced,
            log_priors=log_priors,
        )
        steps.append(step)
    return steps


# ---- Trees and samples of one problem ----


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
    task: Task,
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
    sampler, problem = task.sampler, task.problem
    seed = seed_for(sampler.seed, problem.id)
    tree = Tree(sampler.acts_after, sampler.max_depth, exploration_weight, seed)
    tree.root_log_priors = await task.log_priors((), "root")  # priors of the first acts

    async def expand(choice: Choice) -> list[Step]:
        opener_logprob = tree.log_priors(choice.node)[choice.act]  # of the act that the tree forces
        return await expand_learned(task, choice, opener_logprob)

    if value is None:
        value = agreement() if problem.answer is None else graded(problem, task.text)
    await explore(tree, expand, value, simulations=simulations, in_flight=in_flight)
    return tree


def tree_rollouts(task: Task, tree: Tree, *, mask_forced: bool) -> list[Rollout]:
    """Return one rollout per leaf, in the order in which they were found.

    `mask_forced` excludes the openers that the tree chose from the policy's actions.
    """
    rollouts: list[Rollout] = []
    # Node ids grow in order of discovery, so a node above `newest` is new to this leaf.
    newest = 0
    for leaf in tree.leaves():
        path = [(node.id, node.step) for node in leaf.path() if node.step]  # root to leaf
        rollout = _rollout(task, [step for _, step in path], mask_forced=mask_forced)
        n_new = sum(len(step.token_ids) - step.forced for id, step in path if id > newest)
        nodes = tuple(id for id, _ in path)
        rollouts.append(replace(rollout, n_generated=n_new, nodes=nodes))
        newest = leaf.id
    return rollouts


async def sample(task: Task, *, n: int) -> list[Rollout]:
    """Sample `n` independent responses: the plain alternative to the tree."""

    async def one(i: int) -> Rollout:
        completion = await task.ask((), task.room(0), i)  # i seeds the request
        steps = cut(completion, task.sampler.ids)
        steps[-1] = replace(steps[-1], answer=task.answer(completion.token_ids))
        return _rollout(task, steps, mask_forced=False)

    return list(await asyncio.gather(*map(one, range(n))))


def _rollout(task: Task, steps: Sequence[Step], *, mask_forced: bool) -> Rollout:
    """Return the rollout of consecutive steps that end a response."""
    tokens = tokens_of(steps)
    logprobs: list[float] = []
    forced: list[bool] = []
    acts: list[str] = []
    for step in steps:
        logprobs += step.logprobs
        forced += [step.forced] + [False] * (len(step.token_ids) - 1)  # the opener alone
        # A segment counts as its act only if its own closer ends it.
        closed = step.act != "" and step.token_ids[-1] == task.sampler.required_ids.close[step.act]
        acts.append(step.act if closed else "")
    return Rollout(
        problem=task.problem,
        prompt_ids=tuple(task.prompt),  # (P,)
        response_ids=tuple(tokens),  # (R,)
        sampling_logprobs=tuple(logprobs),
        action_mask=tuple(not (mask_forced and opener) for opener in forced),
        forced=tuple(forced),
        step_ends=tuple(end - 1 for end in accumulate(len(step.token_ids) for step in steps)),
        acts=tuple(acts),
        finish="stop" if tokens[-1] in task.sampler.stops else "length",
        group=task.group,
        n_generated=len(tokens),
        answer=steps[-1].answer,
    )


# ---- Many problems at once ----


@dataclass
class Explorer:
    """Turns problems into rollouts: by a tree each, or by independent samples as the control."""

    cfg: RLConfig
    sampler: Sampler
    example: tuple[Tree, Problem] | None = None  # the newest tree of group 0, for readers

    async def rollouts(
        self, problems: Sequence[tuple[int, Problem]], *, seed: int
    ) -> list[Rollout]:
        """Return the rollouts of every (group, problem). The engine batches their requests."""
        cfg = self.cfg

        async def search(item: tuple[int, Problem]) -> list[Rollout]:
            group, problem = item
            sampler = replace(self.sampler, seed=seed_for(seed, group))  # a problem may come twice
            task = pose(sampler, problem, cfg.system_prompt, group=group)
            if cfg.sampling_method != "mcts":
                return await sample(task, n=cfg.num_generations)
            tree = await learned_tree(
                task,
                simulations=cfg.num_generations,
                exploration_weight=cfg.exploration_weight,
                in_flight=cfg.leaves_in_flight,
            )
            if group == 0:
                self.example = tree, problem
            return tree_rollouts(task, tree, mask_forced=cfg.forced_actions == "mask")

        found = await for_each(problems, search, in_flight=max(1, len(problems)))
        return list(chain(*found))
