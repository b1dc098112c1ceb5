"""Write paths of a tree as training rows, each with its origin, and check how they end."""

from __future__ import annotations

from collections import Counter

from rftt.graders.math import grade
from rftt.run.files import Row
from rftt.types import Problem, Trace


def plain_row(trace: Trace) -> Row:
    """Return the row of a right path as it is."""
    return row_of("plain", trace, entries(trace), shared=0, failed=[])


def ends_right(row: Row, problem: Problem, counts: Counter[str]) -> bool:
    """Return whether the row is graded right as a response: the search graded paths only."""
    steps = row.get("steps") or row["chosen"]
    response = "".join(f"<{s['act']}>{s['text']}</{s['act']}>" for s in steps)
    sound = grade(response, str(problem.answer), problem.question).correct
    counts[f"kept_{row['kind']}" if sound else "row_ends_wrong"] += 1
    return sound


def entries(trace: Trace) -> list[Row]:
    """Return the steps of a path as a row contains them."""
    steps = zip(trace.steps, trace.nodes, strict=True)
    return [{"act": step.act, "text": step.text, "node": node} for step, node in steps]


def row_of(kind: str, trace: Trace, steps: list[Row], *, shared: int, failed: list[int]) -> Row:
    """Return a training row whose last step is the output of the path's answer."""
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
