"""A look at the grader before a run is spent on a data set: which gold answers can it judge?"""

import re
from collections.abc import Callable
from typing import Any

from rftt.rewards.grader import grade, parse_gold, same_answer

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
