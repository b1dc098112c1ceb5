"""Phase 1: problems -> trees or samples -> curated training rows (PAPER §1).

    python search.py configs/tiny/search.yaml [method=mcts|beam|dvts|sample|score] [key=value …]
    torchrun --nproc_per_node N search.py …           (each rank takes its share of the problems)

An ordinary instruct model is asked, act by act, to extend unfinished solutions; a tree per problem
collects right and wrong ways; curation turns each tree into rows for train_sft.py. `sample` asks
the bare question instead and caches every response, right or wrong; what is cached is scored, then
filtered (PAPER §2). `score` does only that, to the cache of another run, and opens no model; keys
of filters may change between two runs in one output_dir. Writes trees/, data/{raw,scored,sft,dpo}
.jsonl and stats.json below output_dir. Killed and started again, it continues with what is not yet
in data/raw.jsonl and data/scored.jsonl and ends with the same rows.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rftt.beam import explorer
from rftt.curate import curate, curate_responses, step_texts
from rftt.engines import open_chat
from rftt.engines.base import Counters
from rftt.graders.math import extract, grade
from rftt.graders.prm import ProcessModel, Unscored, open_prm
from rftt.rollout import Prompted, reply
from rftt.run.cli import check_same_run, cli, load_function
from rftt.run.config import SearchConfig
from rftt.run.data import (
    Journal,
    Row,
    gather_parts,
    load_problems,
    load_tokenizer,
    question_messages,
    read_jsonl,
    write_json,
    write_jsonl,
)
from rftt.run.fields import Filters
from rftt.run.log import RunLog
from rftt.samplers import for_each, prompted_tree, score_steps, tree_record
from rftt.tokens import Messages
from rftt.types import Problem, Reply, UserError

if TYPE_CHECKING:
    from rftt.learner.fsdp import World

RESPONSES = ("sample", "score")
"""Methods whose raw rows are responses; the others' are curated already."""


def main(cfg: SearchConfig) -> None:
    from rftt.learner.fsdp import joined

    with joined(cfg.device) as world:
        search(cfg, world)


def search(cfg: SearchConfig, world: World) -> None:
    from rftt.learner.fsdp import open_part

    if cfg.engine == "api" and cfg.method != "score" and world.size > 1:
        raise UserError("engine=api has one ledger: run one process, raise api_max_concurrent.")
    out, file = Path(cfg.output_dir), Path(cfg.output_dir) / "data" / "raw.jsonl"
    changeable = {field.name for field in fields(Filters)}
    changeable |= {"prm_reduce", "max_repeats"} if cfg.method in RESPONSES else set()
    fixed = {key: value for key, value in asdict(cfg).items() if key not in changeable}
    check_same_run(out / "config.yaml", fixed)
    if cfg.custom_filter is not None:
        load_function("custom_filter", cfg.custom_filter)  # now rather than after hours
    log = RunLog(out, asdict(cfg), enabled=world.is_main)
    if cfg.method == "score":
        raw = load_responses(str(cfg.raw_file))[: cfg.max_problems]
        log.info(f"{len(raw)} problems in {cfg.raw_file}; no model is opened, nothing is sampled")
        scored = asyncio.run(score(cfg, log, raw, world))
        if world.is_main:
            write_data(cfg, log, scored)
        return
    problems = load_problems(
        cfg.train_file, limit=cfg.max_problems, keys=(cfg.prompt_key, cfg.answer_key)
    )
    tokenizer = load_tokenizer(cfg.model_name_or_path, trust_remote_code=cfg.trust_remote_code)

    def n_tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    journal, done = open_part(file, world)
    left = [problem for problem in problems if problem.id not in done]
    log.info(f"{len(problems)} problems, {len(done)} of them done before")

    def finish() -> None:
        journal.close()
        by_id = {row["id"]: row for row in journal.rows}
        raw = [by_id[problem.id] for problem in problems if problem.id in by_id]
        if raw and world.is_main:  # alone: a closed vLLM has taken the process group with it
            raw = asyncio.run(score(cfg, log, raw)) if cfg.method == "sample" else raw
            write_data(cfg, log, raw, None if cfg.method == "sample" else n_tokens)

    try:
        if left:  # on any rank: its engine may be one of several that open together
            share = left[world.rank :: world.size]
            asyncio.run(generate(cfg, log, world, tokenizer, share, journal))
            journal = gather_parts(file) if world.is_main else journal
    except UserError:  # such as out of budget: what is done is there to be used
        finish()
        raise
    finish()


