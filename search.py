"""Phase 1: problems -> trees or samples -> curated training rows (arXiv 2502.13389).

    python search.py configs/tiny/search.yaml [method=mcts|beam|dvts|sample|score] [key=value …]
    torchrun --nproc_per_node N search.py …           (each rank takes its share of the problems)

- mcts, beam, dvts: an instruct model is asked, act by act, to extend unfinished solutions. A tree
  per problem collects right and wrong paths, and curation makes rows of it for train_sft.py.
- sample: the model is asked the bare question. Every response is cached, scored, then filtered
  (ms-swift's RFT). Keys of filters may change between two runs in one output_dir.
- score: the cache of another run is scored and filtered again, without a model.

Writes trees/, stats.json and data/{raw,scored,sft,dpo}.jsonl below output_dir. Killed and started
again, it continues with what is not yet in data/{raw,scored}.jsonl and ends with the same rows.
"""

from __future__ import annotations

from rftt.run.config import SearchConfig
from rftt.run.front import front

if __name__ == "__main__":  # answers --help and config errors before torch is imported
    front("search", SearchConfig)  # runs main() and exits

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rftt.beam import explorer
from rftt.curate import curate
from rftt.engines.base import Counters, for_each
from rftt.engines.chat import open_chat, open_tokenizer
from rftt.engines.templates import holds_control_text
from rftt.graders import open_prm
from rftt.graders.prm import ProcessModel, score_steps
from rftt.learner.fsdp import World, process_group
from rftt.prompted import Prompted, draw, prompted_tree
from rftt.run.data import load_problems
from rftt.run.files import Journal, Row, file_name, gather_parts, open_part, write_json
from rftt.run.log import RunLog
from rftt.run.prompts_file import load_prompts
from rftt.run.rejection import mark_control, sample_responses, score_responses
from rftt.run.rows import clear_trees, open_log, score_cache, search_source, write_data
from rftt.run.stats import tree_record
from rftt.types import Problem, UserError


def main(cfg: SearchConfig) -> None:
    with process_group(cfg.device) as world:
        search(cfg, world)


def search(cfg: SearchConfig, world: World) -> None:
    log = open_log(cfg, world)
    if cfg.method == "score":
        score_cache(cfg, log, world)
        return
    problems = load_problems(
        cfg.train_file, limit=cfg.max_problems, keys=(cfg.prompt_key, cfg.answer_key)
    )
    tokenizer = open_tokenizer(cfg)
    file = Path(cfg.output_dir) / "data" / "raw.jsonl"
    source = search_source(cfg, tokenizer, problems)
    clear_trees(cfg, world)
    journal, done = open_part(file, world, source, anew=cfg.overwrite_output_dir)
    left = [problem for problem in problems if problem.id not in done]
    log.info(f"{len(problems)} problems, {len(done)} of them done before")
    failure: UserError | None = None
    try:
        if left:  # on any rank: its engine may be one of several that open together
            share = left[world.rank :: world.size]
            asyncio.run(generate(cfg, log, world, tokenizer, share, journal))
            journal = gather_parts(file) if world.is_main else journal
    except UserError as error:  # such as a spent budget: the finished problems make rows
        failure = error
    journal.close()
    by_id = {row["id"]: row for row in journal.rows}
    raw = [by_id[problem.id] for problem in problems if problem.id in by_id]
    if raw and world.is_main:  # no collectives: a closed vLLM has ended the process group
        if cfg.method == "sample":
            scored = asyncio.run(score_responses(cfg, log, raw))
            control = partial(holds_control_text, tokenizer, functional=True)
            write_data(cfg, log, [mark_control(row, control) for row in scored])
        else:
            write_data(cfg, log, raw, lambda text: len(tokenizer.encode(text)))
    if failure:
        raise failure


# ---- Generate: a tree or responses per problem, into data/raw.jsonl ----


async def generate(
    cfg: SearchConfig,
    log: RunLog,
    world: World,
    tokenizer: Any,
    todo: Sequence[Problem],
    journal: Journal,
) -> None:
    """Search or sample for each of `todo` and append the results to the journal. Collective."""
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
            prompts=load_prompts(cfg.prompts_file),
            contract_tries=cfg.contract_tries,
            control=partial(holds_control_text, tokenizer, functional=True),
            continues=cfg.engine != "api",
        )
        with log.bar(len(todo), "problem", cfg.method) as bar:

            async def finish(problem: Problem) -> None:
                task_ctx = replace(ctx, spent=Counters(), refusals=Counter())
                found = await work(cfg, task_ctx, problem)
                if not task_ctx.spent.requests and "counts" in found:
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
    """Grow a tree of prompted acts, write it below trees/, and return the rows made from it."""
    tree = await prompted_tree(
        ctx,
        problem,
        simulations=cfg.simulations,
        exploration_weight=cfg.exploration_weight,
        in_flight=cfg.leaves_in_flight,
        explore=explorer(cfg.method, cfg),
    )
    n_unscored = await score_steps(prm, tree, problem) if prm else 0
    rows, counts = await curate(tree, problem, partial(draw, ctx, problem), cfg)
    counts += ctx.refusals + Counter(path_unscored=n_unscored)
    name = f"trees/{file_name(problem.id)}.json"
    write_json(Path(cfg.output_dir) / name, tree_record(tree, problem))
    return {
        "rows": [row | {"tree": name} for row in rows],
        "counts": dict(sorted(counts.items())),  # replies come in any order
        "solved": tree.root.q,
        "generated_tokens": ctx.spent.generated_tokens,
    }
