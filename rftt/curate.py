"""A finished tree -> training rows: pair choice, cross verification, branch merging, leak checks.

Each tree yields at most one merged row, shared prefix + wrong suffix + <verify> + <refine> +
correct suffix + <output>, and a few plain correct rows that share no step (arXiv 2502.13389).
`tree_pairs` adds a preference pair for DPO. Every row records its origin, and every omission is
counted under a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

from rftt.graders.prm import reduce
from rftt.mcts import Tree
from rftt.prompted import visible
from rftt.prompts import sentences
from rftt.run.config import SearchConfig
from rftt.run.contract import best_check, leaks, miscalculation, nameable
from rftt.run.files import Row
from rftt.run.trace_rows import ends_right, entries, plain_row, row_of
from rftt.tokens import successors
from rftt.types import Problem, Trace

Draw = Callable[..., Awaitable[list[str]]]
"""(act, so_far, n=…, **parts of the prompt) -> the replies that keep the act's contract"""


class Omitted(Exception):
    """A tree gives no merged row; the text is the reason under which this is counted."""


def traces(tree: Tree, problem: Problem) -> list[Trace]:
    """Return every root-to-leaf path with its answer, in the order of discovery."""
    paths = []
    for leaf in tree.leaves():
        path = [(node.id, node.step) for node in leaf.path() if node.step]  # without the root
        steps = tuple(step for _, step in path)
        ids = tuple(id for id, _ in path)
        paths.append(Trace(problem, steps, ids, steps[-1].answer, correct=leaf.is_right))
    return paths


def repeats(texts: Iterable[str]) -> int:
    """Return how often the most frequent sentence occurs in all `texts` together."""
    counts = Counter(s.strip().lower() for text in texts for s in sentences(text))
    return max(counts.values(), default=0)


def follows_grammar(acts: Sequence[str]) -> bool:
    """Return whether the policy of phase 2 may write these acts in this order.

    Phase 1 may begin with a direct answer, phase 2 may not. Such paths would teach what the tree
    over functional tokens never explores.
    """
    return all(
        act in successors(before, "learned")
        for before, act in zip([None, *acts], acts, strict=False)
    )


def answers_early(trace: Trace) -> bool:
    """Return whether a step that only prepares states the path's own answer, right or wrong.

    Whoever has solved the problem while restating it teaches no search.
    """
    known = trace.problem.question
    for step in trace.steps:
        if step.act in ("clarify", "analysis") and leaks(step.text, str(trace.answer), known):
            return True
        known += f"\n{step.text}"
    return False


def quality(cfg: SearchConfig, trace: Trace) -> tuple[float, int, int, int]:
    """Return a path's rank, higher is better: process score, few repeats, many steps, short."""
    scores = [step.score for step in trace.steps if step.score is not None]
    score = reduce(scores, cfg.prm_reduce) if scores else 0.0
    n_repeats = repeats(step.text for step in trace.steps)
    # An immediate answer is often right by luck, and its row teaches guessing (docs/log.md).
    return score, -n_repeats, len(trace.steps), -len(visible(trace.steps))


def shared(one: Trace, other: Trace) -> int:
    """Return how many steps both paths share from the root."""
    n = 0
    for a, b in zip(one.nodes, other.nodes, strict=False):
        if a != b:
            break
        n += 1
    return n


def choose_pairs(usable: Sequence[Trace], cfg: SearchConfig) -> list[tuple[Trace, Trace]]:
    """Return the pairs (τ_c⁺, τ_w⁻) of a correct and a wrong path that can be merged.

    The first is the paper's: the best correct and the worst wrong path.
    """
    by = partial(quality, cfg)
    correct = sorted((t for t in usable if t.correct), key=by, reverse=True)  # best first
    # worst first
    wrong = sorted((t for t in usable if not t.correct and t.answer is not None), key=by)
    if not correct:
        raise Omitted("no_correct_path")
    if not wrong:
        raise Omitted("no_wrong_path")
    pairs: list[tuple[Trace, Trace]] = []
    reason = "no_shared_prefix"
    for good in correct:
        for bad in wrong:
            n = shared(good, bad)  # steps of the common prefix
            acts = [s.act for s in bad.steps] + ["verify", "refine"]  # the merged row, act by act
            acts += [s.act for s in good.steps[n:]] + ["output"]
            if n < cfg.min_shared_steps or not follows_grammar(acts):
                continue
            if mistakes_of(good, bad):
                pairs.append((good, bad))
            reason = "no_mistake_to_name"
    if not pairs:
        raise Omitted(reason)
    return pairs


