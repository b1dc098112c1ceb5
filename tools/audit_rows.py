r"""Audit the training rows that search.py writes in phase 1, before a model learns from them.

    python tools/audit_rows.py outputs/mine/search/data/sft.jsonl [samples=5] [max_cut_off=0.1 …]

Print, per act and kind of row, numbers, lengths, repeated texts and refusals, then what each rule
finds, and rows to read. The exit code is 1 if a share exceeds its bound, with a line per bound.

The rules do not import run/contract.py, which decides what becomes a step: they are written anew
from what a row must be, so that the audit checks the contract. Only the texts of the prompts and
the grader are the same.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import Field

sys.path.insert(0, str(Path(__file__).parents[1]))
from rftt.graders.math import grade
from rftt.prompts import Prompts
from rftt.run.cli import cli
from rftt.run.columns import as_text, steps_in
from rftt.run.config import LocalPath, Share, config_class
from rftt.run.files import Row, read_jsonl
from rftt.run.log import number, say
from rftt.run.prompts_file import load_prompts
from rftt.tokens import ACTS
from rftt.types import UserError
from tools.run_folder import read_json

KINDS = ("merged", "plain")
RUN = 8
"""Words in a row that a step may not share with a prompt, unless the question contains them."""


@config_class
class AuditConfig:
    """tools/audit_rows.py: audit the rows of phase 1. Each bound is a share of the rows."""

    rows_file: LocalPath
    """The rows: data/sft.jsonl of a search. stats.json of the same search is read as well."""
    prompts_file: LocalPath | None = None
    """Prompts of the search, if they were not rftt/prompts.yaml."""
    samples: Annotated[int, Field(ge=0, le=1000)] = 5
    """Number of rows per kind that are printed in full, and of examples per rule."""
    max_apology: Share = 0.0
    """Rows that apologise or say what the model cannot do."""
    max_instruction: Share = 0.0
    """Rows that repeat an instruction, a role, an example or a fixed part of a prompt."""
    max_prompt_talk: Share = 0.0
    """Rows that mention the prompt or a continuation, or address the user."""
    max_control_text: Share = 0.0
    """Rows that contain functional tokens or control text of a chat template as text."""
    max_incomplete_merge: Share = 0.0
    """Merged rows that are not wrong steps, a verify, a refine and right steps, in this order."""
    max_wrong_answer: Share = 0.0
    """Rows that do not end with an output that the grader accepts."""
    max_cut_off: Share = 0.05
    """Rows with a step that is empty or ends within a sentence, a formula or a pair of brackets."""
    max_heading: Share = 0.05
    """Rows with a heading such as "Step 3:" or "Sure,", or with Markdown emphasis."""
    max_borrowed: Share = 0.05
    """Rows that put two or more things of an example's question into another problem."""
    max_early_answer: Share = 0.05
    """Rows that state the answer in clarify or analysis."""
    max_verify_answer: Share = 0.05
    """Rows whose verify states the gold answer, which no earlier text contains."""
    max_verify_empty: Share = 0.05
    """Rows whose verify names no number or calculation that only the wrong steps contain."""
    max_long_refine: Share = 0.05
    """Rows whose refine has more than one sentence."""
    max_duplicate: Share = 0.05
    """Rows that repeat the question and all texts of an earlier row."""
    max_repeated: Share = 0.2
    """Rows with a step, output aside, whose text is also in a row of another problem."""
    min_merged: Share = 0.15
    """Merged rows per problem with right and wrong paths. It needs stats.json."""


def main(cfg: AuditConfig) -> None:
    rows = read_rows(cfg.rows_file)
    stats = read_stats(Path(cfg.rows_file))
    found = audit(rows, load_prompts(cfg.prompts_file))
    for line in (*act_table(rows, stats), "", *merged_lines(rows, stats), ""):
        say(line)
    for line in rule_table(found, len(rows), cfg):
        say(line)
    for line in samples(rows, cfg.samples):
        say(line)
    exceeded = [*exceeded_bounds(found, len(rows), cfg), *too_few_merged(rows, stats, cfg)]
    for line in exceeded:
        say(line)
    if exceeded:
        raise SystemExit(1)


