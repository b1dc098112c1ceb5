"""Write the output of a search: its log, data/{sft,dpo}.jsonl, and counts in stats.json."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rftt.engines.chat import open_tokenizer
from rftt.engines.templates import holds_control_text
from rftt.run.cli import check_same_run, load_function
from rftt.run.config import Filters
from rftt.run.files import Row, make_folder, write_json, write_jsonl
from rftt.run.log import RunLog
from rftt.run.prompts_file import load_prompts
from rftt.run.provenance import MadeFrom, made_from
from rftt.run.rejection import (
    RESPONSES,
    curate_responses,
    is_marked,
    load_responses,
    mark_control,
    score_responses,
)
from rftt.types import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.learner.fsdp import World
    from rftt.run.config import SearchConfig


def open_log(cfg: SearchConfig, world: World) -> RunLog:
    """Open the log of a search. Raises UserError if output_dir belongs to other settings.

    The filters of responses may differ, because they are applied again to the cached responses.
    """
    if cfg.engine == "api" and cfg.method != "score" and world.size > 1:
        raise UserError(
            f"engine=api needs a single process, because it has one ledger, got {world.size}; "
            "start one process and raise api_max_concurrent."
        )
    changeable = {field.name for field in fields(Filters)}
    changeable |= {"prm_reduce", "max_repeats"} if cfg.method in RESPONSES else set()
    fixed = {key: value for key, value in asdict(cfg).items() if key not in changeable}
    if not cfg.overwrite_output_dir:
        check_same_run(Path(cfg.output_dir) / "config.yaml", fixed)
    if cfg.custom_filter is not None:
        load_function("custom_filter", cfg.custom_filter)  # a mistake appears before sampling
    log = RunLog(Path(cfg.output_dir), asdict(cfg), enabled=world.is_main)
    if world.is_main:  # a file of this name appears before sampling
        for name in ("data",) if cfg.method in RESPONSES else ("data", "trees"):
            make_folder(Path(cfg.output_dir) / name)
    return log


def clear_trees(cfg: SearchConfig, world: World) -> None:
    """Delete the trees of a search that is begun anew. All ranks meet before they write others."""
    if cfg.overwrite_output_dir and world.is_main:
        for path in (Path(cfg.output_dir) / "trees").glob("[!.]*"):
            if path.suffix in (".json", ".html"):
                path.unlink()


def search_source(
    cfg: SearchConfig, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> MadeFrom:
    """Return the digests of the inputs of data/raw.jsonl.

    All texts of phase 1 count: those that the model is shown, and those that refuse its replies.
    """
    texts = load_prompts(cfg.prompts_file).model_dump_json()
    return made_from(cfg, tokenizer, problems, texts)


def score_cache(cfg: SearchConfig, log: RunLog, world: World) -> None:
    """Score and filter the responses in `raw_file` (method=score). Collective."""
    raw = load_responses(str(cfg.raw_file))[: cfg.max_problems]
    log.info(f"{len(raw)} problems in {cfg.raw_file}; no model is opened, nothing is sampled")
    control = None if is_marked(raw) else _open_control(cfg)
    scored = asyncio.run(score_responses(cfg, log, raw, world))
    if world.is_main:
        write_data(cfg, log, [mark_control(row, control) for row in scored] if control else scored)


def _open_control(cfg: SearchConfig) -> Callable[[str], bool]:
    """Return a function that finds control text, for a cache that does not mark it."""
    try:
        tokenizer = open_tokenizer(cfg)
    except UserError as error:
        raise UserError(
            f"{cfg.raw_file} does not mark responses with control_text, so that "
            f"model_name_or_path must be the model that sampled them; set it ({error})."
        ) from error
    return partial(holds_control_text, tokenizer, functional=True)


def write_data(
    cfg: SearchConfig, log: RunLog, raw: Sequence[Row], n_tokens: Callable[[str], int] | None = None
) -> None:
    """Write data/sft.jsonl and data/dpo.jsonl in the order of `raw`, and stats.json."""
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
        "counts": dict(sorted(counts.items())),
    }
    write_json(out / "stats.json", stats)
    log.info(
        f"{cfg.method}: {len(rows)} rows, {len(pairs)} pairs from {len(raw)} problems, "
        f"{stats['tokens_per_row']:,.0f} generated tokens per row: {dict(+counts)}"
    )


def texts_of(row: Row) -> list[str]:
    """Return the text of each response in a row from a tree."""
    found = (row[key] for key in ("steps", "chosen", "rejected") if key in row)
    return ["".join(step["text"] for step in steps) for steps in found]
