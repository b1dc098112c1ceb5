"""Sample answers to bare questions, then cache, score and filter them (rejection sampling).

`sample_responses` keeps every response, right or wrong. The cached responses are scored once, by
the grader and optionally a process reward model. They can be filtered repeatedly (filters.py).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rftt.engines.base import Reply, for_each
from rftt.graders import open_prm
from rftt.graders.math import extract, grade
from rftt.graders.prm import ProcessModel, Unscored, reduce
from rftt.prompted import Prompted, reply
from rftt.prompts import question_messages
from rftt.run.files import Journal, Row, forget, gather_parts, open_part, read_jsonl
from rftt.run.filters import rank, select, share_solved
from rftt.run.log import RunLog
from rftt.run.provenance import digest, weights_digest
from rftt.tokens import ACTS
from rftt.types import Problem, UserError

if TYPE_CHECKING:
    from rftt.learner.fsdp import World
    from rftt.run.config import SearchConfig


OPENER = re.compile(rf"<({'|'.join(ACTS)})>")
RESPONSES = ("sample", "score")
"""Methods whose raw rows are responses. The raw rows of other methods are already curated."""


async def sample_responses(cfg: SearchConfig, ctx: Prompted, problem: Problem) -> Row:
    """Return all of `cfg.simulations` independent responses to a question, with their tokens."""
    messages, gold = question_messages(problem.question, cfg.system_prompt), str(problem.answer)

    async def answer(i: int) -> Reply:
        return await reply(ctx, messages, None, problem.id, i)

    responses = [
        {
            "text": said.text,
            "tokens": said.n_generated,
            "finish": "stop" if said.whole else "length",
            "logprob": said.logprob,
            "control_text": holds_control(said.text, ctx.control),
            "answer": extract(said.text),
            "correct": said.whole and grade(said.text, gold, problem.question).correct,
        }
        for said in await for_each(range(cfg.simulations), answer, in_flight=cfg.simulations)
    ]
    return {
        "question": problem.question,
        "answer": gold,
        "responses": responses,
        "solved": fmean(response["correct"] for response in responses),
    }


def holds_control(text: str, control: Callable[[str], bool]) -> bool:
    """Return whether a response contains control text, beside the tags of its segments."""
    return any(map(control, [part for _, part in segments(text)] or [text]))


def is_marked(rows: Sequence[Row]) -> bool:
    """Return whether all responses have `control_text`, which older caches lack."""
    return all("control_text" in response for row in rows for response in row["responses"])


def mark_control(row: Row, control: Callable[[str], bool]) -> Row:
    """Return a row whose responses all have `control_text`."""
    marked = [
        {"control_text": holds_control(response["text"], control)} | response
        for response in row["responses"]
    ]
    return row | {"responses": marked}


# ---- Score: from the cache to data/scored.jsonl ----


def load_responses(path: str) -> list[Row]:
    """Return the cache of a `method=sample` run. Raises UserError for any other row."""
    rows: dict[str, Row] = {}
    for number, row in read_jsonl(path):
        lacking = {"id", "question", "answer", "responses"} - set(row)
        responses = row.get("responses", [])
        if not isinstance(responses, list) or not all(isinstance(r, dict) for r in responses):
            raise UserError(
                f"{path}:{number}: 'responses' must be a list of objects, got {responses!r:.80}; "
                "correct the row."
            )
        for response in responses:
            lacking |= {"text", "tokens", "finish"} - set(response)
        if lacking or not row["responses"]:
            raise UserError(
                f"{path}:{number} lacks {', '.join(sorted(lacking)) or 'any response'}; "
                "search.py method=sample writes such a cache to data/raw.jsonl."
            )
        texts = [(name, row[name]) for name in ("id", "question", "answer")]
        texts += [(name, said[name]) for said in responses for name in ("text", "finish")]
        for name, value in texts:
            if not isinstance(value, str):
                raise UserError(
                    f"{path}:{number}: {name!r} must be text, got {value!r:.80}; correct the row."
                )
        if row["id"] in rows:
            raise UserError(
                f"{path}:{number} repeats the problem {row['id']!r}; ids must be unique, so remove "
                "one of the rows."
            )
        rows[row["id"]] = row
    return list(rows.values())


async def score_responses(
    cfg: SearchConfig, log: RunLog, raw: Sequence[Row], world: World | None = None
) -> list[Row]:
    """Return the rows of `raw` with a verdict and, with a PRM, process scores of each response.

    With a `world` each rank scores its share. Only rank 0 receives all rows, the others [].
    """
    file = Path(cfg.output_dir) / "data" / "scored.jsonl"
    model = cfg.prm_model_name_or_path
    weights = weights_digest(model) if cfg.use_prm and model else ""
    sources = {row["id"]: digest([repr(row), weights]) for row in raw}
    if world:
        journal, done = open_part(file, world, anew=cfg.overwrite_output_dir)
        todo = [row for row in raw if row["id"] not in done][world.rank :: world.size]
    else:
        if cfg.overwrite_output_dir:
            forget(file)
        journal = Journal(file)
        done = {row["id"] for row in journal.rows}
        todo = [row for row in raw if row["id"] not in done]
    prm = await open_prm(cfg, log.info) if todo else None
    with log.bar(len(todo), "problem", "score") as bar:

        async def finish(row: Row) -> None:
            work = [score_response(prm, row, response) for response in row["responses"]]
            made = {"responses": await asyncio.gather(*work), "source": sources[row["id"]]}
            journal.append(row | made)
            bar.advance()

        await for_each(todo, finish, in_flight=cfg.problems_in_flight)
    if prm:
        prm.close()
    journal.close()
    if world:
        world.barrier()
        if not world.is_main:
            return []
    by_id = {row["id"]: row for row in gather_parts(file).rows}
    if changed := [
        row["id"] for row in raw if by_id[row["id"]].get("source") != sources[row["id"]]
    ]:
        raise UserError(
            f"{file} has scores of other responses or of another PRM, first of {changed[0]}; use a "
            "new output_dir, or set overwrite_output_dir: true to start over."
        )
    return [by_id[row["id"]] for row in raw]


async def score_response(prm: ProcessModel | None, problem: Row, response: Row) -> Row:
    """Grade a finished response again, because the grader may have changed since sampling.

    Returns the response with `correct`, `process` (one score per step) and `refused` (the reason
    why the PRM cannot score it).
    """
    text, finished = response["text"], response["finish"] == "stop"
    correct = finished and grade(text, problem["answer"], problem["question"]).correct
    found = {"correct": correct, "process": None, "refused": None}
    if prm and finished and (steps := step_texts(text)):
        try:
            found["process"] = await prm.score(problem["question"], steps)
        except Unscored as refusal:
            found["refused"] = str(refusal)
    return response | found


# ---- Filter ----


def segments(text: str) -> list[tuple[str, str]]:
    """Return (act, text) of each segment of `text`, or [] if it has text outside of segments."""
    found: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        opener = OPENER.match(text, position)
        end = text.find(f"</{opener[1]}>", opener.end()) if opener else -1
        if opener is None or end < 0:
            return []
        found.append((opener[1], text[opener.end() : end]))
        position = end + len(f"</{opener[1]}>")
    return found


def step_texts(response: str) -> list[str]:
    """Return the steps of a response for repeat counts and the PRM: its segments, or its lines."""
    found = [text for _, text in segments(response)] or response.splitlines()
    return [text for text in found if text.strip()]


def curate_responses(problem: Row, cfg: SearchConfig) -> Row:
    """Turn a problem's scored responses into rows, best first, followed by preference pairs.

    A pair is a kept response and a wrong one, the best with the worst. `counts` has one count per
    filter and the number of kept responses.
    """
    responses = [
        response
        | {"sample": i, "steps": step_texts(response["text"])}
        | {"score": reduce(process, cfg.prm_reduce) if (process := response["process"]) else None}
        for i, response in enumerate(problem["responses"])
    ]
    kept, counts = select(responses, cfg)
    whole = [r for r in responses if r["finish"] == "stop" and not r["control_text"]]
    wrong = [r for r in whole if not r["correct"]]
    worst = sorted((r for r in wrong if r["tokens"] <= cfg.max_row_tokens), key=rank)
    source = {key: problem[key] for key in ("id", "question", "answer")}
    rows = []
    for good in kept:
        steps = _steps_of(good)
        said = {"steps": steps} if steps else {"response": good["text"]}
        rows.append(source | {"kind": "sample", "sample": good["sample"]} | said)
    for good, bad in list(zip(kept, worst, strict=False))[: cfg.max_pairs]:
        sides = {"chosen": good, "rejected": bad}
        said = {name: _steps_of(side) or side["text"] for name, side in sides.items()}
        rows.append(source | {"kind": "pair", "samples": [good["sample"], bad["sample"]]} | said)
    return {
        "rows": rows,
        "counts": counts,
        "solved": share_solved(responses),
        "generated_tokens": sum(response["tokens"] for response in responses),
    }


def _steps_of(response: Row) -> list[Row]:
    """Return the functional segments of a response, or [] for plain text."""
    return [{"act": act, "text": text} for act, text in segments(response["text"])]
