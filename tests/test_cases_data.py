"""Read other people's data as it is, or refuse it in one line that names the keys that would do."""

from __future__ import annotations

import builtins
import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from rftt.engines.openai import priced, read_reply
from rftt.run.columns import as_text, pair_in, question_of, response_in
from rftt.run.config import SearchConfig, load_config
from rftt.run.data import load_problems
from rftt.run.files import Journal, read_jsonl, write_jsonl
from rftt.run.tables import name_of, read_table
from rftt.types import UserError

pytestmark = pytest.mark.cases
SHARED = Path("../shared/data")
ROWS = [{"question": "1+1?", "answer": "2"}, {"question": "Héloïse: 2+2?", "answer": "4"}]
FOUND = [("1+1?", "2"), ("Héloïse: 2+2?", "4")]


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(path: str, **options: Any) -> str:
    """Return the one line that reading `path` ends with."""
    with pytest.raises(UserError) as error:
        load_problems(path, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


# ---- Formats ----

CSV = 'question,answer\n1+1?,2\n"Héloïse: 2+2?",4\n'
TEXTS = {
    "rows.jsonl": lines(*ROWS),
    "crlf.jsonl": lines(*ROWS).replace("\n", "\r\n"),
    "no_newline_at_the_end.jsonl": lines(*ROWS).rstrip("\n"),
    "blank_lines.jsonl": "\n" + lines(*ROWS).replace("\n", "\n \n"),
    "array.json": json.dumps(ROWS, indent=4, ensure_ascii=False),
    "array_in_a_line.json": json.dumps(ROWS),
    "array.jsonl": json.dumps(ROWS),
    "lines.json": lines(*ROWS),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}),
    "rows.csv": CSV,
    "rows.tsv": CSV.replace(",", "\t"),
    "UPPER.CSV": CSV,
}
ENCODINGS = {"as it is": str.encode, "with BOM": lambda text: b"\xef\xbb\xbf" + text.encode()}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_every_format_gives_the_same_problems(tmp_path, name, encoding, packed) -> None:
    data = ENCODINGS[encoding](TEXTS[name])
    path = tmp_path / (f"{name}.gz" if packed else name)
    problems = load_problems(written(path, gzip.compress(data) if packed else data))
    assert [(problem.question, problem.answer) for problem in problems] == FOUND
    assert problems[0].id.startswith(Path(name).stem + "-")


def test_parquet_is_read_under_any_name(tmp_path) -> None:
    for name in ("rows.parquet", "rows"):
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name)
        problems = load_problems(str(tmp_path / name))
        assert [(problem.question, problem.answer) for problem in problems] == FOUND


