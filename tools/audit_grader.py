"""Audit the grader on a data set: its gold answers, respelled answers and near misses.

    python tools/audit_grader.py configs/tiny/evaluate.yaml eval_file=mine.jsonl [key=value …]

The audit counts gold answers of eval_file that the grader cannot read, respelled answers that it
rejects, and near misses that it accepts. No model is opened. Writes eval/audit.json below
output_dir.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from rftt.graders.audit import audit
from rftt.run.cli import cli
from rftt.run.config import EvalConfig
from rftt.run.data import load_problems
from rftt.run.files import write_json
from rftt.run.log import say


def main(cfg: EvalConfig) -> None:
    """Print and save how far the rewards of a data set can be trusted, before a run."""
    problems = load_problems(
        cfg.eval_file, limit=cfg.max_problems, graded=False, keys=(cfg.prompt_key, cfg.answer_key)
    )
    found = audit([problem.answer or "" for problem in problems])
    write_json(Path(cfg.output_dir) / "eval" / "audit.json", found)
    unread, words = len(found["unusable"]), len(found["words"])
    lines = [f"{len(problems)} gold answers, {unread} unusable, {words} compared as words"]
    for kind in ("false_negatives", "false_positives"):
        lines.append(kind.replace("_", " "))
        lines += [
            f"  {change:24} {wrong:5} of {tried}" for change, (wrong, tried) in found[kind].items()
        ]
    say("\n".join(lines))


if __name__ == "__main__":
    cli(main, EvalConfig)
