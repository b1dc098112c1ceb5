"""evaluate.py's figures on made-up responses whose choices can be read off."""

from typing import Any

from evaluate import summarise, table


def response(answer: str | None, logprob: float, *, tokens: int = 10) -> dict[str, Any]:
    return {"answer": answer, "correct": answer == "7", "tokens": tokens, "logprob": logprob}


def row(id: str, *samples: dict[str, Any]) -> dict[str, Any]:
    searched = [response("7", -1.0, tokens=9), response("8", -1.0, tokens=4)]
    return {
        "id": id,
        "level": None,
        "greedy": samples[0],
        "samples": list(samples),
        "search": searched,
    }


ROWS = [
    row("majority", response("7", -2.0), response("8", -1.0), response("7", -3.0),
        response(None, -4.0)),
    row("likeliest", response("8", -2.0), response("7", -1.0), response("8", -1.5),
        response("8", -1.5)),
]  # fmt: skip


def test_oracle_vote_and_best_of_n_choose_differently_at_the_same_price() -> None:
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
    assert "best@4       50.0 %" in table({"set": "made up"} | summary)
