"""The grader: is a response's final answer the gold answer? (the paper's rule-based outcome reward)

`extract` finds the answer, spelling.py gives it one spelling, reading.py says what it is worth,
`equal` compares. Departures from other graders: with variables, two answers are equal if they are
wherever both are defined among 12 fixed points, 4 at least; and all is bounded by construction, so
it is called inline, with no worker and no time-out. A verdict depends on nothing but its arguments.
"""

import json
import re
import sys
import time
from collections import Counter
from fractions import Fraction
from typing import Any, NamedTuple

from rftt.rewards.reading import EPS, MAX_ITEMS, MP, POINTS, Group, read, world
from rftt.rewards.spelling import MAX_CHARS, tokens, words
from rftt.schema import UserError


class Verdict(NamedTuple):
    correct: bool
    extracted: str | None
    answer_form: str  # `canonical` form of the extracted answer, and of the gold answer
    gold_form: str
    rule: str  # same text, value, words, time, base, copied, too big, no answer or no gold


# 1. Finding the answer

_INSIDE = r"(?:[^{}\\]|\\.)*+"
for _ in range(12):  # braces within braces
    _INSIDE = rf"(?:[^{{}}\\]|\\.|\{{{_INSIDE}\}})*+"
_HEAD = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BOX = re.compile(rf"(?s){_HEAD.pattern}(?:\{{({_INSIDE})\}}|([\w.,+-]*\w))")
_FILL = r"(?:[\s$]|\\[()\[\],;!]|\\q?quad|\b[A-Za-z](?:_\w)?\s*=)*"  # space, delimiters, a new name
_JOINT = re.compile(rf"{_FILL}(?:,|;|and|or|\\text\s*\{{\s*(?:and|or)\s*\}}){_FILL}")
_SAID = re.compile(r"(?i)answer(?:\s+is\s*:?|\s*:)\**\s*(.+)|(?:final answer|answer).*\bis\s+(.+)")
_LAST = re.compile(r"\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]|-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def _boxed(text: str) -> str | None:
    """The last box, if it is finished; boxes joined by a comma, `and` or `or` are one list."""
    found: list[re.Match[str]] = []
    at = later = len(text)
    while (at := max(text.rfind(name, 0, at) for name in ("\\boxed", "\\fbox", "\\framebox"))) >= 0:
        if not _HEAD.match(text, at):
            continue
        box = _BOX.match(text, at)
        if not box or not box.end() <= later or len(found) > MAX_ITEMS:
            break
        if found and not (later < box.end() + 60 and _JOINT.fullmatch(text, box.end(), later)):
            break
        found, later = [box, *found], at
    parts = [(box[2] or box[1]).strip() for box in found]
    return ", ".join(parts) if parts and all(parts) else None


def extract(response: str, answer_format: str = "boxed") -> str | None:
    """The final answer, or None. Only text after the last `<output>` counts.

    `boxed` wants a box; `gsm8k` wants `#### 18`; `auto` takes a box, else `####`, else "the answer
    is …", else the last formula or number. An unfinished box is no answer in any format.
    """
    if answer_format not in ("boxed", "gsm8k", "auto"):
        raise UserError(f"answer_format={answer_format!r}: use boxed, gsm8k or auto")
    text = re.sub(r"I hope it is correct\.?", "", response.rsplit("<output>", 1)[-1])
    if answer_format == "boxed" or (answer_format == "auto" and _HEAD.search(text)):
        return _boxed(text)
    if "####" in text or answer_format == "gsm8k":
        tail = text.rpartition("####")[2] if "####" in text else ""
        return tail.strip().split("\n")[0] or None
    lines = [line.strip() for line in text[-4 * MAX_CHARS :].split("\n") if line.strip()]
    for line in reversed(lines):
        if said := list(_SAID.finditer(line)):
            tail = re.split(r"\.(?:\s|$)|\s*<[|/]", said[-1][1] or said[-1][2])[0]
            return re.sub(r"(?i)^.*\bis\s+", "", tail).strip() or None
    if len(lines) == 1 and len(lines[0]) < 60 and " " not in lines[0]:
        return lines[0]
    return (_LAST.findall(lines[-1] if lines else "") or [None])[-1]


def parse_gold(gold: str) -> str | None:
    """Final answer of a gold field: a final answer, a solution with a box, or GSM8K's `#### 18`."""
    return _boxed(gold) or (extract(gold, "gsm8k") if "####" in gold else gold.strip() or None)


# 2. Comparing

_RELATIONS = {"=", "<", "≤", "<<", "<≤", "≤<", "≤≤", "∈", "≠", "∖"}


def _close(x: Any, y: Any) -> bool:
    """Equal but for rounding; a decimal of 12 digits may write out a number that has no end."""
    ends = [isinstance(n, Fraction) and 10**60 % n.denominator == 0 for n in (x, y)]
    long, other = (x, y) if ends[0] else (y, x)
    if ends[0] != ends[1] and long.denominator > 10**10 and abs(long.numerator) > 10**11:
        return abs(MP.convert(long) - MP.convert(other)) * long.denominator < 1
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = MP.convert(x), MP.convert(y)
    return x == y or abs(x - y) < 1000 * EPS * (max(abs(x), abs(y)) if x and y else 1)


def _named(shape: Any) -> bool:
    """Is this a list in which every member has its own name: AB = 4, CD = 5?"""
    parts = shape.parts if isinstance(shape, Group) and shape.kind == "{}" else ()
    names = [part.name for part in parts if isinstance(part, Group)]
    return 1 < len({*names} - {""}) == len(parts)


def equal(a: Any, b: Any) -> bool:
    """Are two shapes the same answer, as far as this world can tell?"""
    related = [isinstance(s, Group) and s.kind in _RELATIONS for s in (a, b)]
    names = [s.name if relation else "" for s, relation in zip((a, b), related, strict=True)]
    alike = ("(" in names[0]) == ("(" in names[1])  # f(x) = x+1 may be y = x+1, but x = 1 not y = 1
    if all(related) and alike and None not in (a.difference, b.difference):
        return a.kind == b.kind and _close(a.difference, b.difference)
    a, b = (s.parts[0] if relation else s for s, relation in zip((a, b), related, strict=True))
    kinds = [s.kind if isinstance(s, Group) else "" for s in (a, b)]
    if kinds == ["", ""]:
        return None not in (a, b) and _close(a, b)
    parts = [[*s.parts] if isinstance(s, Group) else [s] for s in (a, b)]
    if "{}" in kinds and _named(a) == _named(b):
        rest, others = (
            p if k == "{}" else [s] for p, k, s in zip(parts, kinds, (a, b), strict=True)
        )
        for part in others:
            found = [i for i, one in enumerate(rest) if equal(one, part)]
            if not found:
                return False
            del rest[found[0]]
        return not rest
    same = kinds[0] == kinds[1] or "{}" in kinds or {*kinds} in ({"&", "()"}, {"¶", "()"})
    return same and len(parts[0]) == len(parts[1]) and all(map(equal, *parts))


def _agree(a: tuple[str, ...], b: tuple[str, ...], marks: set[str], bare: bool = False) -> bool:
    """Are two answers equal wherever both are defined? If only one has a unit, also without it."""
    agreed, scales = 0, ({}, {})
    varied = any(world(t, marks, 0, bare) != world(t, marks, 1, bare) for t in (a, b))
    for point in range(POINTS if varied else 1):
        try:
            x, y = (read(t, marks, point, bare, s) for t, s in zip((a, b), scales, strict=True))
        except OverflowError:
            raise
        except (ArithmeticError, ValueError):
            continue
        if not equal(x, y):
            units = [world(t, marks, 0, False) != world(t, marks, 0, True) for t in (a, b)]
            return not bare and units[0] != units[1] and _agree(a, b, marks, True)
        agreed += 1
    return agreed >= (4 if varied else 1)


def _spellings(text: str, both: str) -> list[str]:
    """1,234 may be a number or a list; 2,74 a list or, beside 2.74, a decimal. Not in brackets."""
    if "," not in text or re.search(r"[(\[]|\\\{", text):
        return [text]
    thousands = r"(?<![\d,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)"
    found = [re.sub(thousands, lambda m: m[0].replace(",", ""), text), text]
    if re.fullmatch(r"\W*(?:\d+,(?:\d{1,2}|\d{4,})|0,\d+)\D*", text) and "." in both:
        found.append(text.replace(",", "."))
    return list(dict.fromkeys(found))


def _compare(a: str, b: str) -> tuple[bool, str]:
    """(the same answer?, the rule that decided)"""
    first, second = (), ()
    try:
        first, second = tokens(a), tokens(b)
        if first == second:
            return first != (), "same text"
        if all(re.fullmatch(r"\s*\d{1,2}:[0-5]\d\D*", text) for text in (a, b)):  # 1:30 is not 2:60
            return False, "time"
        joined = ["".join(first), "".join(second)]
        based = [re.fullmatch(r"\(?(\d[0-9A-Za-z]*)\)?_\{?(\d{1,2})\}?", text) for text in joined]
        if any(based):
            return len({int(m[1], int(m[2])) if m else -1 for m in based}) == 1, "base"
        marks = {*first, *second} | ({"(-1)^"} if "(-1)^" in "".join(joined) else set())
        pairs = [(tokens(x), tokens(y)) for x in _spellings(a, a + b) for y in _spellings(b, a + b)]
        return any(_agree(x, y, marks) for x, y in pairs), "value"
    except OverflowError:
        return a.strip() == b.strip() != "", "too big"
    except (SyntaxError, TypeError, ValueError):
        return words(first) == words(second) != "", "words"


def same_answer(a: str, b: str) -> bool:
    """Do two extracted answers agree? (for voting)"""
    return _compare(a, b)[0]


def _key(shape: Any) -> str:
    if isinstance(shape, Group) and shape.kind in _RELATIONS:
        return _key(shape.difference if shape.parts == (None,) else shape.parts[0])
    if isinstance(shape, Group):
        keys = (sorted if shape.kind == "{}" else list)(map(_key, shape.parts))
        return f"{shape.kind[0]}{', '.join(keys)}{shape.kind[-1]}"
    whole = isinstance(shape, Fraction) and shape.denominator == 1 and abs(shape) < 10**100
    return str(shape) if whole else str(MP.nstr(MP.convert(shape), 40)).removesuffix(".0")


def canonical(answer: str) -> str:
    """A key that equal answers share where possible: 40 digits at the first point, or words."""
    found: tuple[str, ...] = ()
    try:
        found = tokens(_spellings(answer, "")[0])
        return _key(read(found, {*found}, 0, True, {}))
    except OverflowError:
        return answer.strip()[:MAX_CHARS]
    except (ArithmeticError, SyntaxError, TypeError, ValueError):
        return words(found)


def _copied(answer: str, gold: str, question: str) -> bool:
    """Is the answer a formula of the question, in another form than the gold answer's?"""
    drop = re.compile(r"\s|\\[,;!]|\\left|\\right|\$|\.$")
    shown, wanted, asked = (drop.sub("", text) for text in (answer, gold, question))
    if re.fullmatch(r"-?\d+|[A-Za-z]+", shown) or shown == wanted:
        return False
    return bool(re.search(rf"(?<![0-9.]){re.escape(shown)}(?![0-9])", asked))


def grade(
    response: str, gold: str, question: str | None = None, answer_format: str = "boxed"
) -> Verdict:
    """Is the response's final answer the gold answer? With `question`, copying is refused."""
    wanted, found = parse_gold(gold), extract(response, answer_format)
    if wanted is None or found is None:
        return Verdict(False, found, "", "", "no gold" if wanted is None else "no answer")
    same, rule = _compare(found, wanted)
    if same and question and _copied(found, wanted, question):
        same, rule = False, "copied"
    return Verdict(same, found, canonical(found), canonical(wanted), rule)


# 3. The command line


def main(arguments: list[str]) -> None:
    """A table by category, then one JSON line: `FILE.jsonl [answer_format=boxed|gsm8k|auto]`.

    Milliseconds are CPU time: other work on the machine does not count.
    """
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    files = [a for a in arguments if "=" not in a]
    if len(files) != 1 or {*options} - {"answer_format"}:
        raise UserError("usage: python -m rftt.rewards.grader FILE.jsonl [answer_format=auto]")
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


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as problem:
        sys.exit(f"error: {problem}")
