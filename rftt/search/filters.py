"""What keeps a row out of the training set: small pure functions; curate.py counts the reasons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rftt.functions import sentences, successors
from rftt.schema import Step


def repeats(steps: Sequence[Step]) -> int:
    """How often the most frequent sentence of a path occurs."""
    counts = Counter(s.strip().lower() for step in steps for s in sentences(step.text))
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
