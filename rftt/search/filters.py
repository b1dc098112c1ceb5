"""What keeps a path or a response out of the training set: small pure functions with names.

`FILTERS` is the one table for responses: each function sees those of one problem that its
predecessors left, best first, and says which stay; `select` counts what goes under the function's
name, so that the counts and what is kept add up to what came in. The names are the reasons.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from rftt.cli import load_function
from rftt.config import SearchConfig
from rftt.functions import sentences, successors
from rftt.schema import UserError

Row = dict[str, Any]
"""A scored response: text, steps (their texts), tokens, finish, correct, score (PRM) or None."""
Filter = Callable[[Sequence[Row], SearchConfig], list[bool]]


# ---- Of a text ----


def repeats(texts: Iterable[str]) -> int:
    """How often the most frequent sentence occurs in all `texts` together."""
    counts = Counter(s.strip().lower() for text in texts for s in sentences(text))
    return max(counts.values(), default=0)


def follows_grammar(acts: Sequence[str]) -> bool:
    """Whether the policy of phase 2 may speak these acts in this order.

    Phase 1 may begin with a direct answer, phase 2 may not: such paths would teach what the tree
    over functional tokens then never explores.
    """
    return all(
        act in successors(before, "learned")
        for before, act in zip([None, *acts], acts, strict=False)
    )


def mentions(text: str, answer: str) -> bool:
    """Whether `answer` stands in `text` by itself: 7 is not mentioned by 17 or 7.5."""
    pattern = rf"(?<![\w.]){re.escape(answer.strip())}(?![\w]|\.\d)"
    return re.search(pattern, text) is not None


def leaks(check: str, answer: str, known: str) -> bool:
    """Whether a check gives the gold answer away, which `known` (what precedes it) does not."""
    return mentions(check, answer) and not mentions(known, answer)


NOT_PROSE = re.compile(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+|</?[a-z_]+>", re.DOTALL)
"""Formulas, LaTeX commands and tags: their letters are of no language."""


def script_ratio(text: str, scripts: Sequence[str]) -> float:
    """Share of the letters of the prose in `text` that belong to `scripts`; 1 without letters."""
    letters = [letter for letter in NOT_PROSE.sub(" ", text) if letter.isalpha()]
    names = (unicodedata.name(letter, "").lower() for letter in letters)
    return sum(name.startswith(tuple(scripts)) for name in names) / len(letters) if letters else 1.0


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
    """Higher is better: process score; without a PRM few repeats, then short (PAPER §1)."""
    return row["score"] or 0.0, -repeats(row["steps"]), -len(row["text"])


def too_easy(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    return [fmean(row["correct"] for row in rows) <= cfg.easy_query_threshold] * len(rows)


def too_hard(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    return [fmean(row["correct"] for row in rows) >= cfg.hard_query_threshold] * len(rows)


def unfinished(rows: Sequence[Row], _: SearchConfig) -> list[bool]:
    return [row["finish"] == "stop" for row in rows]


def wrong(rows: Sequence[Row], _: SearchConfig) -> list[bool]:
    return [row["correct"] for row in rows]


def low_process_score(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    bar = cfg.prm_threshold
    return [bar is None or row["score"] is None or row["score"] >= bar for row in rows]


def language(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    wanted = cfg.scripts
    return [not wanted or script_ratio(row["text"], wanted) >= cfg.min_script_ratio for row in rows]


def repetitive(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    return [repeats(row["steps"]) <= cfg.max_repeats for row in rows]


def length(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    return [cfg.min_row_tokens <= row["tokens"] <= cfg.max_row_tokens for row in rows]


def custom(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    """The user's own: called with one row, says whether it stays."""
    if cfg.custom_filter is None:
        return [True] * len(rows)
    function = load_function("custom_filter", cfg.custom_filter)
    verdicts: list[bool] = []
    for row in rows:
        verdict = function(row)
        if not isinstance(verdict, bool):
            raise UserError(f"custom_filter={cfg.custom_filter} returned {verdict!r}, not a bool.")
        verdicts.append(verdict)
    return verdicts


def near_duplicate(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    """Greedy, best first: out goes what is as similar as `max_similarity` to one that stays."""
    kept: list[str] = []
    verdicts = []
    for row in rows:
        text = row["text"]
        verdicts.append(all(similarity(text, other) < cfg.max_similarity for other in kept))
        kept += [text] if verdicts[-1] else []
    return verdicts


def beyond_n_best(rows: Sequence[Row], cfg: SearchConfig) -> list[bool]:
    return [i < cfg.n_best_to_keep for i in range(len(rows))]


FILTERS: dict[str, Filter] = {
    "too_easy": too_easy,
    "too_hard": too_hard,
    "unfinished": unfinished,
    "wrong": wrong,
    "low_process_score": low_process_score,
    "language": language,
    "repetitive": repetitive,
    "length": length,
    "custom": custom,
    "near_duplicate": near_duplicate,
    "beyond_n_best": beyond_n_best,
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