def test_rows_carry_the_line_on_which_they_begin(tmp_path) -> None:
    pretty = written(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    assert [record.place for record in read_table(pretty)] == [f"{pretty}:2", f"{pretty}:6"]
    table = written(tmp_path / "a.csv", 'question,answer\n"two\nlines",1\nb,2\n')
    assert [record.place for record in read_table(table)] == [f"{table}:2", f"{table}:4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "\xe9"}'.encode("latin-1"), r"a\.jsonl:1 must be UTF-8.*0xe9"),
        ("a.jsonl", lines(*ROWS).encode("utf-16"), "must be UTF-8, got UTF-16"),
        ("a.jsonl", lines(*ROWS).encode("utf-16-le"), "must be UTF-8, got UTF-16"),
        ("a.jsonl", lines(*ROWS).encode("utf-16-be"), "must be UTF-8, got UTF-16"),
        ("a.jsonl", lines(*ROWS).encode("utf-32"), "must be UTF-8, got UTF-16 or UTF-32"),
        ("a.csv", CSV.encode("latin-1"), r"a\.csv:3 must be UTF-8"),
        ("a.jsonl.gz", gzip.compress(CSV.encode(), mtime=0)[:-9], "must be a complete gzip file"),
        ("a.gz", b"\x1f\x8bnonsense", "must be a complete gzip file"),
        ("a.jsonl.bz2", bz2.compress(CSV.encode()), "must be text or gzip, got bzip2; unpack it"),
        ("a.jsonl.xz", lzma.compress(CSV.encode()), "got xz; unpack it"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\0", "got zstd; unpack it"),
        ("a.zip", b"PK\3\4\0", "got zip; unpack it"),
        ("a.parquet", b"PAR1nonsense", "cannot be read as Parquet"),
        ("a.json", '[{"question": "1?"},\n {"question": }]', r"a\.json:2 is not JSON"),
        ("a.json", '[{"question": "1?"},\n]', r"a\.json:2 is not JSON"),
        ("a.json", '[{"question": "1?"}\n{"question": "2?"}]', r"a\.json:1 is not JSON .*comma"),
        ("a.json", '[{"question": "1?"}] more', "text follows the array"),
        ("a.json", '[{"question": "1?"}', r"a\.json:1 is not JSON"),
        ("a.json", "[1, 2]", r"a\.json:1 must be a JSON object, got int"),
        ("a.json", "[]", "0 rows"),
        ("a.json", json.dumps({"train": ROWS, "test": ROWS}), "one list of rows, got train, test"),
        ("a.jsonl", '{"question": ' + "[" * 9000 + "]" * 9000 + "}", r"a\.jsonl:1 .*deeply"),
        ("a.jsonl", '{"question": ' + "1" * 9000 + "}", r"a\.jsonl:1 is not JSON"),
        ("a.csv", 'question,answer\n"1+1?,2\n', r"a\.csv:2 is not CSV"),
        ("a.csv", "question,answer\n1,000?,2\n", r"a\.csv:2 must have 2 fields .*, got 3"),
        ("a.csv", "question,question\n1?,2\n", "a column twice"),
        ("a.csv", "question;answer\n1?;2\n", r"found: question;answer"),
        ("a.csv", "", "0 rows"),
    ],
)
def test_broken_files_are_one_line(tmp_path, name, content, message) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        load_problems(path)


def test_folders_and_unreadable_files_are_one_line(tmp_path) -> None:
    assert "got a folder" in refused(str(tmp_path))
    assert "does not exist" in refused(str(tmp_path / "none.parquet"))
    assert "cannot be read" in refused("a\0b")


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "a.parquet"), ("datasets", "hf:a/b")])
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, package, source) -> None:
    written(tmp_path / "a.parquet", b"PAR1")
    real = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install -r requirements-data.txt" in refused(source)


# ---- The Hugging Face hub, from a folder: `datasets` reads both in the same way ----


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A data set with the splits train and test, of one row each."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split, row in zip(("train", "test"), ROWS, strict=True):
        written(folder / f"{split}.jsonl", lines(row))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_data_set_of_the_hub_is_read_by_split(hub) -> None:
    (problem,) = load_problems("hf:owner/name@test")
    assert (problem.question, problem.answer) == FOUND[1]
    assert problem.id == "owner-name-test-1"
    (hub / "test.jsonl").unlink()
    (problem,) = load_problems("hf:owner/name")
    assert problem.question == FOUND[0][0]


def test_a_data_set_of_the_hub_is_refused_in_one_line(hub) -> None:
    assert "has the splits train, test; add one" in refused("hf:owner/name")
    assert "cannot be loaded" in refused("hf:owner/name@validation")
    assert "cannot be loaded" in refused("hf:owner/name:german@train")
    assert "cannot be loaded" in refused("hf:owner/none")
    assert "must be hf:owner/name" in refused("hf:")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/SVAMP.json", "SVAMP"),
        ("data/gsm8k_test.jsonl.gz", "gsm8k_test"),
        ("data/v1.5.parquet", "v1.5"),
        ("hf:openai/gsm8k:main@train[:10]", "openai-gsm8k-main-train-10"),
        ("数据.csv", "数据"),
    ],
)
def test_a_data_set_has_a_name_that_fits_a_file(source, name) -> None:
    assert name_of(source) == name


@pytest.mark.parametrize("source", ["数" * 80 + ".csv", f"hf:owner/{'n' * 300}", "x" * 251])
def test_a_long_name_of_a_data_set_is_bounded(source) -> None:
    assert len(name_of(source).encode()) <= 120
    assert name_of(source) != name_of("y" + source.removeprefix("hf:"))


# ---- Published data sets ----

PUBLISHED = {"SVAMP": 1000, "MultiArith": 600, "AddSub": 395, "SingleEq": 508}


@pytest.mark.skipif(not SHARED.is_dir(), reason="benchmark files are not here")
@pytest.mark.parametrize(("name", "n"), PUBLISHED.items())
def test_published_arrays_are_read_as_they_are(name, n) -> None:
    problems = load_problems(str(SHARED / f"{name}.json"))
    assert len({problem.id for problem in problems}) == len(problems) == n
    keys = ("{Body} {Question}", "Answer") if name == "SVAMP" else ("sQuestion", "lSolutions")
    assert load_problems(str(SHARED / f"{name}.json"), keys=keys) == problems
    if name == "SVAMP":
        assert problems[0].question.endswith(
            "on each pack How much do you have to pay to buy each pack?"
        )
        assert (problems[0].answer, problems[0].id) == ("51", "chal-1")


