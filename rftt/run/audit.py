"""Audit the gold answers of a data set: can the grader be trusted with them?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rftt.graders.audit import audit
from rftt.run.data import load_problems
from rftt.run.files import write_json
from rftt.run.log import say

if TYPE_CHECKING:
    from rftt.run.config import EvalConfig


def audit_gold(cfg: EvalConfig) -> None:
    """Print and save counts of the gold answers of `eval_file`, without opening a model.

    Raises UserError for rows without a question, as load_problems does.
    """
    problems = load_problems(
        cfg.eval_file,
        limit=cfg.max_problems,
        graded=False,
        keys=(cfg.prompt_key, cfg.answer_key),
        system_prompt=cfg.system_prompt,
    )
    found = audit([problem.answer or "" for problem in problems])
    write_json(Path(cfg.output_dir) / "eval" / "audit.json", found)
    parsed = sum(problem.answer is not None for problem in problems)
    unread, words = len(found["unusable"]), len(found["words"])
    lines = [
        f"{len(problems)} gold answers, {unread} unusable, {words} compared as words",
        f"{parsed} parse, {len(problems) - unread} equal themselves",
    ]
    for kind in ("false_negatives", "false_positives"):
        lines.append(kind.replace("_", " "))
        lines += [
            f"  {change:24} {wrong:5} of {tried}" for change, (wrong, tried) in found[kind].items()
        ]
    say("\n".join(lines))