# ---- Read ----


def read_rows(path: str) -> list[Row]:
    """Return the rows of a search. Raises UserError for rows of another shape."""
    rows = []
    for line, row in read_jsonl(path):
        place = f"{path}:{line}"
        if row.get("kind") not in KINDS:
            raise UserError(
                f"{place} must be a row of search.py's trees with kind plain or merged, got "
                f"{row.get('kind')!r}; name data/sft.jsonl of a search with method=mcts."
            )
        missing = [key for key in ("id", "question", "answer", "steps") if row.get(key) is None]
        if missing:
            raise UserError(f"{place} must have {missing[0]!r}, which is missing; correct the row.")
        if not isinstance(row["question"], str):
            raise UserError(f"{place}: 'question' must be text; correct the row.")
        row["answer"] = as_text(row["answer"], "answer", place) or ""
        for step in steps_in(row["steps"], place):
            if step["act"] not in ACTS:
                raise UserError(
                    f"{place}: 'act' must be one of {', '.join(ACTS)}, got {step['act']!r:.80}; "
                    "correct the row."
                )
        rows.append(row)
    return rows


def read_stats(rows_file: Path) -> Row | None:
    """Return stats.json of the search, which is in the folder above data/, or None."""
    path = rows_file.absolute().parents[1] / "stats.json"
    if not path.exists():
        return None
    stats = read_json(path)
    if not (isinstance(stats.get("problems"), int) and isinstance(stats.get("counts"), dict)):
        raise UserError(f"{path} must contain problems and counts; run search.py again.")
    return stats


# ---- Rules: what a step, or a row, may not be ----


@dataclass(frozen=True)
class Place:
    """A step with what stands around it."""

    row: Row
    index: int

    @property
    def act(self) -> str:
        return self.row["steps"][self.index]["act"]

    @property
    def text(self) -> str:
        return self.row["steps"][self.index]["text"]

    @property
    def before(self) -> str:
        """The question and all steps before this one."""
        steps = self.row["steps"][: self.index]
        return "\n".join([self.row["question"], *(step["text"] for step in steps)])


APOLOGY = re.compile(
    r"\b(?:sorry|apolog\w+|unfortunately|i(?: am|'m) (?:afraid|unable)|we(?: are|'re) unable"
    r"|(?:i|we) (?:do not|don't) (?:understand|know)|i (?:cannot|can't|can not)"
    r"|(?:cannot|can't) (?:help|assist|answer|solve|provide|determine))\b",
    re.I,
)
PROMPT_TALK = re.compile(
    r"\b(?:continuations?|prompts?|instruct(?:ions?|ed)|the examples?|as an ai|language model"
    r"|assistant|the user|you|your|yours|let me know|feel free|hope (?:this|that) helps"
    r"|solution so far|nothing yet|problem statement|here(?: is|'s) (?:the|a|an|my)"
    r"|(?:my|the) (?:next|right|correct|wrong|given|previous|above) (?:steps|solution|response)"
    r"|(?:steps|solution|response|problem|question) (?:is |are |was |were )?provided"
    r"|provided (?:steps|solution|response|problem|question|information)"
    r"|(?:solution|response|option|attempt) [AB12])\b",
    re.I,
)
CONTROL_TEXT = re.compile(
    r"<\|[^|\n]{1,40}\|>|</?(?:s|think|bos|eos|pad|unk|start_of_turn|end_of_turn|"
    + "|".join(ACTS)
    + r")>|\[/?INST\]|<<SYS>>"
)
HEADING = re.compile(
    r"^\W{0,4}(?:(?:the )?(?:next |first |second |last |final |sub-?)?"
    r"(?:step|question|answer|solution|analysis|explanation|clarification|problem|verification)"
    r"(?: ?\d{1,3})?\s?[:.]\s|(?:step|part) \d|#{1,6} |sure\b|certainly\b|of course\b|okay\b"
    r"|great\b)|\*\*",
    re.I | re.M,
)
OPEN_END = re.compile(
    r"(?:[,:;(\[{=+*/<-]|\\|\b(?:the|a|an|of|and|or|to|is|are|so|we|with|for|by|from|that|if"
    r"|because|then|which|equals|plus|minus))$",
    re.I,
)
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)[.!?][\"')]*\s+[\"'(]*[A-Z\\$0-9]|\n")
PAIRS = ("()", "[]", "{}")
DIGITS = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
OPERATION = re.compile(r"(?<![\d.])(?=(\d+(?:\.\d+)?[-+*/=]\d+(?:\.\d+)?))")
STATED = re.compile(
    r"\\boxed|\b(?:final )?answer (?:is|=|should be|would be|will be)\W{0,3}\d", re.I
)


