"""Foreign text: whatever applies an expression to it reads it in linear time.

Work is measured in CPU seconds and never by a clock on the wall. A linear function takes a small
part of a second for 200,000 characters and passes at once. For any other, the time for 200,000 is
compared with that for 50,000: linear work takes 4 times as long and quadratic work 16 times.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from functools import partial
from time import process_time
from typing import Any

import pytest

from rftt.curate import repeats
from rftt.engines.templates import apart, holds_control_text, neutral, with_date, with_settings
from rftt.engines.vocabulary import cpu_limit
from rftt.graders import audit
from rftt.graders.math import canonical, extract, grade, parse_gold
from rftt.graders.prm import Unscored
from rftt.prompts import question_messages, sentences
from rftt.run import columns, files, tables
from rftt.run.contract import best_check, breach, clean, leaks, nameable, trimmed
from rftt.run.filters import ngrams, script_ratio
from rftt.run.prompts_file import load_prompts
from rftt.run.rejection import segments, step_texts
from rftt.tokens import ACTS
from rftt.types import UserError
from tests.test_house import PACKAGE, SCRIPTS, TOOLS, name_of, tree_of
from tools import report
from tools.prm_serve import parse
from tools.tiny_world import PROMPTS as TINY_PROMPTS
from tools.tiny_world import build_tokenizer

pytestmark = pytest.mark.cases
LENGTH = 200_000
QUICK = 0.5
"""CPU seconds below which 200,000 characters were certainly not read in quadratic time."""
TOKENIZER, PROMPTS = build_tokenizer(), load_prompts()


def read_replies(text: str) -> None:
    for act in ACTS:
        clean(PROMPTS, act, f"a\n{text}a")
    control = partial(holds_control_text, TOKENIZER, functional=True)
    breach(TINY_PROMPTS, "verify", text, control, question=text, so_far=text)
    trimmed(text, lambda _: "refused")
    best_check([text], nameable(text, "1", "1"))
    leaks(text, "7", text)
    sentences(text)
    repeats([text])


def read_answers(text: str) -> None:
    extract(text)
    canonical(text)
    parse_gold(text)
    grade(text, "7", text)
    audit.audit([text])
    audit.audit([f"1{', 1' * (len(text) // 3)}{text[:9]}"])


def read_rows(text: str) -> None:
    row: files.Row = {"question": text, "answer": text, "response": text}
    columns.filled(row, "{question}", "row")
    columns.question_of(row, None, "row", None)
    columns.gold_texts(row, None, "row")
    tables.name_of(f"hf:{text}")


def read_template(text: str) -> None:
    with_settings(text, {"a": 1})
    with_date(text, date(2026, 1, 1))


READERS: dict[str, Callable[[str], Any]] = {
    "replies": read_replies,
    "answers": read_answers,
    "filters": lambda text: (script_ratio(text, ["latin"]), ngrams(text)),
    "segments": lambda text: (segments(text), step_texts(text)),
    "control text": lambda text: holds_control_text(TOKENIZER, text, functional=True),
    "questions": lambda text: apart(TOKENIZER, question_messages(text)),
    "questions to servers": lambda text: neutral(TOKENIZER, question_messages(text)),
    "templates": read_template,
    "rows": read_rows,
    "JSON array": lambda text: list(tables._read_json(f"[{text}", "a.json")),
    "JSON lines": lambda text: files.parse_lines(text, "a.jsonl"),
    "CSV": lambda text: list(tables._read_csv(text, "a.csv", ",")),
    "PRM server": lambda text: parse(json.dumps({"input": text}).encode(), LENGTH),
    "report": lambda text: (report.sample_lines({"response": text}), report.inert(text)),
    "terminal": lambda text: (files.printable(text), files.one_line(text)),
}
UNITS = (
    *(" ", "\n", "7", "1,", "1+1=", "{", "}", "<", "[", "(", "\\(", "\\[", "$", '"', "`", "\\"),
    *("a ", "A. ", "1..", "a\n \t", "é", "<|", "<|end|>", "<verify>", "</verify>", "\\boxed{"),
    *("\\frac", "# ", "1\n\n", "Step 1: ", "ки", "{# rftt settings #}", "strftime_now('"),
    *("the answer is ", '{"a":1},'),
)
"""What 200,000 characters of foreign text are made of."""


def cost(read: Callable[[str], Any], unit: str, length: int) -> float:
    """CPU seconds for `length` characters; refused text counts like any other."""
    text = unit * (length // len(unit)) + "!"
    begin = process_time()
    with suppress(UserError, Unscored, ValueError):
        read(text)
    return process_time() - begin


def is_linear(read: Callable[[str], Any], unit: str) -> bool:
    """Four times the text, less than eight times the cost: the best of three tries."""
    for _ in range(3):  # other processes share the caches
        with suppress(TimeoutError), cpu_limit(4):
            whole = cost(read, unit, LENGTH)
            if whole < QUICK or whole < 8 * cost(read, unit, LENGTH // 4):
                return True
    return False


@pytest.mark.parametrize("name", READERS)
def test_foreign_text_is_read_in_linear_time(name: str) -> None:
    assert [unit for unit in UNITS if not is_linear(READERS[name], unit)] == []


def test_quadratic_work_is_found() -> None:
    assert not is_linear(re.compile(r"<a>(.*?)</a>").findall, "<a>")


READ_HERE = {
    *(
        "rftt/run/contract.py",
        "rftt/prompts.py",
        "rftt/engines/templates.py",
        "rftt/graders/audit.py",
    ),
    *("rftt/graders/math.py", "rftt/run/columns.py", "rftt/run/filters.py", "rftt/run/tables.py"),
    *("rftt/run/rejection.py", "rftt/run/files.py", "tools/report.py"),
}
READ_ELSEWHERE = {
    "rftt/graders/latex.py": "tests/test_math.py feeds each of its patterns",
    "rftt/run/cli.py": "the text of an error, of bounded size",
    "rftt/graders/prm_local.py": "names of tensors in the header of a weight file",
    "rftt/run/prompts_file.py": "the user's own file, of bounded size",
    "tools/prm_serve.py": "the words of the command line",
    "tools/audit_rows.py": "the user's own rows of phase 1",
}


def test_no_module_with_expressions_escapes_the_test() -> None:
    found = {
        name_of(path)
        for path in (*PACKAGE, *SCRIPTS, *TOOLS)
        if any(
            isinstance(node, ast.Import) and any(alias.name == "re" for alias in node.names)
            for node in ast.walk(tree_of(path))
        )
    }
    assert found == READ_HERE | set(READ_ELSEWHERE)