ASK = [{"role": "user", "content": "1+1?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *ASK]
DAPO = {
    "data_source": "math_dapo",
    "prompt": ASK,
    "ability": "MATH",
    "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4"},
}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": ASK,
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 0, "answer": "1+1=2\n#### 2", "question": "1+1?"},
}
SEEN = {
    "DAPO": DAPO,
    "DAPO processed": DAPO | {"prompt": "1+1?", "source_prompt": ASK, "solution": "2"},
    "verl": VERL,
    "parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}],
        "answer": 2,
    },
    "Numina": {
        "problem": "1+1?",
        "solution": "So \\boxed{2}.",
        "messages": [*ASK, {"role": "assistant", "content": "So \\boxed{2}."}],
    },
    "AIME": {"ID": "2024-I-1", "Problem": "1+1?", "Solution": "2.", "Answer": 2},
    "two equal golds": {"question": "1+1?", "answer": "so\n#### 2", "final_answer": "2.0"},
    "a number": {"question": "1+1?", "answer": 2.0},
    "a list": {"question": "1+1?", "final_answer": ["2"]},
}


@pytest.mark.parametrize("name", SEEN)
def test_rows_of_others_are_problems_without_keys(tmp_path, name) -> None:
    (problem,) = load_problems(written(tmp_path / "a.jsonl", lines(SEEN[name])))
    assert problem.question == "1+1?"
    assert float(str(problem.answer)) == 2
    parquet.write_table(pyarrow.Table.from_pylist([SEEN[name]]), tmp_path / "a.parquet")
    (same,) = load_problems(str(tmp_path / "a.parquet"))
    assert (same.question, same.answer) == (problem.question, problem.answer)


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (("extra_info.question", "extra_info.answer"), ("1+1?", "2")),
        (("prompt.0.content", "reward_model.ground_truth"), ("1+1?", "2")),
        (("{ability}: {prompt.0.content}", None), ("math: 1+1?", "2")),
        ((None, "{extra_info.index}"), ("1+1?", "0")),
    ],
)
def test_keys_have_dots_and_are_templates(tmp_path, keys, found) -> None:
    (problem,) = load_problems(written(tmp_path / "a.jsonl", lines(VERL)), keys=keys)
    assert (problem.question, problem.answer) == found