# ---- Generate: a tree or responses per problem, into data/raw.jsonl ----


async def generate(
    cfg: SearchConfig,
    log: RunLog,
    world: World,
    tokenizer: Any,
    todo: Sequence[Problem],
    journal: Journal,
) -> None:
    prm = None if cfg.method == "sample" else await open_prm(cfg, log.info)
    work = sample_responses if cfg.method == "sample" else partial(grow_and_curate, prm)
    ledger = Path(cfg.output_dir) / "data" / "api.jsonl"
    async with open_chat(cfg, tokenizer, ledger, log.info) as chat:
        ctx = Prompted(
            chat=chat,
            temperature=cfg.temperature,
            max_tokens=cfg.max_completion_length,
            max_depth=cfg.search_depth,
            max_direct_sentences=cfg.max_direct_sentences,
            seed=cfg.seed,
        )
        with log.bar(len(todo), "problem", cfg.method) as bar:

            async def finish(problem: Problem) -> None:
                own = replace(ctx, spent=Counters())
                found = await work(cfg, own, problem)
                if not own.spent.requests and "counts" in found:
                    found["counts"] = {"prompt_too_long": 1}
                journal.append({"id": problem.id, **found})
                bar.advance(solved=found["solved"])

            await for_each(todo, finish, in_flight=cfg.problems_in_flight)
        journal.close()
        world.barrier()  # before an in-process vLLM closes, which ends the process group
    if prm:
        prm.close()


async def grow_and_curate(
    prm: ProcessModel | None, cfg: SearchConfig, ctx: Prompted, problem: Problem
) -> Row:
    """A tree of prompted acts, kept below trees/, and the rows that curation makes of it."""

    async def ask(messages: Messages, act: str, problem_id: str) -> str | None:
        said = await reply(ctx, messages, act, problem_id, "curate", act)
        return said.text if said.whole else None

    tree = await prompted_tree(
        ctx,
        problem,
        simulations=cfg.simulations,
        exploration_weight=cfg.exploration_weight,
        in_flight=cfg.leaves_in_flight,
        explore=explorer(cfg.method, cfg),
    )
    n_unscored = await score_steps(prm, tree, problem) if prm else 0
    rows, counts = await curate(tree, problem, ask, cfg)
    counts += Counter(path_unscored=n_unscored)
    name = f"trees/{quote(problem.id, safe='')}.json"
    write_json(Path(cfg.output_dir) / name, tree_record(tree, problem))
    return {
        "rows": [row | {"tree": name} for row in rows],
        "counts": counts,
        "solved": sum(leaf.value_sum for leaf in tree.leaves()) / tree.root.visits,
        "generated_tokens": ctx.spent.generated_tokens,
    }


