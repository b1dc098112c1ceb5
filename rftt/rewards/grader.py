"""The grader: is a response's final answer the gold answer? (the paper's rule-based outcome reward)

`extract` finds the answer, latex.py reads it, values.py works out what it is worth and shapes.py
what kind of thing it is and whether two are equal. Departures from other graders:
1. No sympy.simplify: constants are exact fractions or 120-digit numbers, and expressions with
   variables are equal when they agree wherever both are defined among 12 fixed points (4 or more).
2. Bounded by construction (500 characters, 20,000 bits, 60 items, a budget of operations), so it is
   called inline, with no worker and no time-out. What exceeds a bound is refused as "too big".
3. No state but one mpmath context per thread: a verdict depends on nothing but the arguments.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rftt.rewards.latex import MAX_CHARS, Refused, TooBig, clean, measured, parse, words
from rftt.rewards.shapes import MAX_ITEMS, Shape, equal, key_of, scaled, shape_of
from rftt.rewards.values import Work, context
from rftt.schema import UserError


@dataclass(frozen=True)
class Verdict:
    correct: bool
    extracted: str | None
    answer_form: str
    """`canonical` form of the extracted answer, and of the gold answer below."""
    gold_form: str
    rule: str
    """What decided: 'same text', a shape ('number', …), 'words', 'time', 'copied', 'too big',
    'no answer' or 'no gold'."""


# 1. Finding the answer

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_FILL = r"(?:[\s$]|\\[()\[\],;!]|\\q?quad|\b[A-Za-z](?:_\w)?\s*=)*"  # space, delimiters, a new name
_JOINT = re.compile(_FILL + r"(?:,|;|and|or|\\text\s*\{\s*(?:and|or)\s*\})" + _FILL)
_SAID = re.compile(r"(?i)answer(?:\s+is\s*:?|\s*:)\**\s*(.+)|(?:final answer|answer).*\bis\s+(.+)")
_LAST = re.compile(r"\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]|-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def _closing(text: str, start: int) -> int:
    """Index of the brace that closes the one at `start`, or -1. Escaped braces are not braces."""
    depth = 0
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0 and found[0] == "}":
            return found.start()
    return -1


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, content) of boxes, last first; end is -1 for an unfinished one."""
    at = len(text)
    while (at := max(text.rfind(name, 0, at) for name in ("\\boxed", "\\fbox", "\\framebox"))) >= 0:
        if not (head := _BOX.match(text, at)):
            continue
        if text[head.end() : head.end() + 1] == "{":
            end = _closing(text, head.end())
            yield at, end, text[head.end() + 1 : end]
        else:  # \boxed 7
            bare = re.compile(r"[\w.,+-]*\w").match(text, head.end())
            yield at, bare.end() - 1 if bare else -1, bare[0] if bare else ""


def _boxed(text: str) -> str | None:
    """The last box; boxes joined to it by no more than a comma, `and` or `or` are one list."""
    found: list[str] = []
    later = len(text)
    for start, end, inside in _boxes(text):
        if found and not (0 < end < later < end + 60 and _JOINT.fullmatch(text, end + 1, later)):
            break
        if end < 0 or not inside.strip() or len(found) > MAX_ITEMS:
            return None
        found, later = [inside, *found], start
    return ", ".join(found) or None


def _hashes(text: str) -> str | None:
    return text.rsplit("####", 1)[1].strip().split("\n")[0] or None if "####" in text else None


def extract(response: str, answer_format: str = "boxed") -> str | None:
    """The final answer, or None. Only text after the last `<output>` counts.

    `boxed` wants a box; `gsm8k` wants `#### 18`; `auto` takes a box, else `####`, else "the answer
    is …", else the last formula or number. An unfinished box is no answer in any format.
    """
    text = re.sub(r"I hope it is correct\.?", "", response.rsplit("<output>", 1)[-1])
    if answer_format not in ("boxed", "gsm8k", "auto"):
        raise UserError(f"answer_format={answer_format!r}: use boxed, gsm8k or auto")
    if answer_format == "gsm8k" or (
        answer_format == "auto" and "####" in text and not _BOX.search(text)
    ):
        return _hashes(text)
    if answer_format == "boxed" or _BOX.search(text):
        return _boxed(text)
    lines = [line for line in text[-4 * MAX_CHARS :].split("\n") if line.strip()]
    for line in reversed(lines):
        if said := list(_SAID.finditer(line)):
            tail = re.split(r"\.(?:\s|$)|\s*<[|/]", said[-1][1] or said[-1][2])[0]
            return re.sub(r"(?i)^.*\bis\s+", "", tail).strip() or None
    if len(lines) == 1 and len(lines[0].strip()) < 60 and " " not in lines[0].strip():
        return lines[0].strip()
    last = list(_LAST.finditer(lines[-1])) if lines else []
    return last[-1][0] if last else None