def test_a_column_whose_name_has_dots_or_braces_is_itself(tmp_path) -> None:
    row = {"a.b": "1+1?", "{c}": "2", "c": "3"}
    (problem,) = load_problems(written(tmp_path / "a.jsonl", lines(row)), keys=("a.b", "{c}"))
    assert (problem.question, problem.answer) == ("1+1?", "2")


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        ({"problem": {"text": "1+1?"}, "answer": "2"}, (None, None),
         r"a\.jsonl:1: 'problem' must be text or a number.*such as problem\.text"),
        ({"problem": "length?", "answer": {"value": 5, "unit": "cm"}}, (None, None),
         r"a\.jsonl:1: 'answer' must be text.*got \{'value': 5.*such as answer\.value"),
        ({"problem": "1+1?", "solution": {"text": "So \\boxed{2}."}}, (None, None),
         r"a\.jsonl:1: 'solution' must be text.*got \{'text'.*such as solution\.text"),
        ({"problem": "1+1?", "solution": [{"step": "So \\boxed{2}."}]}, (None, None),
         r"a\.jsonl:1: 'solution\.0' must be text.*such as solution\.0\.step"),
        ({"problem": "1+1?", "solution": True}, (None, None), "'solution' must be text"),
        ({"problem": "1+1?", "solution": ["\\boxed{2}", "\\boxed{3}"]}, (None, None),
         r"in 'solution\.0' \(2\) and 'solution\.1' \(3\). Set answer_key: solution\.0 or"),
        ({"problem": ["1+1?"], "answer": "2"}, (None, None), "'problem' must be text"),
        ({"problem": "1+1?", "answer": True}, (None, None), "'answer' must be text"),
        ({"problem": "1+1?", "answer": float("nan")}, (None, None), "'answer' must be text"),
        ({"problem": "1+1?", "answer": [{"a": 1}]}, (None, None), "'answer' must be text"),
        ({"problem": "   ", "answer": "1"}, (None, None), "the question in 'problem' is blank"),
        ({"problem": None, "answer": "1"}, (None, None), "has no 'problem'"),
        ({"problem": "1?", "question": "2?", "answer": 1}, (None, None),
         "different questions in 'problem' and 'question'. Set prompt_key: problem or question"),
        ({"problem": "1?", "answer": "1", "ground_truth": "2"}, (None, None),
         r"different gold answers in 'answer' \(1\) and 'ground_truth' \(2\). Set answer_key"),
        ({"input": "1+1?", "code": "print(2)", "target": 2.0}, (None, None),
         r"has no 'problem'.*found: input, code, target\). Set prompt_key: input"),
        ({"input": "1+1?", "code": "print(2)", "target": 2.0}, ("input", None),
         "no gold answer .*Set answer_key: target"),
        ({"Body": "A.", "Question": "B?", "Answer": 1}, ("{Body} {question}", None),
         r"has no 'question', a name in the template '\{Body\} \{question\}'"),
        ({"prompt": SYSTEM, "answer": "2"}, (None, None),
         "has the system message 'Be brief.', but system_prompt is not set"),
        ({"prompt": [*ASK, *ASK], "answer": "2"}, (None, None), "the turns user, user"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "2"},
         (None, None), "all parts of a message must be text"),
        ({"prompt": [{"role": "user", "content": None}], "answer": "2"}, (None, None),
         "content of a message must be text"),
        ({"prompt": [{"role": "user", "content": "1?"}, 3], "answer": "2"}, (None, None),
         "'prompt' must be text"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_line_and_key(tmp_path, row, keys, message) -> None:
    path = written(tmp_path / "a.jsonl", lines(row))
    with pytest.raises(UserError, match=message):
        load_problems(path, keys=keys)


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        (["By hand: \\boxed{2}.", "By heart: \\boxed{2.0}."], "2"),
        (["\\boxed{\\frac{1}{2}}"], "\\frac{1}{2}"),  # a repr would double the backslash
        (["2"], "2"),
        (["", "2"], "2"),
        (2.0, "2"),
    ],
)
def test_solutions_in_a_list_are_texts_with_one_answer(tmp_path, solution, gold) -> None:
    path = written(tmp_path / "a.jsonl", lines({"problem": "1+1?", "solution": solution}))
    (problem,) = load_problems(path)
    assert problem.answer == gold


def test_a_system_message_is_read_where_it_is_the_system_prompt(tmp_path) -> None:
    path = written(tmp_path / "a.jsonl", lines({"prompt": SYSTEM, "answer": "2"}))
    (problem,) = load_problems(path, system_prompt="Be brief.")
    assert problem.question == "1+1?"
    assert "set to another text" in refused(path, system_prompt="Be long.")
    (problem,) = load_problems(path, keys=("prompt.1.content", None))
    assert problem.question == "1+1?"


# ---- Rows to train on ----

REPLY = [{"role": "assistant", "content": "2"}]
TRAINED = {
    "ours": {"question": "1+1?", "response": "2"},
    "TRL text": {"prompt": "1+1?", "completion": "2"},
    "TRL messages": {"prompt": ASK, "completion": REPLY},
    "TRL conversation": {"messages": [*ASK, *REPLY]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
    },
    "Alpaca": {"instruction": "1+1?", "input": "", "output": "2"},
    "MetaMath": {"query": "1+1?", "response": "2", "type": "GSM", "original_question": "1+1?"},
    "Numina": {"problem": "1+1?", "solution": "2", "messages": [*ASK, *REPLY]},
}


@pytest.mark.parametrize("name", TRAINED)
def test_rows_of_others_are_trained_on_without_keys(name) -> None:
    row = TRAINED[name]
    assert (question_of(row, None, "f:1"), response_in(row, None, "f:1")) == ("1+1?", "2")


def test_alpacas_input_is_part_of_the_question() -> None:
    row = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
    assert question_of(row, None, "f:1") == "Add.\n\n1 and 1"


