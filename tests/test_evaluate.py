"""Test evaluate.py's figures on made-up responses with known choices."""

import asyncio
import json
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluate import main as evaluate_main
from evaluate import processed, steps_of, summarise, summary_table
from rftt.engines.sampler import Task
from rftt.graders.prm import Unscored
from rftt.rollout import learned_tree, sample, tree_rollouts
from rftt.run.config import EvalConfig, load_config
from rftt.run.files import read_jsonl
from rftt.run.harness import agreement, open_judge
from rftt.types import Problem, UserError
from tests.small_world import make_world, settings
from tests.test_rollout import CLOSE, PROBLEM, learned, segment


def response(answer: str | None, logprob: float, *, tokens: int = 10) -> dict[str, Any]:
    return {"answer": answer, "correct": answer == "7", "tokens": tokens, "logprob": logprob}


def row(id: str, *samples: dict[str, Any]) -> dict[str, Any]:
    searched = [response("7", -1.0, tokens=9), response("8", -1.0, tokens=4)]
    return {
        "id": id,
        "level": None,
        "greedy": samples[0],
        "acts": [],
        "samples": list(samples),
        "search": searched,
    }


ROWS = [
    row("majority", response("7", -2.0), response("8", -1.0), response("7", -3.0),
        response(None, -4.0)),
    row("likeliest", response("8", -2.0), response("7", -1.0), response("8", -1.5),
        response("8", -1.5)),
]  # fmt: skip


@pytest.mark.oracle
def test_vote_and_best_of_n_choose_differently_at_the_same_price() -> None:
    summary = summarise(ROWS, 4, [1, 2], seed=0)
    assert [summary["maj@k"][k]["accuracy"] for k in (1, 2, 4)] == [0.5, 0.5, 0.5]
    assert [summary["best@k"][k]["accuracy"] for k in (1, 2, 4)] == [0.5, 0.5, 0.5]
    first, second = (summarise([one], 4, [], seed=0) for one in ROWS)
    assert [x["maj@k"][4]["accuracy"] for x in (first, second)] == [1.0, 0.0]
    assert [x["best@k"][4]["accuracy"] for x in (first, second)] == [0.0, 1.0]
    for k in (1, 2, 4):
        assert summary["maj@k"][k]["tokens"] == summary["best@k"][k]["tokens"] == 10 * k
    assert [summary["search"][k]["tokens"] for k in (1, 2)] == [9, 13]
    assert summary["pass@k"][4]["mean"] == 1.0
    assert "best@4       50.0 %" in summary_table({"set": "made up"} | summary)


@pytest.mark.oracle
def test_best_of_n_goes_by_the_process_score_where_there_is_one() -> None:
    scored = [r | {"score": score} for r, score in zip(ROWS[0]["samples"], (0.1, 0.2, 0.9, 0.3),
                                                       strict=True)]  # fmt: skip
    summary = summarise([ROWS[0] | {"samples": scored}], 4, [], seed=0)
    assert [summary["best@k"][k]["accuracy"] for k in (1, 2, 4)] == [1.0, 0.0, 1.0]


@pytest.mark.oracle
def test_plain_choices_at_the_tokens_of_the_search() -> None:
    """Two simulations cost 13 tokens: one sample of 10 fits, two do not."""
    found = summarise(ROWS, 4, [1, 2], seed=0)["equal_tokens"]
    assert [found[k]["n"] for k in (1, 2)] == [1, 1]
    assert found[2]["tokens"] == 10
    assert found[2]["maj"] == found[2]["best"] == 0.5  # the first samples are 7 and 8
    assert found[1]["search - maj"]["mean"] == 0.5  # both searches answer 7 first
    dear = [row | {"search": [r | {"tokens": 15} for r in row["search"]]} for row in ROWS]
    found = summarise(dear, 4, [2], seed=0)["equal_tokens"][2]
    assert (found["n"], found["tokens"], found["maj"]) == (3, 30, 0.5)
    text = summary_table({"set": "made up"} | summarise(dear, 4, [2], seed=0))
    assert "search 2 - maj@3:" in text
    assert "over 50.0 % for 30 tokens" in text


