"""Audit the grader before a run depends on it: find gold answers that it cannot grade.

`main` is the command `python -m rftt.graders.math FILE.jsonl`: it grades labelled rows and prints
a table. With `second_judge=sympy` it also names the answers that the grader calls different and
sympy proves equal.
"""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rftt.graders.math import Verdict, grade, parse_gold, same_answer
from rftt.types import UserError

# ---- Perturbed gold answers ----

_PLAIN_LIST = re.compile(r"-?\d+(?:,(?: +-?\d+|-?\d{1,2}))+")
_RESPELT: dict[str, Callable[[str], str]] = {  # the same answer: rejecting it is a false negative
    "spacing": lambda gold: (
        gold.replace(",", " , ") if _PLAIN_LIST.fullmatch(gold) else f" {gold} "
    ),
    "$": lambda gold: gold if "$" in gold else f"${gold}$",
    "full stop": lambda gold: f"{gold}.",
    "\\text": lambda gold: rf"\text{{{gold}}}" if gold.isalnum() else gold,
    "decimal": lambda gold: f"{gold}.0" if gold.isdecimal() else gold,
    "comma": lambda gold: f"{int(gold):,}" if gold.isdecimal() else gold,
    "unit": lambda gold: rf"{gold}\text{{ units}}" if gold.isdecimal() else gold,
    "order": lambda gold: ",".join(gold.split(",")[::-1]) if _PLAIN_LIST.fullmatch(gold) else gold,
}
_CHANGED: dict[str, Callable[[str], str]] = {  # another answer: accepting it is a false positive
    "sign": lambda gold: f"-{gold}" if gold.strip("0.").replace(".", "").isdecimal() else gold,
    "digit": lambda gold: re.sub(r"\d", lambda m: str((int(m[0]) + 1) % 10), gold, count=1),
    "one more": lambda gold: f"{gold}, 987654321",
    "one fewer": lambda gold: gold.rpartition(",")[0] if _PLAIN_LIST.fullmatch(gold) else gold,
}


def audit(golds: list[str]) -> dict[str, Any]:
    """Return how well the gold answers of a data set can be graded.

    `unusable` lists golds that differ from themselves, and `words` those that are compared as text.
    `false_negatives` and `false_positives` map a perturbation to [misjudged, tried].
    """
    answers = [answer for gold in golds if (answer := parse_gold(gold)) is not None]

    def misjudged(change: Callable[[str], str], verdict: bool) -> list[int]:
        tried = [(new, answer) for answer in answers if (new := change(answer)) != answer]
        return [sum(same_answer(*pair) is verdict for pair in tried), len(tried)]

    other = {answer: grade(r"\boxed{0.123}", answer).rule for answer in answers}
    return {
        "n": len(golds),
        "unusable": [g for g in golds if not grade(rf"\boxed{{{parse_gold(g)}}}", g).correct],
        "words": [answer for answer in answers if other[answer] in ("words", "too big")],
        "false_negatives": {name: misjudged(change, False) for name, change in _RESPELT.items()},
        "false_positives": {name: misjudged(change, True) for name, change in _CHANGED.items()},
    }


# ---- The second judge ----


