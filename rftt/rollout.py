"""Phase 2: an act is a token. Trees and plain samples of a policy -> rollouts to learn from.

Every search is a coroutine that reads like the textbook for ONE problem; the engine batches.
Departure from the paper (arXiv 2502.13389): in mode `free` a rollout is one request. The tree
forces the opener, then the policy runs to `</output>` and chooses every later act itself, so that
rollouts stay samples of the policy. The same request returns the priors of all nodes on the path.
Mode `stepwise` is the paper's: one request per act, and each later act is the policy's most likely.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from rftt.engines.base import for_each
from rftt.engines.sampler import Sampler, Task, pose, tokens_of
from rftt.graders.math import canonical
from rftt.mcts import (
    DRAWN,
    Choice,
    Expand,
    Explore,
    Node,
    Selection,
    Successors,
    Tree,
    Value,
    grow,
)
from rftt.rewards import graded
from rftt.tokens import ACTS, FunctionIds, Span, parse_response
from rftt.types import Completion, Problem, Rollout, Step, seed_for

if TYPE_CHECKING:
    from rftt.run.config import RLConfig


# ---- One simulation: from a forced opener to the end of the response ----


async def expand_learned(task: Task, choice: Choice, opener_logprob: float) -> list[Step]:
    """Force the chosen opener, unless the policy draws it, and let it finish the response."""
    before = tokens_of([node.step for node in choice.node.path() if node.step])
    ids = task.sampler.required_ids
    opener = [] if choice.act == DRAWN else [ids.open[choice.act]]
    budget = task.room(len(before) + len(opener))
    if budget <= 0:  # only the forced opener fits
        steps = [Step(choice.act, "", tuple(opener), (opener_logprob,), forced=True)]
    elif task.sampler.stepwise:
        steps = await _stepwise(task, choice, before, opener_logprob)
    else:  # one request: the policy runs to the end of its response
        completion = await task.ask([*before, *opener], budget, choice.key)
        steps = cut(completion, ids, choice.act or None, opener_logprob)
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
    selection: Selection = "uct",
    draws: Successors | None = None,
    in_order: bool = False,
) -> Tree:
    """Grow a tree over functional tokens.

    `value` is by default the grader's verdict, or agreement where the gold answer is hidden.
    `draws` are the policy's own draws after an act, instead of acts that the tree forces. With
    `in_order` the first k paths are those of a search with k simulations, long or short.
    """
    sampler, problem = task.sampler, task.problem
    seed = seed_for(sampler.seed, problem.id)
    successors = draws or sampler.acts_after
    tree = Tree(successors, sampler.max_depth, exploration_weight, seed, selection)
    if draws is None:
        tree.root_log_priors = await task.log_priors((), "root")  # priors of the first acts

    async def expand(choice: Choice) -> list[Step]:
        forced = choice.act != DRAWN
        opener_logprob = tree.log_priors(choice.node)[choice.act] if forced else 0.0
        metered = replace(task, meter=None if in_order else choice.meter)
        return await expand_learned(metered, choice, opener_logprob)

    if value is None:
        value = agreement() if problem.answer is None else graded(problem, task.text)
    await explore(tree, expand, value, simulations=simulations, in_flight=in_flight)
    return tree


def tree_rollouts(
    task: Task, tree: Tree, *, mask_forced: bool, mask_shared: bool = False
) -> list[Rollout]:
    """Return one rollout per leaf, in the order in which they were found.

    `mask_forced` excludes the openers that the tree chose from the policy's actions. `mask_shared`
    excludes what an earlier rollout contains, and makes the continuations of a node a group.
    """
    rollouts: list[Rollout] = []
    # Node ids grow in order of discovery, so a node above `newest` is new to this leaf.
    newest = 0
    for leaf in tree.leaves():
        path = [(node.id, node.step) for node in leaf.path() if node.step]  # root to leaf
        rollout = _rollout(task, [step for _, step in path], mask_forced=mask_forced)
        n_new = sum(len(step.token_ids) - step.forced for id, step in path if id > newest)
        nodes = tuple(id for id, _ in path)
        rollout = replace(rollout, n_generated=n_new, nodes=nodes, branching=_branching(leaf))
        if mask_shared:
            shared = [(id, step) for id, step in path if id <= newest]
            n_shared = sum(len(step.token_ids) for _, step in shared)
            mask = (False,) * n_shared + rollout.action_mask[n_shared:]
            fork = shared[-1][0] if shared else 0
            rollout = replace(rollout, action_mask=mask, fork=fork)
        rollouts.append(rollout)
        newest = leaf.id
    return rollouts


def _branching(leaf: Node) -> tuple[float, ...]:
    """Return Rollout.branching of the path to this leaf."""
    found: list[float] = []
    for node in leaf.path():
        assert node.step is not None, "only the root has no step"
        assert node.parent is not None, "only the root has no parent"
        tried_in_turn = any(child.step and child.step.forced for child in node.parent.children)
        ratio = node.parent.visits / node.visits if tried_in_turn else 0.0
        found += [ratio] + [0.0] * (len(node.step.token_ids) - 1)
    return tuple(found)


def draws_of(cfg: RLConfig) -> Successors | None:
    """Return the policy's draws after an act (None: at the root), or None where acts are forced."""
    if cfg.sampling_method == "fork":
        return lambda act: (DRAWN,) * cfg.fork_roots if act is None else ()
    return (lambda _: (DRAWN,) * cfg.tree_width) if cfg.tree_acts == "drawn" else None