def parse_gold(gold: str) -> str | None:
    """Final answer of a gold field: a final answer, a solution with a box, or GSM8K's `#### 18`."""
    return _boxed(gold) or (_hashes(gold) if "####" in gold else gold.strip() or None)


# 2. Comparing


def _spellings(text: str, both: str) -> list[str]:
    """1,234 may be a number or a list; 2,74 a list or, beside 2.74, a decimal. Not in brackets."""
    if "," not in text or re.search(r"[(\[⦃{]", text):
        return [text]
    joined = re.sub(
        r"(?<![\d,])([1-9]\d{0,2})((?:,\d{3})+)(?!\d|,\d)",
        lambda m: m[1] + m[2].replace(",", ""),
        text,
    )
    found = [joined, text] if joined != text else [text]
    if re.fullmatch(r"\W*(?:\d+,(?:\d{1,2}|\d{4,})|0,\d+)\D*", text) and "." in both:
        found.append(text.replace(",", "."))
    return found


_Reading = tuple[Shape, Fraction, tuple[tuple[str, int], ...]]
_WHOLE = re.compile(r"[!⌊⌈]|\\(?:binom|sum|prod)|gcd|lcm|\(\s*-\s*1\s*\)\s*\^")
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")


def _readings(text: str, both: str) -> list[_Reading]:
    """Shapes and units of the spellings that can be read; `both` texts decide what n may be."""
    found: list[_Reading] = []
    for spelling in _spellings(text, both):
        if based := re.fullmatch(
            r"\(?\s*([0-9A-Za-z]+)\s*\)?\s*_\s*\{?\s*([0-9]{1,2})\s*\}?", spelling
        ):
            try:
                found.append((("base", int(based[1], int(based[2]))), Fraction(1), ()))
            except ValueError:  # a digit too large for its base
                return []
            continue
        try:
            rest, size, kinds = measured(spelling)
            work = Work(whole=bool(_WHOLE.search(both)), real=not _IMAGINARY.search(both))
            found.append((shape_of(parse(rest), work), size, kinds))
        except Refused:
            continue
    return found


def _compare(a: str, b: str) -> tuple[bool, str, tuple[str, str]]:
    """(the same answer?, the rule that decided, their canonical forms)"""
    try:
        texts = clean(a), clean(b)
        first, second = (_readings(text, " ".join(texts)) for text in texts)
    except TooBig:
        return (
            a.strip() == b.strip() != "",
            "too big",
            (a.strip()[:MAX_CHARS], b.strip()[:MAX_CHARS]),
        )
    form_a, form_b = (
        key_of(found[0][0]) if found else words(text)
        for text, found in zip(texts, (first, second), strict=True)
    )
    forms = (form_a, form_b)
    plain = [re.sub(r'(?<!\d)\s+|\s+(?!\d)|"', "", text) for text in texts]
    if plain[0] == plain[1]:
        return plain[0] != "", "same text", forms
    if all(re.fullmatch(r"\d{1,2}:[0-5]\d\D*", text) for text in texts):  # 1:30 is not 2:60
        return False, "time", forms
    if not (first and second):
        return words(texts[0]) == words(texts[1]) != "", "words", forms
    return any(_same_measured(x, y) for x in first for y in second), first[0][0][0], forms


def _same_measured(a: _Reading, b: _Reading) -> bool:
    """Both with units: the same quantity. One without: the same number, or 50% = 1/2, 180° = π."""
    (shape_a, size_a, kind_a), (shape_b, size_b, kind_b) = a, b
    if kind_a and kind_b:
        return kind_a == kind_b and equal(scaled(shape_a, size_a), scaled(shape_b, size_b))
    for shape, kind, other in ((shape_a, kind_a, shape_b), (shape_b, kind_b, shape_a)):
        if kind == (("percent", 1),) and equal(scaled(shape, Fraction(1, 100)), other):
            return True
        if kind == (("angle", 1),) and equal(scaled(shape, context().pi / 180), other):
            return True
    return equal(shape_a, shape_b)


def same_answer(a: str, b: str) -> bool:
    """Do two extracted answers agree? (for voting)"""
    return _compare(a, b)[0]


def canonical(answer: str) -> str:
    """A key that equal answers share where possible: exact or 40-digit values, else the words."""
    return _compare(answer, answer)[2][0]


