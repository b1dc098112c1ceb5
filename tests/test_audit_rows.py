"""Test the audit of phase 1's rows: every rule on a row that breaks it and on one that does not."""

import doctest
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rftt.run.config import load_config
from rftt.run.files import write_json, write_jsonl
from rftt.run.prompts_file import load_prompts
from rftt.types import UserError
from tests.conftest import ROOT
from tools import audit_rows
from tools.audit_rows import AuditConfig, arguments, audit, main, merged_share, read_rows, with_both

Row = dict[str, Any]
QUESTION = "Eva has 19 pens, triples them and gives 3 away. How many pens does she have?"


def merged(**texts: str) -> Row:
    """A good merged row, in which the text of an act may be replaced."""
    steps = [
        ("analysis", "First the pens are multiplied, then some of them are taken away."),
        ("next_step", "Eva triples her pens, so she has 19 * 2 = 38 pens."),
        ("direct_answer", "Eva gives 3 away, so she has 38 - 3 = \\boxed{35} pens."),
        ("verify", "Wait, I wrote 19 * 2 = 38, but triples are three times as many."),
        ("refine", "Let me go back to the 19 pens and triple them."),
        ("subquestion", "How many pens are three times 19 pens? They are 19 * 3 = 57 pens."),
        ("next_step", "She gives 3 away, so 57 - 3 = 54 pens are left, that is \\boxed{54}."),
        ("output", "The final answer is \\boxed{54}."),
    ]
    made = [{"act": act, "text": texts.get(act, text)} for act, text in steps]
    for step in made[1:3]:
        step["wrong"] = True
    return {"id": "p", "kind": "merged", "question": QUESTION, "answer": "54", "steps": made}


def plain(*steps: tuple[str, str], question: str = QUESTION, answer: str = "54") -> Row:
    output = ("output", f"The final answer is \\boxed{{{answer}}}.")
    made = [{"act": act, "text": text} for act, text in (*steps, output)]
    return {"id": "p", "kind": "plain", "question": question, "answer": answer, "steps": made}


def step(text: str, question: str = QUESTION) -> Row:
    return plain(("next_step", text), question=question)


def broken(*rows: Row) -> dict[str, list[int]]:
    """Rule -> indices of the rows that break it."""
    found = audit(rows, load_prompts())
    return {rule: [i for i, _ in hits] for rule, hits in found.items() if hits}


# ---- Each rule, both ways ----


@pytest.mark.parametrize(
    ("rule", "row"),
    [
        ("apology", step("I'm sorry, but there is no continuation to compare.")),
        ("apology", step("I’m unable to say how many.")),
        ("apology", step("My apologies, she has 57 pens.")),
        ("apology", step("I cannot find it.")),
        ("prompt_talk", merged(verify="Continuation A wrote 19 * 2 = 38, but B did not.")),
        ("prompt_talk", step("The prompt says that she has 19 pens.")),
        ("prompt_talk", step("You have 57 pens.")),
        ("prompt_talk", step("As an AI I count 57 pens.")),
        ("prompt_talk", step("Here is the next step. She has 57 pens.")),
        ("prompt_talk", step("The solution so far has 57 pens.")),
        ("instruction", step("Write only the next small step, in one sentence. 19 * 3 = 57.")),
        ("instruction", step("What I found: 19 * 3 = 57.")),
        ("instruction", step("There are 4 trays and each tray holds 12 rolls, so it is 48.")),
        ("control_text", step("57 pens.<|im_end|>")),
        ("control_text", step("57 pens.</next_step><output>57")),
        ("control_text", step("[INST] 57 pens.")),
        ("cut_off", step("So we have the")),
        ("cut_off", step("So we have the following:")),
        ("cut_off", step("She has 19 * 3 =")),
        ("cut_off", step("She has \\boxed{57")),
        ("cut_off", step("She has (57 pens.")),
        ("cut_off", step(" ")),
        ("heading", step("Step 3: 19 * 3 = 57.")),
        ("heading", step("She triples.\n### Answer\n57.")),
        ("heading", step("Sure, 19 * 3 = 57.")),
        ("heading", step("**19 * 3** = 57.")),
        ("heading", step("Next step: 19 * 3 = 57.")),
        ("early_answer", plain(("clarify", "Eva ends with 54 pens."))),
        ("early_answer", plain(("analysis", "The answer is 60."))),
        ("early_answer", plain(("analysis", "It is \\boxed{60}."))),
        ("verify_answer", merged(verify="Wait, I wrote 19 * 2 = 38, but it is 54.0.")),
        ("verify_answer", merged(verify="Wait, I wrote 38, so the answer should be 57.")),
        ("verify_empty", merged(verify="Wait, I wrote 19 * 3, but that is wrong.")),
        ("verify_empty", merged(verify="Wait, something is not right.")),
        ("long_refine", merged(refine="Let me go back to the 19 pens. Then I triple them.")),
        ("long_refine", merged(refine="Let me go back.\nI triple them.")),
        ("borrowed", step("She sells 57 tickets for the children.")),
        ("wrong_answer", merged(output="The final answer is \\boxed{55}.")),
        ("wrong_answer", merged(output="She has many pens.")),
    ],
)
def test_a_rule_finds_what_it_must(rule: str, row: Row) -> None:
    assert broken(row).get(rule) == [0]


