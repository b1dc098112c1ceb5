"""JSONL and JSON on disk: whole files or none, and journals that survive a kill. No torch here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from glob import escape
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rftt.types import UserError

if TYPE_CHECKING:
    from rftt.learner.fsdp import World

Row = dict[str, Any]


def read_jsonl(path: str | Path) -> list[tuple[int, Row]]:
    """(line number, row) for each line. Raises UserError on a missing, empty or broken file."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist.")
    rows: list[tuple[int, Row]] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number} is not JSON ({error.msg}).") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number} holds a {type(row).__name__}, not an object.")
            rows.append((number, row))
    if not rows:
        raise UserError(f"{path} has 0 rows; look at what should have written it.")
    return rows


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write all lines or none: a temporary file takes the name only when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def write_json(path: str | Path, value: object) -> None:
    """One readable value."""
    write_lines(path, [json.dumps(value, ensure_ascii=False, indent=1)])


class Journal:
    """An append-only JSONL of finished work: a killed job reopens it and does only the rest.

    One line per unit, flushed before the next is begun; a last line cut off by a kill is dropped.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.read_bytes() if self.path.exists() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        if kept != whole:
            os.truncate(self.path, len(kept))
        self.rows: list[Row] = [json.loads(line) for line in kept.splitlines()]
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for its lifetime)

    def append(self, row: Row) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self.rows.append(row)

    def close(self) -> None:
        """What was appended is on the disk then, whatever happens to the machine."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def part_of(path: Path, rank: int) -> Path:
    """The journal of one rank among several; rank 0 writes the whole one."""
    return path.with_suffix(f".rank{rank}{path.suffix}") if rank else path


def gather_parts(path: Path) -> Journal:
    """The journal of rank 0, closed, with the rows of all others, whose files are then gone."""
    whole = Journal(path)
    known = {row["id"] for row in whole.rows}
    names = sorted(path.parent.glob(f"{escape(path.stem)}.rank*{path.suffix}"))
    parts = [Journal(name) for name in names]
    for row in chain.from_iterable(part.rows for part in parts):
        if row["id"] not in known:  # killed before all parts are gone, it would come again
            whole.append(row)
    for journal in (whole, *parts):
        journal.close()
    for name in names:
        name.unlink()
    return whole


def open_part(path: Path, world: World) -> tuple[Journal, set[str]]:
    """This rank's part of a journal, and the ids that any rank has done before. Collective."""
    if world.is_main:
        gather_parts(path)
    world.barrier()
    done = {row["id"] for row in Journal(path).rows}
    world.barrier()
    return Journal(part_of(path, world.rank)), done