def straight(text: str) -> str:
    """Return a text with straight apostrophes and quotation marks."""
    return text.translate(str.maketrans("’‘“”", "''\"\""))


def said_first(pattern: re.Pattern[str], place: Place) -> str | None:
    """Return the first match in a step that the question does not contain."""
    question = place.row["question"].lower()
    for match in pattern.finditer(straight(place.text)):
        if match[0].lower() not in straight(question):
            return match[0]
    return None


def cut_off(place: Place) -> str | None:
    text = place.text.strip()
    if not text:
        return "no text"
    if OPEN_END.search(text):
        return f"ends with {text[-12:]!r}"
    for opened, closed in PAIRS:
        if text.count(opened) > text.count(closed):
            return f"{opened} without {closed}"
    return None


def numbers(text: str) -> set[float]:
    """Return the values of all numbers in a text: 1,200 and 1200.0 are the same one."""
    return {float(found.replace(",", "")) for found in DIGITS.findall(text)}


def operations(text: str) -> set[str]:
    r"""Return pairs of numbers with the sign between them.

    >>> sorted(operations(r"$48 \\times 3 = 144"))
    ['3=144', '48*3']
    """
    text = re.sub(r"\\times|\\cdot|[×·]|(?<=\d) x (?=\d)", "*", text)
    text = re.sub(r"\\div|÷", "/", text).replace("−", "-")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return set(OPERATION.findall(re.sub(r"[\s$\\]", "", text)))


def gold_value(row: Row) -> float | None:
    text = row["answer"].replace(",", "").strip()
    return float(text) if re.fullmatch(r"-?\d+(?:\.\d+)?", text) else None


def early_answer(place: Place) -> str | None:
    """Find the answer where the solver should only prepare."""
    if place.act not in ("clarify", "analysis"):
        return None
    if stated := STATED.search(place.text):
        return stated[0]
    return known_answer(place)


def known_answer(place: Place) -> str | None:
    """Return the gold answer if a step is the first text that contains it."""
    gold = gold_value(place.row)
    if gold is None:
        answer = place.row["answer"].strip()
        new = len(answer) > 2 and answer in place.text and answer not in place.before
        return answer if new else None
    return number(gold) if abs(gold) in numbers(place.text) - numbers(place.before) else None


def verify_answer(place: Place) -> str | None:
    if place.act != "verify":
        return None
    stated = STATED.search(place.text)
    return stated[0] if stated else known_answer(place)


def verify_empty(place: Place) -> str | None:
    """Check that a verify names something that only the wrong steps contain."""
    if place.act != "verify" or place.row["kind"] != "merged":
        return None
    steps = place.row["steps"]
    wrong = "\n".join(step["text"] for step in steps if step.get("wrong"))
    own = ("verify", "refine", "output")
    right = [s["text"] for s in steps if not s.get("wrong") and s["act"] not in own]
    known = "\n".join([place.row["question"], *right])
    named = numbers(place.text) & (numbers(wrong) - numbers(known))
    named_operations = operations(place.text) & (operations(wrong) - operations(known))
    return None if named or named_operations else "names nothing of the wrong steps"


