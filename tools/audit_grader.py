"""Audit the grader on a data set: its gold answers, respelled answers and near misses.

    python tools/audit_grader.py configs/tiny/evaluate.yaml eval_file=mine.jsonl [key=value …]

The audit counts gold answers of eval_file that the grader cannot read, respelled answers that it
rejects, and near misses that it accepts. No model is opened. Writes eval/audit.json below
output_dir, as `evaluate.py … audit=true` does.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from rftt.run.audit import audit_gold
from rftt.run.cli import cli
from rftt.run.config import EvalConfig

if __name__ == "__main__":
    cli(audit_gold, EvalConfig)
