"""Phase 1: problems -> trees -> curated training rows (PAPER §1).

    python search.py configs/tiny/search.yaml [method=mcts|beam|dvts|sample] [key=value …]

An ordinary instruct model is asked, act by act, to extend unfinished solutions; a tree per problem
collects right and wrong ways; curation turns each tree into rows for train_sft.py. Writes trees/,
data/{raw,sft}.jsonl and stats.json below output_dir. Killed and started again, it continues with
the problems that are not in data/raw.jsonl and ends with the same rows.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rftt.cli import check_same_run, cli
from rftt.config import SearchConfig
from rftt.data import (
    Journal,
    load_problems,
    load_tokenizer,
    question_messages,
    write_json,
    write_jsonl,
)
from rftt.engines import open_chat
from rftt.engines.base import Counters
from rftt.functions import Messages
from rftt.rewards.grader import grade
from rftt.schema import Problem, Reply
from rftt.search.beam import beam_search
from rftt.search.curate import Rules, curate
from rftt.search.expand import Prompted, reply
from rftt.search.mcts import grow
from rftt.search.samplers import Explore, for_each, prompted_tree, tree_record
from rftt.watch.log import RunLog


def main(cfg: SearchConfig) -> None:
    out = Path(cfg.output_dir)
    check_same_run(out / "config.yaml", asdict(cfg))
    problems = load_problems(
        cfg.train_file, limit=cfg.max_problems, keys=(cfg.prompt_key, cfg.answer_key)
    )
    tokenizer = load_tokenizer(cfg.model_name_or_path, trust_remote_code=cfg.trust_remote_code)
    log = RunLog(out, asdict(cfg), enabled=True)
    journal = Journal(out / "data" / "raw.jsonl")
    done = {row["id"] for row in journal.rows}
    todo = [problem for problem in problems if problem.id not in done]
    log.info(f"{len(problems)} problems, {len(done)} of them done before")
    work = answer_and_grade if cfg.method == "sample" else grow_and_curate

    async def run() -> None:
        async with open_chat(cfg, tokenizer, out / "data" / "api.jsonl", log.info) as chat:
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
                    found = await work(cfg, replace(ctx, spent=Counters()), problem)
                    journal.append({"id": problem.id, **found})
                    solved = sum(row["solved"] for row in journal.rows) / len(journal.rows)
                    bar.advance(solved=solved)

                await for_each(todo, finish, in_flight=cfg.problems_in_flight)

    try:
        asyncio.run(run())
    finally:  # out of budget or interrupted: what is done is there to be used
        journal.close()
        if journal.rows:
            stats = finish_data(out, journal, problems, tokenizer, cfg.max_row_tokens)
            log.info(
                f"{cfg.method}: {stats['rows']} rows from {stats['problems']} problems, "
                f"{stats['tokens_per_row']:,.0f} generated tokens per row: {stats['counts']}"
            )


async def grow_and_curate(cfg: SearchConfig, ctx: Prompted, problem: Problem) -> dict[str, Any]:
    """A tree of prompted acts, kept below trees/, and the rows that curation makes of it."""

    async def ask(messages: Messages, act: str, problem_id: str) -> str | None:
        said = await reply(ctx, messages, act, problem_id, "curate", act)
        return said.text if said.whole else None

    beam = partial(beam_search, branching=cfg.beam_branching)
    ways: dict[str, Explore] = {
        "mcts": grow,
        "beam": partial(beam, width=cfg.beam_width),
        "dvts": partial(beam, width=1, subtrees=cfg.beam_width),
    }
    tree = await prompted_tree(
        ctx,
        problem,
        simulations=cfg.simulations,
        exploration_weight=cfg.exploration_weight,
        in_flight=cfg.leaves_in_flight,
        explore=ways[cfg.method],
    )
    rules = Rules(cfg.max_plain_paths, cfg.min_shared_steps, cfg.max_repeats)
    rows, counts = await curate(tree, problem, ask, rules)
    name = f"trees/{quote(problem.id, safe='')}.json"
    write_json(Path(cfg.output_dir) / name, tree_record(tree, problem))
    return {
        "rows": [row | {"tree": name} for row in rows],
        "counts": counts,
        "solved": sum(leaf.value_sum for leaf in tree.leaves()) / tree.root.visits,
        "generated_tokens": ctx.spent.generated_tokens,
    }


async def answer_and_grade(cfg: SearchConfig, ctx: Prompted, problem: Problem) -> dict[str, Any]:
    """Rejection sampling: the shortest distinct right answers to the bare question become rows."""
    messages, gold = question_messages(problem.question, cfg.system_prompt), str(problem.answer)

    async def answer(i: int) -> Reply:
        return await reply(ctx, messages, None, problem.id, i)

    answers = await for_each(range(cfg.simulations), answer, in_flight=cfg.simulations)
    whole = [said.text for said in answers if said.whole]
    correct = [text for text in whole if grade(text, gold, problem.question).correct]
    kept = sorted(dict.fromkeys(correct), key=len)[: cfg.max_plain_paths]
    rows = [
        {
            "id": problem.id,
            "kind": "sample",
            "question": problem.question,
            "answer": problem.answer,
            "response": response,
        }
        for response in kept
    ]
    return {
        "rows": rows,
        "counts": {"kept_sample": len(kept), "wrong_or_repeated": cfg.simulations - len(kept)},
        "solved": len(correct) / cfg.simulations,
        "generated_tokens": ctx.spent.generated_tokens,
    }


def finish_data(
    out: Path, journal: Journal, problems: list[Problem], tokenizer: Any, max_row_tokens: int
) -> dict[str, Any]:
    """data/sft.jsonl in the order of the problems, and stats.json with every count, so far."""
    by_id = {row["id"]: row for row in journal.rows}
    problems = [problem for problem in problems if problem.id in by_id]
    counts: Counter[str] = Counter()
    rows = []
    for problem in problems:
        record = by_id[problem.id]
        counts.update(record["counts"])
        for row in record["rows"]:
            text = row.get("response") or "".join(step["text"] for step in row["steps"])
            if len(tokenizer.encode(text)) > max_row_tokens:
                counts["row_too_long"] += 1
            else:
                rows.append(row)
    write_jsonl(out / "data" / "sft.jsonl", rows)
    solved = sum(by_id[problem.id]["solved"] for problem in problems) / max(1, len(problems))
    generated = sum(by_id[problem.id]["generated_tokens"] for problem in problems)
    stats = {
        "problems": len(problems),
        "rows": len(rows),
        "solved": solved,
        "generated_tokens": generated,
        "tokens_per_row": generated / max(1, len(rows)),
        "counts": dict(counts),
    }
    write_json(out / "stats.json", stats)
    return stats


if __name__ == "__main__":
    cli(main, SearchConfig)