@pytest.mark.parametrize(
    "row",
    [
        merged(),
        merged(verify="Wait, I wrote 19×2, but triples are three times as many."),
        merged(verify="Wait, I wrote \\(19 \\times 2 = 38\\), but it is tripled."),
        merged(verify="Wait, 38 pens are not three times as many."),
        merged(refine="Let me go back to Mr. Lee's 19 pens and take 3.5 away."),
        step("Eva triples her pens, so she has 19 * 3 = 57 pens"),
        step("First, she has 3 steps to go. Then 19 * 3 = 57."),
        step("In step by step terms the question is how many, and the answer is 57."),
        step("She buys an apple and a ticket."),
        step("Each (of 3) costs $5, so {3} cost $15."),
        step("You have 57 pens.", question="You have 19 pens. How many are three times as many?"),
        step("The prompt is 57.", question="How long is a prompt of 57 words?"),
        step("So a < b, and 3 > 2."),
        step("There are 57 rolls.", question="There are 19 rolls. How many are 3 times as many?"),
        plain(("clarify", "Eva has 19 pens and triples them."), ("next_step", "It is 54.")),
        plain(("clarify", "There are 1,200 pens."), question="Of 1200 pens?", answer="1200"),
    ],
)
def test_a_good_row_breaks_no_rule_of_steps(row: Row) -> None:
    assert broken(row).keys() <= {"wrong_answer"}


@pytest.mark.parametrize("removed", [(1, 2), (3,), (4,), (5, 6)])
def test_a_merged_row_needs_all_its_parts(removed: tuple[int, ...]) -> None:
    row = merged()
    row["steps"] = [s for i, s in enumerate(row["steps"]) if i not in removed]
    assert broken(row)["incomplete_merge"] == [0]


def test_an_answer_must_be_at_the_end_and_right() -> None:
    row = merged()
    row["steps"].pop()
    assert broken(row)["wrong_answer"] == [0]
    assert "wrong_answer" not in broken(step("57", question="Twice 27?"))


def test_duplicates_and_repeated_texts() -> None:
    other = "Tom has 19 pens, triples them and gives 3 away. How many are left?"
    rows = [step("It is 54."), step("It is 54."), step("It is 54.", other), step("So 54.")]
    found = broken(*rows)
    assert found["duplicate"] == [1]
    assert found["repeated"] == [0, 1, 2]
    assert "repeated" not in broken(rows[0], rows[3])
    assert "duplicate" not in broken(rows[0], rows[2])
    bare = "The answer is \\boxed{54}."
    assert "repeated" not in broken(step(bare), step(bare, other))


# ---- The command ----


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., list[str]]:
    """Write rows and stats.json as search.py does; return the arguments of the audit."""

    def write(*rows: Row, stats: Row | None = None) -> list[str]:
        if stats is not None:
            write_json(tmp_path / "stats.json", stats)
        file = tmp_path / "data" / "sft.jsonl"
        write_jsonl(file, rows)
        return [f"rows_file={file}"]

    return write


