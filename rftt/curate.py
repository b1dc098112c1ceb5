"""A finished tree, or scored responses, -> training rows (PAPER §1: pair choice, branch merging).

From each tree come at most one merged row, shared prefix + wrong suffix + <verify> + <refine> +
correct suffix + <output>, and a few plain correct rows that share no step; if asked for, also a
pair for DPO. Independent responses become rows as they are (rejection sampling), and pairs. Every
row says where it comes from, and all that is left out is counted under a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from rftt.graders.math import grade
from rftt.graders.prm import reduce
from rftt.mcts import Tree
from rftt.rollout import visible
from rftt.run.config import SearchConfig
from rftt.run.data import Row
from rftt.run.filters import follows_grammar, leaks, rank, repeats, select, share_solved
from rftt.tokens import Messages, ask_refine, ask_verify, segments
from rftt.types import Problem, Trace

Ask = Callable[[Messages, str, str], Awaitable[str | None]]
"""(messages, act, problem id) -> the model's clipped reply, None if it ran out of tokens"""


def traces(tree: Tree, problem: Problem) -> list[Trace]:
    """Every root-to-leaf path with its answer, in the order in which they were found."""
    paths = []
    for leaf in tree.leaves():
        path = [(node.id, node.step) for node in leaf.path() if node.step]
        steps = tuple(step for _, step in path)
        correct = leaf.value_sum == 1.0
        ids = tuple(id for id, _ in path)
        paths.append(Trace(problem, steps, ids, steps[-1].answer, correct))
    return paths


def quality(cfg: SearchConfig, trace: Trace) -> tuple[float, int, int, int]:
    """Return what ranks a path, higher is better: process score, then few repeats, then length.

    The paper ranks by length too, and does not say in which direction. Here more steps are better:
    a path that answers at once is often right by luck, and rows of such paths teach the model to
    guess (docs/log.md). Among paths of as many steps the shorter text is better.
    """
    scores = [step.score for step in trace.steps if step.score is not None]
    score = reduce(scores, cfg.prm_reduce) if scores else 0.0
    n_repeats = repeats(step.text for step in trace.steps)
    return score, -n_repeats, len(trace.steps), -len(visible(trace.steps))


def shared(one: Trace, other: Trace) -> int:
    """How many steps both paths have in common from the root."""
    n = 0
    for a, b in zip(one.nodes, other.nodes, strict=False):
        if a != b:
            break
        n += 1
    return n


def choose_pair(usable: Sequence[Trace], cfg: SearchConfig) -> tuple[Trace, Trace] | str:
    """(τ_c⁺, τ_w⁻): the best correct path, and the worst wrong one that shares a prefix with it."""
    by = partial(quality, cfg)
    correct = sorted((t for t in usable if t.correct), key=by, reverse=True)
    wrong = sorted((t for t in usable if not t.correct and t.answer is not None), key=by)
    if not correct:
        return "no_correct_path"
    if not wrong:
        return "no_wrong_path"
    for good in correct:
        for bad in wrong:
            n = shared(good, bad)
            acts = [s.act for s in bad.steps] + ["verify", "refine"]
            acts += [s.act for s in good.steps[n:]] + ["output"]
            if n >= cfg.min_shared_steps and follows_grammar(acts):
                return good, bad
    return "no_shared_prefix"


def widest_pair(usable: Sequence[Trace], cfg: SearchConfig) -> tuple[Trace, Trace] | None:
    """(best right, worst wrong) path among those that share the longest prefix: a pair for DPO."""
    pairs = [(a, b) for a in usable for b in usable if a.correct and not b.correct and b.answer]

    def preference(pair: tuple[Trace, Trace]) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        good, bad = pair
        return shared(good, bad), quality(cfg, good), tuple(-x for x in quality(cfg, bad))

    return max(pairs, key=preference, default=None)


def disjoint_correct(usable: Sequence[Trace], cfg: SearchConfig) -> list[Trace]:
    """Up to `max_plain_paths` correct paths, best first, of which no two share a step."""
    chosen: list[Trace] = []
    by = partial(quality, cfg)
    for trace in sorted((t for t in usable if t.correct), key=by, reverse=True):
        if len(chosen) < cfg.max_plain_paths and all(not shared(trace, other) for other in chosen):
            chosen.append(trace)
    return chosen


async def merge(ask: Ask, good: Trace, bad: Trace) -> Row | str:
    """Cross verification and branch merging; a reason instead of a row where it is unfit."""
    problem, n = good.problem, shared(good, bad)
    prefix, before = visible(good.steps[:n]), visible(bad.steps)
    wrong, right = visible(bad.steps[n:]), visible(good.steps[n:])
    messages = ask_verify(problem.question, prefix, wrong, right)
    check = await ask(messages, "verify", problem.id)
    if not check:
        return "verify_empty"
    if leaks(check, str(problem.answer), f"{problem.question}\n{before}"):
        return "verify_leaks_answer"
    turn = await ask(ask_refine(problem.question, before, check), "refine", problem.id)
    if not turn:
        return "refine_empty"
    if leaks(turn, str(problem.answer), f"{problem.question}\n{before}\n{check}"):
        return "refine_leaks_answer"
    steps = [
        *_entries(good)[:n],
        *(entry | {"wrong": True} for entry in _entries(bad)[n:]),
        {"act": "verify", "text": check},
        {"act": "refine", "text": turn},
        *_entries(good)[n:],
    ]
    return _row("merged", good, steps, shared=n, failed=list(bad.nodes[n:]))