def _copied(answer: str, gold: str, question: str) -> bool:
    """Is the answer a formula of the question, in another form than the gold answer's?"""
    shown, wanted, asked = (
        re.sub(r"\s|\\[,;!]|\\left|\\right|\$|\.$", "", text) for text in (answer, gold, question)
    )
    if re.fullmatch(r"-?\d+|[A-Za-z]+", shown) or shown == wanted:
        return False
    return bool(re.search(r"(?<![0-9.])" + re.escape(shown) + r"(?![0-9])", asked))


def grade(
    response: str, gold: str, question: str | None = None, answer_format: str = "boxed"
) -> Verdict:
    """Is the response's final answer the gold answer? With `question`, copying is refused."""
    wanted, found = parse_gold(gold), extract(response, answer_format)
    if wanted is None or found is None:
        return Verdict(False, found, "", "", "no gold" if wanted is None else "no answer")
    same, rule, forms = _compare(found, wanted)
    if same and question and _copied(found, wanted, question):
        same, rule = False, "copied"
    return Verdict(same, found, *forms, rule)


# 3. Looking at the grader: an audit of gold answers, and the command line

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
    """How well a data set's gold answers can be graded, before a run is spent on them.

    `unusable` differ from themselves, `words` are no mathematics and compared as text;
    `false_negatives` and `false_positives` map a perturbation to [misjudged, tried].
    """
    answers = [answer for gold in golds if (answer := parse_gold(gold)) is not None]

    def misjudged(change: Callable[[str], str], paid: bool) -> list[int]:
        tried = [(new, answer) for answer in answers if (new := change(answer)) != answer]
        return [sum(same_answer(*pair) is paid for pair in tried), len(tried)]

    return {
        "n": len(golds),
        "unusable": [
            gold for gold in golds if not grade(rf"\boxed{{{parse_gold(gold)}}}", gold).correct
        ],
        "words": [answer for answer in answers if _compare(answer, "0")[1] in ("words", "too big")],
        "false_negatives": {name: misjudged(change, False) for name, change in _RESPELT.items()},
        "false_positives": {name: misjudged(change, True) for name, change in _CHANGED.items()},
    }


def _graded(row: dict[str, Any], answer_format: str) -> tuple[str, str, float]:
    """(outcome, rule, seconds) of one row; a surprise is shown and counted, never scored."""
    begin = time.perf_counter()
    try:
        verdict = grade(row["response"], row["gold"], row.get("question"), answer_format)
    except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError) as error:
        sys.stderr.write(f"error: {row.get('id')}: {error!r}\n")
        return "error", "", time.perf_counter() - begin
    seconds = time.perf_counter() - begin
    if row.get("label") is None:
        return "unlabelled", verdict.rule, seconds
    right = verdict.correct == bool(row["label"])
    outcome = f"{'true' if right else 'false'} {'positive' if verdict.correct else 'negative'}"
    if not right:
        sys.stderr.write(f"{outcome}: {row.get('id')} {verdict}\n")
    return outcome, verdict.rule, seconds


def main(arguments: list[str]) -> None:
    """A table by category, then one JSON line: `FILE.jsonl [answer_format=boxed|gsm8k|auto]`."""
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    files = [a for a in arguments if "=" not in a]
    if len(files) != 1 or set(options) - {"answer_format"}:
        raise UserError("usage: python -m rftt.rewards.grader FILE.jsonl [answer_format=auto]")
    with open(files[0], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    results = [_graded(row, options.get("answer_format", "auto")) for row in rows]
    table: dict[str, Counter[str]] = {}
    for row, (outcome, *_) in zip(rows, results, strict=True):
        for key in (row.get("category", "none"), "all"):
            table.setdefault(key, Counter())[outcome] += 1
    for category, count in sorted(table.items(), key=lambda item: (item[0] == "all", item[0])):
        sys.stdout.write(
            f"{category:16} {count.total():6} {_accuracy(count):7.3f}"
            f"  false + {count['false positive']:3}  false - {count['false negative']:3}\n"
        )
    times = sorted(1000 * seconds for *_, seconds in results) or [0.0]
    total = table.get("all", Counter())
    summary = {
        "n": len(rows),
        "accuracy": _accuracy(total),
        "false_positives": total["false positive"],
        "false_negatives": total["false negative"],
        "errors": total["error"],
        "timeouts": sum(rule == "too big" for _, rule, _ in results),  # no clock: the work bound
        "pairs_per_second": round(1000 * len(rows) / max(sum(times), 1e-9), 1),
        **{f"p{p}_ms": round(times[len(times) * p // 100], 3) for p in (50, 99)},
        "max_ms": round(times[-1], 3),
    }
    sys.stdout.write(json.dumps(summary) + "\n")


def _accuracy(count: Counter[str]) -> float:
    labelled = count.total() - count["unlabelled"]
    return (count["true positive"] + count["true negative"]) / max(1, labelled)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as problem:
        sys.exit(f"error: {problem}")