def prove_equal(pairs: list[tuple[str, str]]) -> list[bool]:
    """Return for each pair of answers whether sympy proves that they are equal.

    Sympy can hang or exhaust memory, so it runs in a subprocess with limits (proof.py). A pair that
    reaches a limit is not proved.
    """
    proofs: list[bool] = []
    while len(proofs) < len(pairs):
        child = subprocess.run(
            [sys.executable, "-m", "rftt.graders.proof"],
            cwd=Path(__file__).parents[2],
            input=json.dumps(pairs[len(proofs) :]),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        proofs += [line == "True" for line in child.stdout.splitlines()]
        if len(proofs) < len(pairs):
            proofs.append(False)  # this pair ended the subprocess; a new one takes the next pair
    return proofs


# ---- The command ----

_USAGE = "python -m rftt.graders.math FILE.jsonl [answer_format=auto] [second_judge=sympy]"
_UNEQUAL_RULES = ("value", "words", "too big")  # not "copied" or "no answer": those are policy


def table(arguments: list[str]) -> None:
    """Print a table by category, then one JSON line.

    Arguments: `FILE.jsonl [answer_format=boxed|gsm8k|auto] [second_judge=sympy]`. Milliseconds are
    CPU time, so other work on the machine does not count.
    """
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    files = [a for a in arguments if "=" not in a]
    known = {*options} <= {"answer_format", "second_judge"}
    if len(files) != 1 or not known or options.get("second_judge", "sympy") != "sympy":
        raise UserError(f"arguments must be one file and known options; usage: {_USAGE}")
    with open(files[0], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    counts: dict[str, Counter[str]] = {}
    times: list[float] = []
    different: list[tuple[Any, str, str]] = []  # (id, answer, gold)
    for row in rows:
        begin = time.process_time()
        verdict, outcome = _graded(row, options.get("answer_format", "auto"))
        times.append(1000 * (time.process_time() - begin))
        if outcome not in ("right", "unlabelled"):
            sys.stderr.write(f"{outcome}: {row.get('id')} {verdict}\n")
        for key in (row.get("category", "none"), "all"):
            counts.setdefault(key, Counter())[outcome] += 1
        counts["all"]["too big"] += verdict.rule == "too big"
        if verdict.extracted and not verdict.correct and verdict.rule in _UNEQUAL_RULES:
            different.append((row.get("id"), verdict.extracted, str(parse_gold(row["gold"]))))
    for key, n in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
        labelled = n.total() - n["unlabelled"] - n["too big"]
        sys.stdout.write(
            f"{key:16} {labelled:6} {n['right'] / max(1, labelled):7.3f}"
            f"  false + {n['false positive']:3}  false - {n['false negative']:3}\n"
        )
    summary = _summary(counts.get("all", Counter()), times)
    if "second_judge" in options:
        summary["proved_equal"] = _second_judgement(different)
    sys.stdout.write(json.dumps(summary) + "\n")


def _graded(row: dict[str, Any], answer_format: str) -> tuple[Verdict, str]:
    """Return the verdict on a row, and `right`, `false positive` and so on by its label."""
    try:
        verdict = grade(row["response"], row["gold"], row.get("question"), answer_format)
    except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError) as surprise:
        return Verdict(False, None, "", "", repr(surprise)), "error"
    if row.get("label") is None:
        return verdict, "unlabelled"
    if verdict.correct == bool(row["label"]):
        return verdict, "right"
    return verdict, "false positive" if verdict.correct else "false negative"


def _summary(total: Counter[str], times: list[float]) -> dict[str, Any]:
    n_rows = len(times)
    ordered = sorted(times) or [0.0]
    return {
        "n": n_rows,
        "accuracy": total["right"] / max(1, n_rows - total["unlabelled"]),
        "false_positives": total["false positive"],
        "false_negatives": total["false negative"],
        "errors": total["error"],
        "timeouts": total["too big"],  # answers beyond a bound: the grader uses no clock
        "pairs_per_second": round(1000 * n_rows / max(sum(ordered), 1e-9), 1),
        "p50_ms": round(ordered[len(ordered) // 2], 3),
        "p99_ms": round(ordered[len(ordered) * 99 // 100], 3),
        "max_ms": round(ordered[-1], 3),
    }


def _second_judgement(different: list[tuple[Any, str, str]]) -> int:
    """Name the answers that sympy proves equal although the grader calls them different."""
    proofs = prove_equal([(answer, gold) for _, answer, gold in different])
    for (identity, answer, gold), proved in zip(different, proofs, strict=True):
        if proved:
            sys.stderr.write(f"sympy proves {answer!r} equal to {gold!r}: {identity}\n")
    return sum(proofs)


def main() -> None:
    """Print the table for the command line's arguments. A user's mistake is one line."""
    try:
        table(sys.argv[1:])
    except (UserError, OSError) as problem:
        sys.exit(f"error: {problem}")