def plain(trace: Trace) -> Row:
    return _row("plain", trace, _entries(trace), shared=0, failed=[])


async def curate(
    tree: Tree, problem: Problem, ask: Ask, cfg: SearchConfig
) -> tuple[list[Row], Counter[str]]:
    """Rows of one tree, and how often each reason kept something out."""
    counts: Counter[str] = Counter()
    usable: list[Trace] = []
    for trace in traces(tree, problem):
        if not follows_grammar([step.act for step in trace.steps]):
            counts["path_against_grammar"] += 1
        elif repeats(step.text for step in trace.steps) > cfg.max_repeats:
            counts["path_repeats"] += 1
        else:
            usable.append(trace)
    rows = [plain(trace) for trace in disjoint_correct(usable, cfg)]
    pair = choose_pair(usable, cfg)
    merged = pair if isinstance(pair, str) else await merge(ask, *pair)
    if isinstance(merged, str):
        counts[merged] += 1
    else:
        rows.insert(0, merged)
    if cfg.tree_pairs and (wide := widest_pair(usable, cfg)):
        good, bad = map(plain, wide)
        chosen = good | {"kind": "pair", "chosen": good["steps"], "rejected": bad["steps"]}
        rows.append({key: chosen[key] for key in chosen if key != "steps"})
    return [row for row in rows if _sound(row, problem, counts)], counts


def _sound(row: Row, problem: Problem, counts: Counter[str]) -> bool:
    """Whether the written row, read as a response, ends in the right answer."""
    steps = row.get("steps") or row["chosen"]
    response = "".join(f"<{s['act']}>{s['text']}</{s['act']}>" for s in steps)
    sound = grade(response, str(problem.answer), problem.question).correct
    counts[f"kept_{row['kind']}" if sound else "row_ends_wrong"] += 1
    return sound


def _entries(trace: Trace) -> list[Row]:
    steps = zip(trace.steps, trace.nodes, strict=True)
    return [{"act": step.act, "text": step.text, "node": node} for step, node in steps]


def _row(kind: str, trace: Trace, steps: list[Row], *, shared: int, failed: list[int]) -> Row:
    output = {"act": "output", "text": f"The final answer is \\boxed{{{trace.answer}}}."}
    return {
        "id": trace.problem.id,
        "kind": kind,
        "question": trace.problem.question,
        "answer": trace.problem.answer,
        "steps": [*steps, output],
        "shared_steps": shared,
        "path_nodes": list(trace.nodes),
        "failed_nodes": failed,
    }


# ---- Independent responses ----


def step_texts(response: str) -> list[str]:
    """The steps of a response as repeats and process rewards see them: its segments, or lines."""
    found = [text for _, text in segments(response)] or response.splitlines()
    return [text for text in found if text.strip()]


def curate_responses(problem: Row, cfg: SearchConfig) -> Row:
    """A problem's scored responses -> rows, best first, then pairs of best right and worst wrong.

    `counts` are of responses: those kept, and the reason of every other one.
    """
    responses = [
        response
        | {"sample": i, "steps": step_texts(response["text"])}
        | {"score": reduce(process, cfg.prm_reduce) if (process := response["process"]) else None}
        for i, response in enumerate(problem["responses"])
    ]
    kept, counts = select(responses, cfg)
    wrong = [r for r in responses if r["finish"] == "stop" and not r["correct"]]
    worst = sorted((r for r in wrong if r["tokens"] <= cfg.max_row_tokens), key=rank)
    source = {key: problem[key] for key in ("id", "question", "answer")}
    rows = []
    for good in kept:
        steps = _steps_of(good)
        said = {"steps": steps} if steps else {"response": good["text"]}
        rows.append(source | {"kind": "sample", "sample": good["sample"]} | said)
    for good, bad in list(zip(kept, worst, strict=False))[: cfg.max_pairs]:
        sides = {"chosen": good, "rejected": bad}
        said = {name: _steps_of(side) or side["text"] for name, side in sides.items()}
        rows.append(source | {"kind": "pair", "samples": [good["sample"], bad["sample"]]} | said)
    return {
        "rows": rows,
        "counts": counts,
        "solved": share_solved(responses),
        "generated_tokens": sum(response["tokens"] for response in responses),
    }


def _steps_of(response: Row) -> list[Row]:
    """The functional segments of a response; none of one that is plain text."""
    return [{"act": act, "text": text} for act, text in segments(response["text"])]