PAIRED = {
    "ours": {"question": "1+1?", "chosen": "2", "rejected": "3"},
    "TRL text": {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
    "TRL messages": {
        "prompt": ASK,
        "chosen": REPLY,
        "rejected": [{"role": "assistant", "content": "3"}],
    },
    "TRL implicit": {
        "chosen": [*ASK, *REPLY],
        "rejected": [*ASK, {"role": "assistant", "content": "3"}],
    },
    "UltraFeedback": {
        "prompt": "1+1?",
        "chosen": [*ASK, *REPLY],
        "rejected": [*ASK, {"role": "assistant", "content": "3"}],
    },
}


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_of_others_are_read_without_keys(name) -> None:
    assert pair_in(PAIRED[name], None, "f:1", None) == ("1+1?", ["2", "3"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "1?", "answer": "1 #### 1"}, r"f:3 has neither .* Set response_key: answer"),
        ({"question": "1?", "response": "1", "output": "2"}, "different responses"),
        ({"question": "1?", "response": {"a": 1}}, "f:3: 'response' must be text"),
        (
            {"question": "1?", "steps": [{"act": "analysis", "text": None}]},
            "f:3: 'act' and 'text' of",
        ),
        ({"question": "1?", "steps": [{"act": ["a"], "text": "a"}]}, "f:3: 'act' and 'text' of"),
        (
            {"question": "1?", "steps": [{"act": "a", "text": "a", "wrong": "no"}]},
            "'wrong' of a step",
        ),
        ({"question": "1?", "steps": {"act": "analysis", "text": "a"}}, "'steps' must be a list"),
    ],
)
def test_responses_that_cannot_be_meant_are_refused(row, message) -> None:
    with pytest.raises(UserError, match=message):
        response_in(row, None, "f:3")
    assert response_in({"answer": "1"}, "answer", "f:3") == "1"


def test_pairs_of_two_questions_are_refused() -> None:
    other = [{"role": "user", "content": "2+2?"}, *REPLY]
    with pytest.raises(UserError, match="f:3: 'chosen' and 'rejected' must answer the same"):
        pair_in({"chosen": [*ASK, *REPLY], "rejected": other}, None, "f:3", None)


# ---- Text that files cannot hold ----


def test_a_number_that_no_float_holds_stays_a_number(tmp_path) -> None:
    digits = "7" * 400
    row = f'{{"question": "1?", "answer": {digits}, "level": {digits}, "id": {digits}}}\n'
    [problem] = load_problems(written(tmp_path / "a.jsonl", row))
    assert (problem.answer, problem.level) == (digits, digits)


def test_a_path_of_data_that_is_too_long_is_one_line() -> None:
    with pytest.raises(UserError, match=r"x cannot be read .*File name too long"):
        load_problems("x" * 5000)


def test_lone_surrogates_become_the_replacement_character(tmp_path) -> None:
    row = '{"problem": "half \\ud83d of a smile \\ud83d\\ude00: 1+1?", "answer": "2"}'
    for name, text in (("a.jsonl", row), ("a.json", f"[{row}]")):
        (problem,) = load_problems(written(tmp_path / name, text))
        assert problem.question == "half \ufffd of a smile \U0001f600: 1+1?"


def test_a_journal_holds_any_reply_and_is_read_as_it_was_written(tmp_path) -> None:
    journal = Journal(tmp_path / "work.jsonl")
    journal.append({"id": "a", "text": "\ud83d and \0 and \u2028"})
    journal.close()
    assert journal.rows == [{"id": "a", "text": "\ufffd and \0 and \u2028"}]
    assert Journal(journal.path).rows == journal.rows
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "\udc00"}])
    assert read_jsonl(tmp_path / "rows.jsonl") == [(1, {"text": "\ufffd"})]


def test_a_reply_with_a_lone_surrogate_can_be_sent_again(tmp_path) -> None:
    cfg = load_config(SearchConfig, ["model_name_or_path=m", "output_dir=o", "train_file=t"])
    body = json.dumps({"choices": [{"message": {"content": "half \ud83d of a smile"}}]}).encode()
    worst = priced(cfg, "", False, 1000, 1000)
    assert read_reply(cfg, body, worst).text == "half \ufffd of a smile"


def test_nuls_of_a_power_cut_are_skipped_and_other_damage_is_named(tmp_path) -> None:
    path = tmp_path / "work.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + bytes(9) + b"\n" + bytes(9) + b'{"id": "b"}\n' + bytes(9))
    assert Journal(path).rows == [{"id": "a"}, {"id": "b"}]
    assert [row for _, row in read_jsonl(path)] == [{"id": "a"}, {"id": "b"}]
    path.write_bytes(b'{"id": "a"}\n{"id": \n{"id": "b"}\n')
    with pytest.raises(UserError, match=r"work\.jsonl:2 is not JSON"):
        Journal(path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (27.0, "27"),
        (0.5, "0.5"),
        (10**30, str(10**30)),
        (1e22, str(10**22)),
        ("", None),
        ("a", "a"),
    ],
)
def test_numbers_are_written_plainly(value, text) -> None:
    assert as_text(value, "answer", "f:1") == text
