"""A look at the grader before a run is spent on a data set: which gold answers can it judge?

`main` is `python -m rftt.graders.math FILE.jsonl`: its verdicts on labelled rows, as a table.
"""

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from rftt.graders.math import Verdict, grade, parse_gold, same_answer
from rftt.types import UserError

_RESPELT: dict[str, Callable[[str], str]] = {  # the same answer: to refuse it is a false negative
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
_CHANGED: dict[str, Callable[[str], str]] = {  # another answer: to pay it is a false positive
    "sign": lambda gold: f"-{gold}" if gold.strip("0.").replace(".", "").isdecimal() else gold,
    "digit": lambda gold: re.sub(r"\d", lambda m: str((int(m[0]) + 1) % 10), gold, count=1),
    "one more": lambda gold: f"{gold}, 987654321",
    "one fewer": lambda gold: gold.rpartition(",")[0] if _PLAIN_LIST.fullmatch(gold) else gold,
}
_PLAIN_LIST = re.compile(r"-?\d+(?:, *-?\d{1,2}|, +-?\d+)+")


def audit(golds: list[str]) -> dict[str, Any]:
    """How well a data set's gold answers can be graded.

    `unusable` differ from themselves, `words` are no mathematics and compared as text;
    `false_negatives` and `false_positives` map a perturbation to [misjudged, tried].
    """
    answers = [answer for gold in golds if (answer := parse_gold(gold)) is not None]

    def misjudged(change: Callable[[str], str], paid: bool) -> list[int]:
        tried = [(new, answer) for answer in answers if (new := change(answer)) != answer]
        return [sum(same_answer(*pair) is paid for pair in tried), len(tried)]

    other = {answer: grade(r"\boxed{0.123}", answer).rule for answer in answers}
    return {
        "n": len(golds),
        "unusable": [g for g in golds if not grade(rf"\boxed{{{parse_gold(g)}}}", g).correct],
        "words": [answer for answer in answers if other[answer] in ("words", "too big")],
        "false_negatives": {name: misjudged(change, False) for name, change in _RESPELT.items()},
        "false_positives": {name: misjudged(change, True) for name, change in _CHANGED.items()},
    }


def verdict_table(arguments: list[str]) -> None:
    """A table by category, then one JSON line: `FILE.jsonl [answer_format=boxed|gsm8k|auto]`.

    Milliseconds are CPU time: other work on the machine does not count.
    """
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    files = [a for a in arguments if "=" not in a]
    if len(files) != 1 or {*options} - {"answer_format"}:
        raise UserError("usage: python -m rftt.graders.math FILE.jsonl [answer_format=auto]")
    with open(files[0], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    table: dict[str, Counter[str]] = {}
    times: list[float] = []
    for row in rows:
        begin, form = time.process_time(), options.get("answer_format", "auto")
        label = None if row.get("label") is None else bool(row["label"])
        try:
            verdict = grade(row["response"], row["gold"], row.get("question"), form)
            wrong = "false positive" if verdict.correct else "false negative"
            outcome = {None: "unlabelled", verdict.correct: "right"}.get(label, wrong)
        except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError) as surprise:
            verdict, outcome = Verdict(False, None, "", "", repr(surprise)), "error"
        times.append(1000 * (time.process_time() - begin))
        if outcome not in ("right", "unlabelled"):
            sys.stderr.write(f"{outcome}: {row.get('id')} {verdict}\n")
        for key in (row.get("category", "none"), "all"):
            table.setdefault(key, Counter())[outcome] += 1
        table["all"]["too big"] += verdict.rule == "too big"
    for key, n in sorted(table.items(), key=lambda item: (item[0] == "all", item[0])):
        labelled = n.total() - n["unlabelled"] - n["too big"]
        sys.stdout.write(
            f"{key:16} {labelled:6} {n['right'] / max(1, labelled):7.3f}"
            f"  false + {n['false positive']:3}  false - {n['false negative']:3}\n"
        )
    total, times = table.get("all", Counter()), sorted(times) or [0.0]
    summary = {
        "n": len(rows), "accuracy": total["right"] / max(1, len(rows) - total["unlabelled"]),
        "false_positives": total["false positive"], "false_negatives": total["false negative"],
        "errors": total["error"], "timeouts": total["too big"],  # no clock: beyond a bound
        "pairs_per_second": round(1000 * len(rows) / max(sum(times), 1e-9), 1),
        **{f"p{p}_ms": round(times[len(times) * p // 100], 3) for p in (50, 99)},
        "max_ms": round(times[-1], 3),
    }  # fmt: skip
    sys.stdout.write(json.dumps(summary) + "\n")


def main() -> None:
    try:
        verdict_table(sys.argv[1:])
    except (UserError, OSError) as problem:
        sys.exit(f"error: {problem}")
