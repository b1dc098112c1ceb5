"""Filter responses out of the training set with small pure functions.

`FILTERS` is the table of all filters. A filter receives the responses of one problem that earlier
filters kept, best first, and returns which of them to keep. `select` counts the others under the
filter's name, so the counts and the kept responses add up to all responses.
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
"""Maps rows to whether each is kept. A row is a scored response with the keys text, steps (their
texts), tokens, finish, control_text and correct. `score` is the PRM's score or None. `refused` is
the reason why the PRM did not score it, or None."""


NOT_PROSE = re.compile(
    r"\$[^$]*\$|\\\((?:[^\\]|\\[^()])*+\\\)|\\\[(?:[^\\]|\\[^\[\]])*+\\\]|\\[A-Za-z]+|</?[a-z_]+>"
)
"""Formulas, LaTeX commands and tags, whose letters do not belong to a language. A formula ends
before the next opener, so that many openers without an end take linear time."""


def script_ratio(text: str, scripts: Sequence[str]) -> float:
    """Return the share of the prose's letters that belong to `scripts`.

    It is 1 if the prose has no letters or `scripts` is empty.
    """
    letters = [letter for letter in NOT_PROSE.sub(" ", text) if letter.isalpha()]
    names = [unicodedata.name(letter, "").lower() for letter in letters]
    return fmean(name.startswith(tuple(scripts)) for name in names) if names and scripts else 1.0


def ngrams(text: str, n: int = 3) -> frozenset[tuple[str, ...]]:
    """Return all sequences of `n` words. An ideograph or a punctuation mark counts as a word."""
    words = re.findall(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+|[^\w\s]", text.lower())
    return frozenset(tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))


def similarity(one: str, other: str) -> float:
    """Return the Jaccard index of two texts' trigrams: 1 if all are shared, 0 if none is."""
    a, b = ngrams(one), ngrams(other)
    return len(a & b) / len(a | b)


# ---- The responses to one problem, best first ----


def rank(row: Row) -> tuple[float, int, int]:
    """Return a sort key, higher is better: the process score (arXiv 2502.13389).

    Without a PRM, fewer repeats are better, then shorter text.
    """
    return row["score"] or 0.0, -repeats(row["steps"]), -len(row["text"])


def each(stays: Callable[[Row, SearchConfig], bool]) -> Filter:
    """Return a filter that judges each response by itself."""
    return lambda rows, cfg: [stays(row, cfg) for row in rows]


def share_solved(rows: Sequence[Row]) -> float:
    """Return the share of correct responses."""
    return fmean(row["correct"] for row in rows)


def custom(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    """Apply the user's `custom_filter`, which maps one row to whether it is kept."""
    if cfg.custom_filter is None:
        return [True] * len(rows)
    verdicts = [_plain(load_function("custom_filter", cfg.custom_filter)(row)) for row in rows]
    if others := [verdict for verdict in verdicts if not isinstance(verdict, bool)]:
        raise UserError(
            f"custom_filter={cfg.custom_filter} must return a bool, got {others[0]!r}; return True "
            "to keep a response."
        )
    return cast("list[bool]", verdicts)


def _plain(verdict: object) -> object:
    """Return a bool of numpy or torch as Python's own, and any other value unchanged."""
    scalar = getattr(verdict, "ndim", None) == 0
    is_bool = scalar and str(getattr(verdict, "dtype", "")) in ("bool", "torch.bool")
    return bool(verdict) if is_bool else verdict


def near_duplicate(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    """Drop each response whose similarity to a better kept one reaches `max_similarity`."""
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
    "control_text": each(lambda row, _: not row["control_text"]),
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
"""Name of a filter -> the filter, in the order of application. The share solved refers to all
responses, so its two filters come first. Slow filters come late. `beyond_n_best` is the last one,
so that it selects among responses that passed all others."""


def select(rows: Sequence[Row], cfg: SearchConfig) -> tuple[list[Row], Counter[str]]:
    """Return the kept responses of one problem, best first, and a count for each filter."""
    kept = sorted(rows, key=rank, reverse=True)
    counts: Counter[str] = Counter()
    for reason, stays in FILTERS.items():
        verdicts = stays(kept, cfg) if kept else []
        counts[reason] += verdicts.count(False)
        kept = [row for row, stay in zip(kept, verdicts, strict=True) if stay]
    counts["kept"] += len(kept)
    return kept, counts