async def fork(
    cfg: RLConfig, tree: Tree, expand: Expand, value: Value, *, simulations: int, **_: int
) -> None:
    """Sample the root's responses, then more continuations of some of their segment ends.

    Every token is the policy's own, and a prefix is paid once (after arXiv 2506.11902 and
    2602.14169). Without enough segment ends the root is sampled again. Nothing is selected, so all
    requests of a stage may be in flight at once.
    """
    n_left = simulations - cfg.fork_roots
    await grow(tree, expand, value, simulations=cfg.fork_roots, in_flight=cfg.fork_roots)
    ends = fork_points(tree, n_left // cfg.fork_branches, cfg.fork_rule)
    for node in ends:
        node.untried = [DRAWN] * cfg.fork_branches
    tree.root.untried = [DRAWN] * (n_left - cfg.fork_branches * len(ends))
    await grow(tree, expand, value, simulations=n_left, in_flight=n_left)


def fork_points(tree: Tree, n: int, rule: str) -> list[Node]:
    """Return up to `n` inner nodes at which more continuations begin, by RLConfig.fork_rule."""
    leaves = tree.leaves()
    if rule == "failed":  # where no response failed, any may have another end
        leaves = [leaf for leaf in leaves if not leaf.is_right] or leaves
    ends = [node for leaf in leaves for node in leaf.path()[:-1] if node.depth < tree.max_depth]
    tree.random.shuffle(ends)
    if rule == "uncertain":
        ends.sort(key=lambda node: -act_entropy(tree.log_priors(node)))
    return ends[:n]


def act_entropy(log_priors: dict[str, float]) -> float:
    """Return Σ −p log p over the acts that may follow, in nats."""
    finite = [log_prior for log_prior in log_priors.values() if log_prior > -math.inf]
    return -sum(math.exp(log_prior) * log_prior for log_prior in finite)


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
            if cfg.sampling_method == "normal":
                return await sample(task, n=cfg.num_generations)
            forks = cfg.sampling_method == "fork"
            tree = await learned_tree(
                task,
                simulations=cfg.num_generations,
                exploration_weight=cfg.exploration_weight,
                in_flight=cfg.leaves_in_flight,
                explore=partial(fork, cfg) if forks else grow,
                selection=cfg.selection,
                draws=draws_of(cfg),
            )
            if group == 0:
                self.example = tree, problem
            masks_shared = forks and cfg.advantage_estimator != "tree"
            return tree_rollouts(
                task, tree, mask_forced=cfg.forced_actions == "mask", mask_shared=masks_shared
            )

        found = await for_each(problems, search, in_flight=max(1, len(problems)))
        return list(chain(*found))
