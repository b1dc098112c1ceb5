"""What keeps a response out of the training set: small pure functions with names.

`FILTERS` is the one table for responses: each function sees those of one problem that its
predecessors left, best first, and says which stay; `select` counts what goes under the function's
name, so that the counts and what is kept add up to what came in. The names are the reasons.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import cast

from rftt.curate import repeats
from rftt.run.cli import load_function
from rftt.run.config import SearchConfig
from rftt.run.files import Row
from rftt.types import UserError

Filter = Callable[[Sequence[Row], SearchConfig], list[bool]]
"""A row is a scored response: text, steps (their texts), tokens, finish, correct, score (PRM) or
None, refused (why the PRM would not score it) or None."""


NOT_PROSE = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+|</?[a-z_]+>", re.DOTALL)
"""Formulas, LaTeX commands and tags: their letters are of no language."""


def script_ratio(text: str, scripts: Sequence[str]) -> float:
    """Share of the prose's letters that belong to `scripts`; 1 without letters, or scripts."""
    letters = [letter for letter in NOT_PROSE.sub(" ", text) if letter.isalpha()]
    names = [unicodedata.name(letter, "").lower() for letter in letters]
    return fmean(name.startswith(tuple(scripts)) for name in names) if names and scripts else 1.0


def ngrams(text: str, n: int = 3) -> frozenset[tuple[str, ...]]:
    """The sets of `n` words in a row; an ideograph or a sign is a word of its own."""
    words = re.findall(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+|[^\w\s]", text.lower())
    return frozenset(tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))


def similarity(one: str, other: str) -> float:
    """Jaccard index of the n-grams: 1 for texts of the same phrases, 0 where none is shared."""
    a, b = ngrams(one), ngrams(other)
    return len(a & b) / len(a | b)


# ---- Of the responses to one problem, best first ----


def rank(row: Row) -> tuple[float, int, int]:
    """Higher is better: process score; without a PRM few repeats, then short (arXiv 2502.13389)."""
    return row["score"] or 0.0, -repeats(row["steps"]), -len(row["text"])


def each(stays: Callable[[Row, SearchConfig], bool]) -> Filter:
    """A filter that looks at one response at a time."""
    return lambda rows, cfg: [stays(row, cfg) for row in rows]


def share_solved(rows: Sequence[Row]) -> float:
    return fmean(row["correct"] for row in rows)


def custom(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    """The user's own: called with one row, says whether it stays."""
    if cfg.custom_filter is None:
        return [True] * len(rows)
    verdicts = list(map(load_function("custom_filter", cfg.custom_filter), rows))
    if others := [verdict for verdict in verdicts if not isinstance(verdict, bool)]:
        raise UserError(f"custom_filter={cfg.custom_filter} returned {others[0]!r}, not a bool.")
    return cast("list[bool]", verdicts)


def near_duplicate(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    """Greedy, best first: out goes what is as similar as `max_similarity` to one that stays."""
    kept: list[str] = []
    verdicts = []
    for row in rows:
        text = row["text"]
        verdicts.append(all(similarity(text, other) < cfg.max_similarity for other in kept))
        kept += [text] if verdicts[-1] else []
    return verdicts


FILTERS: dict[str, Filter] = {
    "too_easy": lambda rows, cfg: [share_solved(rows) <= cfg.easy_query_threshold] * len(rows),
    "too_hard": lambda rows, cfg: [share_solved(rows) >= cfg.hard_query_threshold] * len(rows),
    "unfinished": each(lambda row, _: row["finish"] == "stop"),
    "wrong": each(lambda row, _: row["correct"]),
    "unscored": each(lambda row, _: row["refused"] is None),
    "low_process_score": each(lambda row, cfg: (row["score"] or 0.0) >= cfg.prm_threshold),
    "language": each(
        lambda row, cfg: script_ratio(row["text"], cfg.scripts) >= cfg.min_script_ratio
    ),
    "repetitive": each(lambda row, cfg: repeats(row["steps"]) <= cfg.max_repeats),
    "length": each(lambda row, cfg: cfg.min_row_tokens <= row["tokens"] <= cfg.max_row_tokens),
    "custom": custom,
    "near_duplicate": near_duplicate,
    "beyond_n_best": lambda rows, cfg: [i < cfg.n_best_to_keep for i in range(len(rows))],
}
"""Reason -> who stays. The share solved is of all responses, so those two come first; what costs
time comes late, and n best are the best of all that is fit."""


def select(rows: Sequence[Row], cfg: SearchConfig) -> tuple[list[Row], Counter[str]]:
    """The responses of one problem that are kept, best first, and every other one's reason."""
    kept = sorted(rows, key=rank, reverse=True)
    counts: Counter[str] = Counter()
    for reason, stays in FILTERS.items():
        verdicts = stays(kept, cfg) if kept else []
        counts[reason] += verdicts.count(False)
        kept = [row for row, stay in zip(kept, verdicts, strict=True) if stay]
    counts["kept"] += len(kept)
    return kept, counts