def long_refine(place: Place) -> str | None:
    if place.act != "refine":
        return None
    return "several sentences" if SENTENCE_END.search(place.text.strip()) else None


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", straight(text).lower())


def runs(text: str, n: int = RUN) -> set[str]:
    found = words(text)
    return {" ".join(found[i : i + n]) for i in range(len(found) - n + 1)}


@dataclass(frozen=True)
class Shown:
    """What the prompts of phase 1 show to the model."""

    runs: set[str]
    """All runs of `RUN` words of roles, instructions and examples."""
    whole: list[str]
    """Instructions, and fixed parts of templates of two words and more, as words."""
    things: set[str]
    """Longer words of the examples' questions."""


def shown_by(prompts: Prompts) -> Shown:
    parts, whole, things = list[str](), list[str](), set[str]()
    for prompt in prompts.acts.values():
        parts += [prompt.system, prompt.instruction]
        whole.append(prompt.instruction)
        for example in prompt.examples:
            parts += [example.question, example.reply]
            things |= {word for word in words(example.question) if len(word) > 4}
    for template in prompts.templates.values():
        whole += [part for part in re.split(r"\{\w+\}|\n", template) if len(words(part)) > 1]
    every_run = {run for part in parts for run in runs(part)}
    return Shown(every_run, [" ".join(words(part)) for part in whole], things)


def instruction(shown: Shown, place: Place) -> str | None:
    text = f" {' '.join(words(place.text))} "
    for part in shown.whole:
        if f" {part} " in text:
            return part
    return next(iter(sorted((runs(place.text) & shown.runs) - runs(place.before))), None)


def borrowed(shown: Shown, place: Place) -> str | None:
    foreign = (shown.things & set(words(place.text))) - set(words(place.before))
    return ", ".join(sorted(foreign)) if len(foreign) > 1 else None


STEP_RULES: dict[str, Callable[[Place], str | None]] = {
    "apology": lambda place: said_first(APOLOGY, place),
    "prompt_talk": lambda place: said_first(PROMPT_TALK, place),
    "control_text": lambda place: said_first(CONTROL_TEXT, place),
    "cut_off": cut_off,
    "heading": lambda place: said_first(HEADING, place),
    "early_answer": early_answer,
    "verify_answer": verify_answer,
    "verify_empty": verify_empty,
    "long_refine": long_refine,
}
"""Rule -> function that returns what is wrong with a step, or None."""


def incomplete_merge(row: Row) -> str | None:
    """Check that a merged row goes wrong, finds out, goes back, and goes right."""
    if row["kind"] != "merged":
        return None
    kinds = ""
    for step in row["steps"]:
        letter = {"verify": "v", "refine": "r", "output": "o"}.get(step["act"], "s")
        kinds += "w" if step.get("wrong") else letter
    return None if re.fullmatch(r"s*w+vrs+o", kinds) else f"order of steps {kinds}"


def wrong_answer(row: Row) -> str | None:
    if row["steps"][-1:] == [] or row["steps"][-1]["act"] != "output":
        return "no output at the end"
    verdict = grade(row["steps"][-1]["text"], row["answer"], row["question"])
    return None if verdict.correct else f"{verdict.extracted!r} instead of {row['answer']!r}"


# ---- Audit ----

Finding = tuple[int, str]
"""(index of a row, what was found in it)"""


def audit(rows: Sequence[Row], prompts: Prompts) -> dict[str, list[Finding]]:
    """Return rule -> findings, at most one for a row."""
    shown = shown_by(prompts)
    rules = STEP_RULES | {
        "instruction": lambda place: instruction(shown, place),
        "borrowed": lambda place: borrowed(shown, place),
    }
    found = {name: list(findings(rows, rule)) for name, rule in rules.items()}
    for name, check in (("incomplete_merge", incomplete_merge), ("wrong_answer", wrong_answer)):
        checked = [(i, check(row)) for i, row in enumerate(rows)]
        found[name] = [(i, told) for i, told in checked if told is not None]
    found["duplicate"] = duplicates(rows)
    found["repeated"] = repeated(rows)
    return found


