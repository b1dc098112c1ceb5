"""Test search.py and evaluate.py under torchrun: ranks share problems, results are equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rftt.run.files import Journal, gather_parts, part_of, read_jsonl, write_jsonl
from rftt.tokens import add_function_tokens
from tests.conftest import TORCHRUN, run
from tests.learners import random_qwen2
from tools.tiny_world import build_tokenizer

N = 7
"""Problems: not divisible by the number of ranks."""


@pytest.mark.parametrize("name", ["raw.jsonl", "math [hard].v2.jsonl"])
def test_parts_come_together_once_even_after_a_kill_in_between(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for rank, ids in enumerate([["a", "b"], ["c"], ["d", "a"]]):
        part = Journal(part_of(path, rank))
        for id in ids:
            part.append({"id": id})
        part.close()
    whole = gather_parts(path)
    assert [row["id"] for row in whole.rows] == ["a", "b", "c", "d"]
    assert [file.name for file in tmp_path.iterdir()] == [name]
    whole.close()
    assert [row["id"] for row in gather_parts(path).rows] == ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that knows functional tokens, and problems with one that is far too long."""
    path = tmp_path_factory.mktemp("world")
    tokenizer = build_tokenizer()
    add_function_tokens(tokenizer)
    random_qwen2(len(tokenizer)).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    problems = [{"id": str(i), "question": f"Eva has {i} pens.", "answer": i} for i in range(N)]
    write_jsonl(path / "short.jsonl", problems)
    write_jsonl(path / "long.jsonl", [*problems, problems[0] | {"id": "x", "question": "1 " * 500}])
    return path


def start(script: str, world: Path, out: Path, ranks: int, *more: str, check: bool = True) -> Any:
    launcher = [*TORCHRUN, "--nproc_per_node", ranks] if ranks > 1 else ["python"]
    return run(
        *launcher, script, f"configs/tiny/{script.replace('.py', '.yaml')}",
        f"model_name_or_path={world / 'model'}", f"output_dir={out}", "max_model_len=128",
        "max_completion_length=20", *more, check=check,
    )  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return sorted((row for _, row in read_jsonl(path)), key=lambda row: row["id"])


@pytest.mark.invariant
@pytest.mark.slow
@pytest.mark.dist
def test_search_on_two_ranks_is_search_on_one(world: Path, tmp_path: Path) -> None:
    train_file = f"train_file={world / 'long.jsonl'}"
    for ranks in (1, 2):
        done = start("search.py", world, tmp_path / str(ranks), ranks, train_file, "simulations=3")
        assert done.stdout.count("8 problems, 0 of them done before") == 1
    one, two = (tmp_path / str(ranks) for ranks in (1, 2))
    assert rows(one / "data" / "raw.jsonl") == rows(two / "data" / "raw.jsonl")
    assert len(rows(two / "data" / "raw.jsonl")) == N + 1
    left = {file.name for file in (two / "data").glob("raw*")}  # the parts of the ranks are gone
    assert left == {"raw.jsonl", "raw.made_from.json"}
    assert (one / "stats.json").read_text() == (two / "stats.json").read_text()
    assert json.loads((two / "stats.json").read_text())["counts"]["prompt_too_long"] == 1


@pytest.mark.invariant
@pytest.mark.slow
@pytest.mark.dist
def test_evaluation_resumes_on_another_number_of_ranks(world: Path, tmp_path: Path) -> None:
    settings = (f"eval_file={world / 'short.jsonl'}", "num_samples=3", "simulations=[1,4]")
    start("evaluate.py", world, tmp_path / "one", 1, *settings)
    journal = tmp_path / "one" / "eval" / "short.jsonl"
    whole = rows(journal)
    assert len(whole) == N
    (tmp_path / "two" / "eval").mkdir(parents=True)
    lines = journal.read_text().splitlines(keepends=True)
    (tmp_path / "two" / "eval" / "short.jsonl").write_text(lines[0])  # as killed ranks leave them
    (tmp_path / "two" / "eval" / "short.rank2.jsonl").write_text(lines[1] + lines[2][:50])
    record = "short.made_from.json"  # written before the first row
    (tmp_path / "two" / "eval" / record).write_bytes(journal.with_name(record).read_bytes())
    done = start("evaluate.py", world, tmp_path / "two", 2, *settings)
    assert done.stdout.count("short: 7 problems") == 1
    again = rows(tmp_path / "two" / "eval" / "short.jsonl")
    for before, after in zip(whole, again, strict=True):
        assert before["id"] == after["id"]
        for kind in ("samples", "search"):
            answers = [[(r["answer"], r["tokens"]) for r in row[kind]] for row in (before, after)]
            assert answers[0] == answers[1]


def test_a_prompt_that_is_too_long_is_named_before_anything_is_sampled(
    world: Path, tmp_path: Path
) -> None:
    file = f"eval_file={world / 'long.jsonl'}"
    done = start("evaluate.py", world, tmp_path, 1, file, "simulations=[]", check=False)
    assert done.returncode == 2
    assert "1 prompts do not fit max_model_len=128: problems x; raise it" in done.stderr
    assert not (tmp_path / "eval").exists()