COUNTS = {"contract_next_step_apology": 3, "contract_verify_leaks_answer": 2, "kept_merged": 1}
STATS = {"problems": 9, "counts": COUNTS | {"no_correct_path": 4, "no_wrong_path": 2}}


def code_of(argv: list[str]) -> int:
    try:
        main(load_config(AuditConfig, argv))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_good_rows_pass_and_the_tables_are_printed(
    written: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = written(merged(), step("So 19 * 3 - 3 = 54."), stats=STATS)
    assert code_of(argv) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "| next_step | 3 | apology 3 |" in shown
    assert "| verify | 2 | leaks_answer 2 |" in shown
    assert "| next_step | merged | 2 | 14.5 / 16 | 0 | 0 |" in shown
    assert "merged rows per problem with right and wrong paths (3): 0.333" in shown
    assert "---- row 0, merged, problem p, gold answer 54" in shown
    assert "<next_step> (wrong) Eva triples" in shown
    assert "fail:" not in shown
    assert code_of([*argv, "samples=0"]) == 0
    assert "---- row" not in capsys.readouterr().out


def test_a_share_beyond_its_bound_is_a_line_and_exit_code_1(
    written: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = written(merged(), step("I'm sorry, it is 54."), step("Step 2: it is 54."))
    assert code_of(argv) == 1
    fails = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail:")]
    assert fails == [
        "fail: apology in 1 of 3 rows (0.333), at most max_apology=0 allowed",
        "fail: heading in 1 of 3 rows (0.333), at most max_heading=0.05 allowed",
    ]
    assert code_of([*argv, "max_apology=0.4", "max_heading=0.4"]) == 0
    assert code_of([*argv, "max_apology=0.3", "max_heading=0.4"]) == 1


def test_too_few_merged_rows_fail(
    written: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = written(merged(), stats=STATS | {"problems": 16})
    assert code_of(argv) == 1
    assert "fail: 0.1 merged rows per problem" in capsys.readouterr().out
    assert code_of([*argv, "min_merged=0.1"]) == 0
    assert (with_both(STATS), merged_share([], None)) == (3, None)
    assert merged_share([], STATS | {"problems": 6}) is None


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "1+1?", "completion": "2"}, "kind plain or merged, got None"),
        (merged() | {"kind": "response"}, "kind plain or merged, got 'response'"),
        ({k: v for k, v in merged().items() if k != "answer"}, "must have 'answer'"),
        (merged() | {"answer": {"value": 4}}, r":2: 'answer' must be text.*answer\.value"),
        (merged() | {"question": 7}, "'question' must be text"),
        (merged() | {"steps": "none"}, "'steps' must be a list"),
        (merged() | {"steps": [{"act": "think", "text": "x"}]}, "'act' must be one of clarify"),
        (merged() | {"steps": [{"act": "verify"}]}, "must have 'act' and 'text'"),
    ],
)
def test_rows_of_another_shape_are_one_line(
    written: Callable[..., list[str]], row: Row, told: str
) -> None:
    (argument,) = written(merged(), row)
    path = argument.removeprefix("rows_file=")
    with pytest.raises(UserError, match=told) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{", '{"problems": 3}', '{"problems": 3, "counts": []}'])
def test_damaged_stats_are_one_line(written: Callable[..., list[str]], text: str) -> None:
    argv = written(merged())
    (Path(argv[0].removeprefix("rows_file=")).parents[1] / "stats.json").write_text(text)
    with pytest.raises(UserError, match=r"stats\.json"):
        code_of(argv)


def test_the_command_takes_a_file_first(written: Callable[..., list[str]]) -> None:
    assert arguments(["a=b.jsonl", "samples=1"]) == ["rows_file=a=b.jsonl", "samples=1"]
    assert arguments(["--help"]) == ["--help"]
    path = written(step("I'm sorry, it is 54."))[0].removeprefix("rows_file=")
    command = [sys.executable, "tools/audit_rows.py", path, "samples=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    Path(path).write_text(json.dumps({"problem": "1+1?"}))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_every_rule_has_a_bound_and_the_examples_run() -> None:
    bounds = {name for name in AuditConfig.__dataclass_fields__ if name.startswith("max_")}
    assert bounds == {f"max_{rule}" for rule in audit([], load_prompts())}
    assert doctest.testmod(audit_rows).failed == 0
