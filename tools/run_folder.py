"""Read a run directory for the report, and define the panels of its figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rftt.run.files import Row, decode_text, parse_json, parse_lines, read_bytes
from rftt.types import UserError

Panel = tuple[str, str, tuple[str, ...]]

CURVES: dict[str, tuple[Panel, ...]] = {
    "curves": (
        ("Response length", "tokens", ("response_length",)),
        ("Accuracy", "share right", ("accuracy", "eval/greedy")),
        ("Reward", "per rollout", ("reward",)),
        ("KL to the reference", "nats per token", ("kl",)),
    ),
    "health": (
        ("Entropy", "nats per token", ("entropy",)),
        ("Clipped", "share of tokens", ("clip_share",)),
        ("Engine against trainer", "KL, nats per token", ("mismatch_kl",)),
        ("Rollouts cut off", "share", ("truncated_share",)),
    ),
    "loss": (("Loss", "nats per token", ("loss", "eval_loss")),),
}
"""Figure -> panels (title, unit, keys of metrics.jsonl). Panels without data are omitted."""


@dataclass(frozen=True)
class Run:
    """Contents of one run directory. Missing parts are empty."""

    name: str
    path: Path
    metrics: list[Row]
    summary: Row
    stats: Row
    samples: list[Row]
    env: Row
    rows: list[Row]
    """Training rows that a search wrote."""

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps that have a value of a metric, and the values."""
        rows = [row for row in self.metrics if row.get(key) is not None]
        return [row["step"] for row in rows], [row[key] for row in rows]


def read_run(name: str, path: Path) -> Run:
    """Read a run directory. Raises UserError if it does not exist."""
    if not path.is_dir():
        raise UserError(f"run directory {path} does not exist; check the path.")
    samples = max(path.glob("samples/step_*.jsonl"), default=path / "none")
    return Run(
        name=name,
        path=path,
        metrics=whole_rows(path / "metrics.jsonl"),
        summary=read_json(path / "eval" / "summary.json"),
        stats=read_json(path / "stats.json"),
        samples=whole_rows(samples),
        env=read_json(path / "env.json"),
        rows=whole_rows(path / "data" / "sft.jsonl"),
    )


def whole_rows(path: Path) -> list[Row]:
    """Return the rows of a file that may be in use: an unfinished last line is ignored."""
    text = decode_text(read_bytes(path), path) if path.is_file() else ""
    return [row for _, row in parse_lines(text[: text.rfind("\n") + 1], path)]


def read_json(path: Path) -> Row:
    """Return a JSON object, or {} if the file does not exist. Raises UserError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = parse_json(decode_text(read_bytes(path), path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore or remove it.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must contain a JSON object; restore or remove it.")
    return value


def missing(run: Run) -> str:
    """Return the names of the parts that a run lacks."""
    parts = {"metrics.jsonl": run.metrics, "eval/summary.json": run.summary}
    parts |= {"stats.json": run.stats, "samples/": run.samples}
    return ", ".join(part for part, content in parts.items() if not content) or "nothing"
