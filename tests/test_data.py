"""Test reading and writing rows: unchanged benchmark files, errors that name the line."""

import json
from pathlib import Path
from typing import ClassVar

import pytest

from rftt.run.data import load_problems, load_rows, shuffled_epochs
from rftt.run.files import Journal, read_jsonl, write_jsonl
from rftt.tokens import CLOSERS, OPENERS
from rftt.types import UserError, seed_for

SHARED = Path("../shared/data")
SETS = {"math500": 500, "gsm8k_test": 1319, "aime24": 30, "amc23": 40, "olympiadbench": 675}


@pytest.mark.skipif(not SHARED.is_dir(), reason="benchmark files are not here")
@pytest.mark.parametrize(("name", "n"), SETS.items())
def test_benchmark_files_are_read_as_they_are(name, n):
    problems = load_problems(str(SHARED / f"{name}.jsonl"))
    assert len({problem.id for problem in problems}) == len(problems) == n
    assert all(problem.question and problem.answer for problem in problems)
    if name == "math500":
        assert {problem.level for problem in problems} == set("12345")
    if name == "amc23":
        assert problems[0].answer == "27"


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return str(path)


GOOD = {"problem": "1+1?", "answer": "2"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "has 0 rows"),
        (
            (GOOD, {"text": "1+1?", "answer": "2"}),
            r"rows.jsonl:2 has no 'problem'.*found: text, answer\). Set prompt_key: text",
        ),
        (
            (GOOD, {"problem": "1+1?", "answer": ""}),
            r"1 of 2 rows have no gold .* first .*rows.jsonl:2 \(answer",
        ),
        ((GOOD, "{broken\n"), r"rows.jsonl:2 is not JSON"),
        ((GOOD, "[1]\n"), r"rows.jsonl:2 must be a JSON object, got list"),
    ],
    ids=["empty", "no problem", "no gold", "broken", "not an object"],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        load_problems(write(tmp_path, *rows))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist"):
        load_problems(str(tmp_path / "nowhere.jsonl"))


def test_ungraded_problems_need_no_answer(tmp_path):
    (problem,) = load_problems(write(tmp_path, {"question": "Why?"}), graded=False)
    assert problem.answer is None


def test_repeated_ids_are_replaced(tmp_path):
    problems = load_problems(write(tmp_path, GOOD | {"id": 1}, GOOD | {"id": 1}))
    assert len({problem.id for problem in problems}) == 2


def test_journal_drops_a_line_cut_off_by_a_kill(tmp_path):
    journal = Journal(tmp_path / "work.jsonl")
    journal.append({"id": 1})
    journal.append({"id": 2})
    journal.close()
    with open(journal.path, "a") as file:
        file.write('{"id": 3, "half')
    again = Journal(journal.path)
    assert again.rows == [{"id": 1}, {"id": 2}]
    again.append({"id": 3})
    again.close()
    assert [row["id"] for _, row in read_jsonl(journal.path)] == [1, 2, 3]


def test_write_jsonl_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])

    def failing():
        yield {"a": 2}
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        write_jsonl(path, failing())
    assert read_jsonl(path) == [(1, {"a": 1})]


@pytest.mark.invariant
def test_epochs_visit_everything_once_and_repeat_per_seed():
    from itertools import islice

    twice = list(islice(shuffled_epochs(7, 3), 14))
    assert sorted(twice[:7]) == sorted(twice[7:]) == list(range(7))
    assert twice[:7] != twice[7:]
    assert twice == list(islice(shuffled_epochs(7, 3), 14))


def test_seeds_are_stable_across_processes():
    assert seed_for(0, "train-1", ("a.1",)) == 454885490974252064


@pytest.mark.skipif(not SHARED.is_dir(), reason="benchmark files are not here")
def test_the_grader_is_audited_on_a_data_set(tmp_path, capsys):
    from rftt.run.audit import audit_gold
    from rftt.run.config import EvalConfig, load_config

    arguments = ["model_name_or_path=none", f"eval_file={SHARED / 'amc23.jsonl'}"]
    audit_gold(load_config(EvalConfig, [*arguments, f"output_dir={tmp_path}"]))
    found = json.loads((tmp_path / "eval" / "audit.json").read_text())
    assert found["n"] == 40
    assert found["unusable"] == []
    assert "40 gold answers, 0 unusable" in capsys.readouterr().out


class Letters:
    """Characters as ids from 100 and the sixteen delimiters below; enough of a tokenizer."""

    name_or_path, bos_token_id, eos_token_id, chat_template = "letters", None, 2, "yes"
    added_tokens_decoder: ClassVar = {}

    def __len__(self):
        return 300

    def encode(self, text, add_special_tokens=False):
        if text in OPENERS + CLOSERS:
            return [10 + (OPENERS + CLOSERS).index(text)]
        return [100 + ord(letter) for letter in text]

    all_special_ids = (2,)

    def apply_chat_template(self, messages, tokenize=True, **_):
        text = "".join(message["content"] for message in messages)
        return self.encode(text) if tokenize else text


STEPS = [
    {"act": "analyze", "text": "a"},
    {"act": "next_step", "text": "b", "wrong": True},
    {"act": "output", "text": "c"},
]


def rows_of(tmp_path, *, mask_wrong=True, functional=True, system_prompt=None, max_length=99):
    path = write(
        tmp_path, {"question": "q", "steps": STEPS}, {"question": "q", "response": "x" * 40}
    )
    return load_rows(
        path,
        Letters(),
        system_prompt=system_prompt,
        mask_wrong=mask_wrong,
        functional=functional,
        max_length=max_length,
    )


def test_rows_are_prompt_segments_and_eos_with_the_wrong_branch_masked(tmp_path):
    ((steps,), _), too_long = rows_of(tmp_path)
    prompt, response, mask = steps
    letter = {name: 100 + ord(name) for name in "abcq"}
    assert prompt == [letter["q"]]
    assert response == [11, letter["a"], 19, 12, letter["b"], 20, 17, letter["c"], 25, 2]
    assert mask == [True] * 3 + [False] * 3 + [True] * 4
    assert not too_long


def test_rows_unmasked_plain_prompted_and_bounded(tmp_path):
    ((steps,), _), _ = rows_of(tmp_path, mask_wrong=False)
    assert all(steps[2])
    ((plain,), _), _ = rows_of(tmp_path, functional=False)
    assert plain[1] == [*Letters().encode("a"), *Letters().encode("\nb\nc"), 2]
    ((prompted,), _), _ = rows_of(tmp_path, system_prompt="s")
    assert prompted[0] == Letters().encode("sq")
    kept, too_long = rows_of(tmp_path, max_length=20)
    assert (len(kept), too_long) == (1, {"too long": 1})


def test_rows_with_an_unknown_act_are_named(tmp_path):
    arguments = {"system_prompt": None, "mask_wrong": True, "functional": True, "max_length": 99}
    for steps in (["a"], [{"act": "output"}]):
        path = write(tmp_path, {"question": "q", "steps": steps})
        with pytest.raises(UserError, match=r"rows.jsonl:1: a step must have 'act' and 'text'"):
            load_rows(path, Letters(), **arguments)
    path = write(tmp_path, {"question": "q", "steps": [{"act": "ponder", "text": "a"}]})
    with pytest.raises(UserError, match=r"rows.jsonl:1: an act must be .*, got 'ponder'"):
        load_rows(path, Letters(), **arguments)