def findings(rows: Sequence[Row], rule: Callable[[Place], str | None]) -> Iterator[Finding]:
    for i, row in enumerate(rows):
        for index, step in enumerate(row["steps"]):
            told = rule(Place(row, index))
            if told is not None:
                yield i, f"{step['act']}: {told!s:.60} | {step['text']:.160}"
                break


def duplicates(rows: Sequence[Row]) -> list[Finding]:
    seen: dict[tuple[str, ...], int] = {}
    found = []
    for i, row in enumerate(rows):
        key = (row["question"], *(step["text"].strip() for step in row["steps"]))
        if key in seen:
            found.append((i, f"the same as row {seen[key]}"))
        seen.setdefault(key, i)
    return found


BARE_ANSWER = re.compile(r"(?:so )?(?:the (?:final )?answer is )?\$?\\boxed\{[^{}]*\}\$?\.?", re.I)
"""A step that only states an answer."""


def problems_by_text(rows: Sequence[Row]) -> dict[tuple[str, str], set[str]]:
    """Return (act, text) -> questions of the rows that contain it.

    Outputs and other steps that only state an answer are alike by nature and left out.
    """
    problems: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for step in row["steps"]:
            if step["act"] != "output" and not BARE_ANSWER.fullmatch(step["text"]):
                problems.setdefault((step["act"], step["text"]), set()).add(row["question"])
    return problems


def rows_by_text(rows: Sequence[Row]) -> Counter[tuple[str, str]]:
    """Return (act, text) -> number of rows that contain it."""
    return Counter(key for row in rows for key in {(s["act"], s["text"]) for s in row["steps"]})


def repeated(rows: Sequence[Row]) -> list[Finding]:
    problems = problems_by_text(rows)
    found = []
    for i, row in enumerate(rows):
        for step in row["steps"]:
            n = len(problems.get((step["act"], step["text"]), ()))
            if n > 1:
                found.append((i, f"{step['act']}: in {n} problems | {step['text']:.160}"))
                break
    return found