class Judge:
    """A process model that likes steps which mention y and refuses what holds a question mark."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    async def score(self, question: str, steps: Sequence[str]) -> list[float]:
        self.asked.append((question, list(steps)))
        if any("?" in step for step in steps):
            raise Unscored("a question mark")
        return [0.8 if "y" in step else 0.4 for step in steps]

    def close(self) -> None: ...


def test_search_at_inference_is_valued_by_the_process_model_and_sees_no_gold_answer() -> None:
    bodies = [[100 + ord(letter), CLOSE[act]] for letter, act in (("y", "clarify"),
              ("n", "analysis"), ("?", "next_step"))]  # fmt: skip
    ends = segment("output", "\\boxed{4}")
    ctx, judge = learned([[*body, *ends] for body in bodies] + [[165] * 5]), Judge()
    hidden = Problem(PROBLEM.id, PROBLEM.question)
    value = processed(ctx, judge, hidden, "mean")
    how = {"simulations": 4, "exploration_weight": 9.0, "in_flight": 1}
    task = Task(ctx, hidden, [7])
    tree = asyncio.run(learned_tree(task, value=value, **how))  # type: ignore[arg-type]
    values = sorted(leaf.value_sum for leaf in tree.leaves())
    assert values == pytest.approx([0.0, 0.0, 0.4, 0.6])  # cut off, refused, n, y
    assert len(judge.asked) == 3  # a path without an answer is not shown to it
    assert judge.asked[0] == (PROBLEM.question, ["y", "\\boxed{4}"])
    rollouts = tree_rollouts(task, tree, mask_forced=False)
    again = [asyncio.run(value(steps_of(rollout))) for rollout in rollouts]
    assert again == pytest.approx([leaf.value_sum for leaf in tree.leaves()])


def test_a_plain_response_is_one_step_to_the_process_model() -> None:
    ctx, judge = learned(["It is \\boxed{4}"]), Judge()
    [rollout] = asyncio.run(sample(Task(ctx, PROBLEM, [7]), n=1))
    value = processed(ctx, judge, PROBLEM, "mean")
    assert asyncio.run(value(steps_of(rollout))) == pytest.approx(0.4)
    assert judge.asked == [(PROBLEM.question, ["It is \\boxed{4}"])]


# ---- What other harnesses read ----


@pytest.mark.cases
def test_samples_are_written_as_lm_evaluation_harness_logs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = SimpleNamespace(parse=lambda text: text, verify=lambda gold, answer: gold in answer)
    monkeypatch.setitem(sys.modules, "math_verify", judge)
    world = make_world(tmp_path / "world")
    more = ["num_samples=2", "max_problems=3", "lm_eval_samples=true", "math_verify=true"]
    arguments = settings("evaluate", world, tmp_path / "out", *more, "dtype=float32")
    evaluate_main(load_config(EvalConfig, arguments))
    samples = [row for _, row in read_jsonl(tmp_path / "out/eval/samples_train.jsonl")]
    rows = [row for _, row in read_jsonl(tmp_path / "out/eval/train.jsonl")]
    by_id = {row["id"]: row for row in rows}
    assert [(row["doc_id"], row["filter"]) for row in samples] == [
        (i, name) for i in range(3) for name in ("greedy", "sampled")
    ]
    for line in samples:
        row, doc = by_id[line["doc"]["id"]], line["doc"]
        found = [row["greedy"]] if line["filter"] == "greedy" else row["samples"]
        assert line["resps"] == [[one["text"] for one in found]]
        assert line["target"] == doc["answer"] == row["gold"]
        assert line["exact_match"] == sum(one["correct"] for one in found) / len(found)
        assert doc["question"] in line["arguments"]["gen_args_0"]["arg_0"]
        assert line["target_hash"] == sha256(doc["answer"].encode()).hexdigest()
    greedy = [line for line in samples if line["filter"] == "greedy"]
    assert {line["resps"][0][0] for line in greedy} == {row["response"] for row in rows}
    summary = json.loads((tmp_path / "out/eval/summary.json").read_text())
    assert summary["math_verify"]["responses"] == 9
    assert "Math-Verify" in (tmp_path / "out/log.txt").read_text()


@pytest.mark.cases
def test_the_other_verdict_stands_beside_ours() -> None:
    def judged(correct: bool, other: bool) -> dict[str, bool]:
        return {"correct": correct, "math_verify": other}

    rows = [
        {"greedy": judged(True, True), "samples": [judged(False, True)]},
        {"greedy": judged(False, True), "samples": [judged(False, False)]},
    ]
    assert agreement(rows) == {"greedy": 1.0, "agreement": 0.5, "responses": 4}
    assert agreement([{"greedy": {"correct": True}, "samples": []}]) is None


@pytest.mark.cases
def test_a_missing_math_verify_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    needed = ["model_name_or_path=m", "eval_file=e", "output_dir=o"]
    assert open_judge(load_config(EvalConfig, needed)) is None
    with pytest.raises(UserError, match="needs the package math-verify; pip install math-verify"):
        open_judge(load_config(EvalConfig, [*needed, "math_verify=true"]))
