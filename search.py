"""Phase 1: problems -> trees or samples -> curated training rows (arXiv 2502.13389).

    python search.py configs/tiny/search.yaml [method=mcts|beam|dvts|sample|score] [key=value …]
    torchrun --nproc_per_node N search.py …           (each rank takes its share of the problems)

An ordinary instruct model is asked, act by act, to extend unfinished solutions; a tree per problem
collects right and wrong ways; curation turns each tree into rows for train_sft.py. `sample` asks
the bare question instead and caches every response, right or wrong; what is cached is scored, then
filtered (ms-swift's RFT). `score` does only that, to the cache of another run, and opens no model;
keys of filters may change between two runs in one output_dir. Writes trees/, stats.json and
data/{raw,scored,sft,dpo}.jsonl below output_dir. Killed and started again, it continues with what
is not yet in data/raw.jsonl and data/scored.jsonl and ends with the same rows.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rftt.beam import explorer
from rftt.curate import curate, score_steps
from rftt.engines.base import Counters, for_each
from rftt.engines.chat import load_tokenizer, open_chat
from rftt.graders import open_prm
from rftt.graders.prm import ProcessModel
from rftt.prompted import Prompted, prompted_tree, reply
from rftt.prompts import Messages
from rftt.run.cli import check_same_run, cli, load_function
from rftt.run.config import Filters, SearchConfig
from rftt.run.data import load_problems, write_data
from rftt.run.files import Journal, Row, gather_parts, open_part, write_json
from rftt.run.log import RunLog
from rftt.run.rejection import (
    RESPONSES,
    load_responses,
    sample_responses,
    score_responses,
)
from rftt.run.stats import tree_record
from rftt.types import Problem, UserError

if TYPE_CHECKING:
    from rftt.learner.fsdp import World


def main(cfg: SearchConfig) -> None:
    from rftt.learner.fsdp import joined

    with joined(cfg.device) as world:
        search(cfg, world)


def search(cfg: SearchConfig, world: World) -> None:
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
        scored = asyncio.run(score_responses(cfg, log, raw, world))
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
            raw = asyncio.run(score_responses(cfg, log, raw)) if cfg.method == "sample" else raw
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


if __name__ == "__main__":
    cli(main, SearchConfig)