def mistakes_of(good: Trace, bad: Trace) -> set[str]:
    """Return what a check can name: numbers and calculations that only the wrong steps contain."""
    n = shared(good, bad)
    return nameable(visible(bad.steps[n:]), visible(good.steps), good.problem.question)


def widest_pair(usable: Sequence[Trace], cfg: SearchConfig) -> tuple[Trace, Trace] | None:
    """Return the pair with the longest shared prefix for DPO: it differs in the failing step."""
    pairs = [(a, b) for a in usable for b in usable if a.correct and not b.correct and b.answer]

    def preference(pair: tuple[Trace, Trace]) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        good, bad = pair
        return shared(good, bad), quality(cfg, good), tuple(-x for x in quality(cfg, bad))

    return max(pairs, key=preference, default=None)


def disjoint_correct(usable: Sequence[Trace], cfg: SearchConfig) -> list[Trace]:
    """Return up to `max_plain_paths` correct paths, best first, of which no two share a step."""
    chosen: list[Trace] = []
    by = partial(quality, cfg)
    for trace in sorted((t for t in usable if t.correct), key=by, reverse=True):
        if len(chosen) < cfg.max_plain_paths and all(not shared(trace, other) for other in chosen):
            chosen.append(trace)
    return chosen


async def merge(draw: Draw, good: Trace, bad: Trace, cfg: SearchConfig) -> Row:
    """Cross-verify two branches and merge them into one row."""
    n = shared(good, bad)
    wrong, right = visible(bad.steps[n:]), visible(good.steps[n:])  # where they differ
    prefix = visible(good.steps[:n])
    checks = await draw("verify", prefix, n=cfg.verify_draws, wrong=wrong, correct=right)
    if not checks:
        raise Omitted("verify_refused")
    check = best_check(checks, mistakes_of(good, bad))
    if check is None:
        raise Omitted("verify_names_no_mistake")
    refinements = await draw("refine", visible(bad.steps), n=cfg.contract_tries, check=check)
    if not refinements:
        raise Omitted("refine_refused")
    steps = [
        *entries(good)[:n],
        *(entry | {"wrong": True} for entry in entries(bad)[n:]),  # out of the loss: `mask_wrong`
        {"act": "verify", "text": check},
        {"act": "refine", "text": refinements[0]},
        *entries(good)[n:],
    ]
    return row_of("merged", good, steps, shared=n, failed=list(bad.nodes[n:]))


async def merge_first(draw: Draw, pairs: Sequence[tuple[Trace, Trace]], cfg: SearchConfig) -> Row:
    """Merge the first of up to `merge_tries` pairs whose mistake a check names."""
    reason = Omitted()
    for good, bad in pairs[: cfg.merge_tries]:
        try:
            return await merge(draw, good, bad, cfg)
        except Omitted as omitted:
            reason = omitted
    raise reason


async def curate(
    tree: Tree, problem: Problem, draw: Draw, cfg: SearchConfig
) -> tuple[list[Row], Counter[str]]:
    """Return the rows of one tree, and how often each reason excluded something."""
    counts: Counter[str] = Counter()
    usable: list[Trace] = []
    for trace in traces(tree, problem):
        if not follows_grammar([step.act for step in trace.steps]):
            counts["path_against_grammar"] += 1
        elif repeats(step.text for step in trace.steps) > cfg.max_repeats:
            counts["path_repeats"] += 1
        elif trace.answer is not None and answers_early(trace):
            counts["path_answers_early"] += 1
        elif trace.correct and any(miscalculation(step.text) for step in trace.steps):
            counts["path_miscalculates"] += 1  # right by luck
        else:
            usable.append(trace)
    rows = [plain_row(trace) for trace in disjoint_correct(usable, cfg)]
    try:
        merged = await merge_first(draw, choose_pairs(usable, cfg), cfg)
        rows.insert(0, merged)  # the merged row comes first
    except Omitted as reason:
        counts[str(reason)] += 1
    if cfg.tree_pairs and (wide := widest_pair(usable, cfg)):
        good, bad = map(plain_row, wide)
        chosen = good | {"kind": "pair", "chosen": good["steps"], "rejected": bad["steps"]}
        rows.append({key: chosen[key] for key in chosen if key != "steps"})
    return [row for row in rows if ends_right(row, problem, counts)], counts