async def sample_responses(cfg: SearchConfig, ctx: Prompted, problem: Problem) -> Row:
    """Independent responses to the bare question, all of them, with what each of them cost."""
    messages, gold = question_messages(problem.question, cfg.system_prompt), str(problem.answer)

    async def answer(i: int) -> Reply:
        return await reply(ctx, messages, None, problem.id, i)

    responses = [
        {
            "text": said.text,
            "tokens": said.n_generated,
            "finish": "stop" if said.whole else "length",
            "logprob": said.logprob,
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


# ---- Score: what is cached, into data/scored.jsonl ----


def load_responses(path: str) -> list[Row]:
    """The cache of a `method=sample`. Raises UserError on a row that is none of it."""
    rows: dict[str, Row] = {}
    for number, row in read_jsonl(path):
        lacking = {"id", "question", "answer", "responses"} - set(row)
        for response in row.get("responses", []):
            lacking |= {"text", "tokens", "finish"} - set(response)
        if lacking or not row["responses"]:
            raise UserError(
                f"{path}:{number} lacks {', '.join(sorted(lacking)) or 'any response'}; "
                "search.py method=sample writes such a cache to data/raw.jsonl."
            )
        if row["id"] in rows:
            raise UserError(f"{path}:{number} repeats the problem {row['id']!r}.")
        rows[row["id"]] = row
    return list(rows.values())


async def score(
    cfg: SearchConfig, log: RunLog, raw: Sequence[Row], world: World | None = None
) -> list[Row]:
    """Every response of `raw` with the grader's verdict and, with a PRM, its process scores.

    With a `world` each rank scores its share, and rank 0 alone gets them all.
    """
    from rftt.learner.fsdp import open_part

    file = Path(cfg.output_dir) / "data" / "scored.jsonl"
    if world:
        journal, done = open_part(file, world)
        todo = [row for row in raw if row["id"] not in done][world.rank :: world.size]
    else:
        journal = Journal(file)
        done = {row["id"] for row in journal.rows}
        todo = [row for row in raw if row["id"] not in done]
    prm = await open_prm(cfg, log.info) if todo else None
    with log.bar(len(todo), "problem", "score") as bar:

        async def finish(row: Row) -> None:
            work = [score_response(prm, row, response) for response in row["responses"]]
            journal.append(row | {"responses": await asyncio.gather(*work)})
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
    if changed := [row["id"] for row in raw if texts(row) != texts(by_id[row["id"]])]:
        raise UserError(f"{file} holds other responses to {changed[0]}; use a new output_dir.")
    return [by_id[row["id"]] for row in raw]


def texts(row: Row) -> list[str]:
    return [response["text"] for response in row["responses"]]


async def score_response(prm: ProcessModel | None, problem: Row, response: Row) -> Row:
    """A finished response is graded again, for the grader may have learnt since it was sampled."""
    text, finished = response["text"], response["finish"] == "stop"
    correct = finished and grade(text, problem["answer"], problem["question"]).correct
    found = {"correct": correct, "process": None, "refused": None}
    if prm and finished and (steps := step_texts(text)):
        try:
            found["process"] = await prm.score(problem["question"], steps)
        except Unscored as refusal:
            found["refused"] = str(refusal)
    return response | found


# ---- Filter, and write what trains ----


def write_data(
    cfg: SearchConfig, log: RunLog, raw: Sequence[Row], n_tokens: Callable[[str], int] | None = None
) -> None:
    """data/sft.jsonl and data/dpo.jsonl in the order of `raw`, and stats.json with every count."""
    out, counts, rows = Path(cfg.output_dir), Counter[str](), []
    if cfg.method in RESPONSES:
        raw = [row | curate_responses(row, cfg) for row in raw]
    for row in raw:
        counts.update(row["counts"])
        for made in row["rows"]:
            if n_tokens and max(map(n_tokens, texts_of(made))) > cfg.max_row_tokens:
                counts["row_too_long"] += 1
            else:
                rows.append(made)
    pairs = [row for row in rows if row["kind"] == "pair"]
    rows = [row for row in rows if row["kind"] != "pair"]
    write_jsonl(out / "data" / "sft.jsonl", rows)
    write_jsonl(out / "data" / "dpo.jsonl", pairs)
    generated = sum(row["generated_tokens"] for row in raw)
    stats = {
        "problems": len(raw),
        "responses": sum(len(row.get("responses", [])) for row in raw),
        "rows": len(rows),
        "pairs": len(pairs),
        "solved": fmean(row["solved"] for row in raw),
        "generated_tokens": generated,
        "tokens_per_row": generated / max(1, len(rows)),
        "counts": dict(counts),
    }
    write_json(out / "stats.json", stats)
    log.info(
        f"{cfg.method}: {len(rows)} rows, {len(pairs)} pairs from {len(raw)} problems, "
        f"{stats['tokens_per_row']:,.0f} generated tokens per row: {dict(+counts)}"
    )


def texts_of(row: Row) -> list[str]:
    """The text of each response in a row of a tree."""
    found = (row[key] for key in ("steps", "chosen", "rejected") if key in row)
    return ["".join(step["text"] for step in steps) for steps in found]


if __name__ == "__main__":
    cli(main, SearchConfig)