# ---- Print ----


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> list[str]:
    """Return a Markdown table, whose columns are aligned for a terminal as well."""
    cells = [[str(cell) for cell in line] for line in (head, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]


def act_table(rows: Sequence[Row], stats: Row | None) -> list[str]:
    """Return the table per act and kind of row. The table of refusals needs stats.json."""
    n_rows, problems = rows_by_text(rows), problems_by_text(rows)
    lines: list[tuple[Any, ...]] = []
    for kind in KINDS:
        whole = ["\n".join(s["text"] for s in row["steps"]) for row in rows if row["kind"] == kind]
        if whole:
            lines.append((f"{kind} rows", "", len(whole), spread(whole), "", ""))
    for act in ACTS:
        for kind in KINDS:
            own = [row["steps"] for row in rows if row["kind"] == kind]
            texts = [s["text"] for steps in own for s in steps if s["act"] == act]
            if texts:
                again = sum(n_rows[act, text] > 1 for text in texts) / len(texts)
                shared = sum(len(problems.get((act, text), ())) > 1 for text in texts) / len(texts)
                shares = number(again), "" if act == "output" else number(shared)
                lines.append((act, kind, len(texts), spread(texts), *shares))
    shares = "in several rows", "in several problems"
    told = table(("act", "rows", "number", "words, median / max", *shares), lines)
    if stats:
        told += ["", *table(("act", "refused", "reasons"), refusals_by_act(stats))]
    return told


def spread(texts: Sequence[str]) -> str:
    """Return the median and the largest number of words."""
    lengths = [len(text.split()) for text in texts]
    return f"{number(median(lengths))} / {max(lengths)}"


def refusals_by_act(stats: Row) -> list[tuple[str, int, str]]:
    """Return (act, refused replies, number by reason) for each act that was refused a reply."""
    counts: Row = stats["counts"]
    lines = []
    for act in ACTS:
        start = f"contract_{act}_"
        reasons = {k.removeprefix(start): n for k, n in counts.items() if k.startswith(start) and n}
        if reasons:
            told = sorted(reasons.items(), key=lambda item: -item[1])
            by_reason = ", ".join(f"{name} {n}" for name, n in told)
            lines.append((act, sum(reasons.values()), by_reason))
    return lines


def with_both(stats: Row) -> int:
    """Return the number of problems with usable right and wrong paths, by curation's counts."""
    reasons = ("no_correct_path", "no_wrong_path", "prompt_too_long")
    return stats["problems"] - sum(stats["counts"].get(reason, 0) for reason in reasons)


def merged_share(rows: Sequence[Row], stats: Row | None) -> float | None:
    """Return the merged rows per problem with right and wrong paths; None if this is not known."""
    if stats is None or with_both(stats) < 1:
        return None
    return sum(row["kind"] == "merged" for row in rows) / with_both(stats)


def merged_lines(rows: Sequence[Row], stats: Row | None) -> list[str]:
    n_merged = sum(row["kind"] == "merged" for row in rows)
    problems = len({row["question"] for row in rows})
    told = f"{len(rows)} rows of {problems} problems, {n_merged} of them merged"
    if stats is None:
        return [f"{told}; no stats.json, so refusals and problems without rows are not known"]
    share = merged_share(rows, stats)
    per_problem = "none" if share is None else number(share)
    return [
        f"{told}; {stats['problems']} problems were searched",
        f"merged rows per problem with right and wrong paths ({with_both(stats)}): {per_problem}",
    ]


def bound_of(cfg: AuditConfig, rule: str) -> float:
    return getattr(cfg, f"max_{rule}")


def rule_table(found: dict[str, list[Finding]], n_rows: int, cfg: AuditConfig) -> Iterator[str]:
    """Yield the table of all rules, then examples of what they found."""
    lines = [
        (rule, len(hits), number(len(hits) / n_rows), number(bound_of(cfg, rule)))
        for rule, hits in found.items()
    ]
    yield from table(("rule", "rows", "share", "bound"), lines)
    for rule, hits in found.items():
        for i, told in hits[: cfg.samples]:
            yield f"{rule}: row {i}, {' '.join(told.split())}"


def samples(rows: Sequence[Row], n: int) -> Iterator[str]:
    """Yield `n` rows of each kind in full, evenly spread over the file."""
    for kind in KINDS:
        own = [(i, row) for i, row in enumerate(rows) if row["kind"] == kind]
        picked = own[:: max(1, len(own) // n)][:n] if n else []
        for i, row in picked:
            yield f"\n---- row {i}, {kind}, problem {row['id']}, gold answer {row['answer']}"
            yield row["question"]
            for step in row["steps"]:
                mark = " (wrong)" if step.get("wrong") else ""
                yield f"<{step['act']}>{mark} {step['text']}"


def exceeded_bounds(
    found: dict[str, list[Finding]], n_rows: int, cfg: AuditConfig
) -> Iterator[str]:
    for rule, hits in found.items():
        share, bound = len(hits) / n_rows, bound_of(cfg, rule)
        if share > bound:
            yield (
                f"fail: {rule} in {len(hits)} of {n_rows} rows ({number(share)}), at most "
                f"max_{rule}={number(bound)} allowed"
            )


def too_few_merged(rows: Sequence[Row], stats: Row | None, cfg: AuditConfig) -> Iterator[str]:
    share = merged_share(rows, stats)
    if share is not None and share < cfg.min_merged:
        yield (
            f"fail: {number(share)} merged rows per problem with right and wrong paths, at least "
            f"min_merged={number(cfg.min_merged)} required"
        )


def arguments(argv: Sequence[str]) -> list[str]:
    """Return the arguments with the name of the file, which comes first, as a key."""
    if argv and not argv[0].startswith(("-", "rows_file=")):
        return [f"rows_file={argv[0]}", *argv[1:]]
    return list(argv)


if __name__ == "__main__":
    cli(main, AuditConfig, arguments(sys.argv[1:]))
