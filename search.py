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
from rftt.data import Journal, decode, load_problems, load_tokenizer, write_json, write_jsonl
from rftt.functions import Messages
from rftt.schema import Problem, Rollout


def main(cfg: SearchConfig) -> None:
    # Heavy imports wait until the config is known to be good.
    from rftt.engines import build_engine
    from rftt.engines.base import Counters
    from rftt.rewards.grader import grade
    from rftt.search.beam import beam_search
    from rftt.search.curate import Rules, curate
    from rftt.search.expand import Learned, Prompted, reply
    from rftt.search.mcts import grow
    from rftt.search.samplers import encode_question, for_each, prompted_tree, sample, tree_record
    from rftt.watch.log import RunLog

    out = Path(cfg.output_dir)
    check_same_run(out / "config.yaml", asdict(cfg))
    problems = load_problems(
        cfg.train_file, limit=cfg.max_problems, keys=(cfg.prompt_key, cfg.answer_key)
    )
    tokenizer = load_tokenizer(cfg.model_name_or_path, trust_remote_code=cfg.trust_remote_code)
    log = RunLog(out, asdict(cfg), enabled=True)
    engine = build_engine(cfg, cfg.model_name_or_path, len(tokenizer))
    prompted = Prompted(
        engine=engine,
        tokenizer=tokenizer,
        temperature=cfg.temperature,
        max_tokens=cfg.max_completion_length,
        max_depth=cfg.search_depth,
        max_direct_sentences=cfg.max_direct_sentences,
        seed=cfg.seed,
    )
    rules = Rules(cfg.max_plain_paths, cfg.min_shared_steps, cfg.max_repeats)

    beam = partial(beam_search, branching=cfg.beam_branching)
    ways = {
        "mcts": grow,
        "beam": partial(beam, width=cfg.beam_width),
        "dvts": partial(beam, width=1, subtrees=cfg.beam_width),
    }

    async def grow_and_curate(problem: Problem) -> dict[str, Any]:
        ctx = replace(prompted, spent=Counters())

        async def ask(messages: Messages, act: str, problem_id: str) -> str | None:
            text, whole = await reply(ctx, messages, act, problem_id, "curate", act)
            return text if whole else None

        tree = await prompted_tree(
            ctx,
            problem,
            simulations=cfg.simulations,
            exploration_weight=cfg.exploration_weight,
            in_flight=cfg.leaves_in_flight,
            explore=ways[cfg.method],
        )
        rows, counts = await curate(tree, problem, ask, rules)
        name = f"trees/{quote(problem.id, safe='')}.json"
        write_json(out / name, tree_record(tree, problem, tokenizer))
        solved = sum(leaf.value_sum for leaf in tree.leaves()) / tree.root.visits
        return {
            "rows": [row | {"tree": name} for row in rows],
            "counts": counts,
            "solved": solved,
            "generated_tokens": ctx.spent.generated_tokens,
        }

    plain = Learned(
        engine=engine,
        tokenizer=tokenizer,
        ids=None,
        temperature=cfg.temperature,
        max_tokens=cfg.max_completion_length,
        max_depth=1,
        seed=cfg.seed,
    )

    async def answer_and_grade(problem: Problem) -> dict[str, Any]:
        prompt = encode_question(plain, problem, cfg.system_prompt)
        rollouts = await sample(plain, problem, prompt, n=cfg.simulations, group=0)
        texts = [decode(tokenizer, r.response_ids, skip_special=True) for r in rollouts]
        right = [
            text
            for text, rollout in zip(texts, rollouts, strict=True)
            if rollout.finish == "stop"
            and grade(text, str(problem.answer), problem.question).correct
        ]
        return sample_record(problem, rollouts, right, cfg.max_plain_paths)

    work = grow_and_curate if cfg.method in ways else answer_and_grade
    journal = Journal(out / "data" / "raw.jsonl")
    done = {row["id"] for row in journal.rows}
    todo = [problem for problem in problems if problem.id not in done]
    log.info(f"{len(problems)} problems, {len(done)} of them done before")

    async def run() -> None:
        with log.bar(len(todo), "problem", cfg.method) as bar:

            async def finish(problem: Problem) -> None:
                journal.append({"id": problem.id, **await work(problem)})
                solved = sum(row["solved"] for row in journal.rows) / len(journal.rows)
                bar.advance(solved=solved)

            await for_each(todo, finish, in_flight=cfg.problems_in_flight)

    asyncio.run(run())
    engine.close()
    stats = finish_data(out, journal, problems, tokenizer, cfg.max_row_tokens)
    log.info(
        f"{cfg.method}: {stats['rows']} rows from {len(problems)} problems, "
        f"{stats['tokens_per_row']:,.0f} generated tokens per row: {stats['counts']}"
    )


def sample_record(
    problem: Problem, rollouts: list[Rollout], right: list[str], keep: int
) -> dict[str, Any]:
    """Rejection sampling: the shortest distinct right responses become rows."""
    kept = sorted(dict.fromkeys(right), key=len)[:keep]
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
    counts = {"kept_sample": len(kept), "wrong_or_repeated": len(rollouts) - len(kept)}
    return {
        "rows": rows,
        "counts": counts,
        "solved": len(right) / len(rollouts),
        "generated_tokens": sum(rollout.n_generated for rollout in rollouts),
    }


def finish_data(
    out: Path, journal: Journal, problems: list[Problem], tokenizer: Any, max_row_tokens: int
) -> dict[str, Any]:
    """data/sft.jsonl in the order of the problems, and stats.json with every count."""
    journal.close()
    by_id = {row["id"]: row for row in journal.rows}
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
    solved = sum(by_id[problem.id]["solved"] for problem in problems) / len(problems)
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
