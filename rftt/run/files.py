"""Read and write JSONL and JSON: whole files or none, and journals that survive a kill.

This module does not import torch.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping
from glob import escape
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rftt.types import UserError

if TYPE_CHECKING:
    from rftt.learner.fsdp import World

Row = dict[str, Any]


UTF_16_OR_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""Byte order marks. That of little-endian UTF-32 starts with that of UTF-16."""


PACKED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
"""First bytes of a compressed file -> its format."""


MAX_NAME = 120
"""Longest file name made from an id, in bytes: file systems allow 255, some of them 143."""


UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that a terminal obeys or no file can hold: escape sequences, changes of the writing
direction, lone surrogates. Tabs and line breaks are allowed."""


def printable(text: str) -> str:
    """Return `text` with unprintable characters as escapes such as \\x1b."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: object, limit: int = 200) -> str:
    """Return the beginning of a foreign text, such as a library's error, for a message.

    An error without a text is named after its class.
    """
    said = str(text)
    if not said and isinstance(text, BaseException):
        said = type(text).__name__
    return printable(" ".join(said.split()))[:limit]


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file. Raises UserError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except IsADirectoryError as error:
        raise UserError(f"{path} must be a file, got a folder; name a file in it.") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path} cannot be read ({error}); check the file.") from error


def decode_text(data: bytes, path: str | Path) -> str:
    """Return UTF-8 as text without its byte order mark. Raises UserError for other encodings."""
    for magic, kind in PACKED.items():
        if data.startswith(magic):
            raise UserError(f"{path} must be text or gzip, got {kind}; unpack it.")
    one_nul = data[:2].count(0) == 1  # ASCII text in UTF-16 or UTF-32, without a mark
    if data.startswith(UTF_16_OR_32) or one_nul:
        raise UserError(f"{path} must be UTF-8, got UTF-16 or UTF-32; save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line} must be UTF-8, got the byte {data[error.start]:#04x}; save the file as "
            "UTF-8."
        ) from error


def valid_unicode(text: str) -> str:
    """Return `text` with each lone surrogate replaced by U+FFFD: files cannot hold surrogates."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text without lone surrogates. Raises ValueError with the reason.

    Only an escape such as `\\ud83d` can result in a surrogate, because `text` itself was decoded.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            value = json.loads(valid_unicode(json.dumps(value, ensure_ascii=False)))
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def read_jsonl(path: str | Path) -> list[tuple[int, Row]]:
    """Return (line number, row) of each line. Raises UserError for a missing or damaged file."""
    rows = parse_lines(decode_text(read_bytes(path), path), path)
    if not rows:
        raise UserError(f"{path} must have at least one row, but has 0 rows; check its source.")
    return rows


def parse_lines(text: str, path: str | Path) -> list[tuple[int, Row]]:
    """Return (line number, row) of each line of a JSONL text.

    Lines of NULs are skipped. A power cut leaves them where data was not yet on the disk.
    """
    rows: list[tuple[int, Row]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip("\0 \t\r"):
            continue
        try:
            row = parse_json(line.strip("\0"))
        except ValueError as error:
            raise UserError(
                f"{path}:{number} is not JSON ({error}); write one JSON object per line."
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{number} must be a JSON object, got {type(row).__name__}; write one "
                "object per line."
            )
        rows.append((number, row))
    return rows


def file_name(identity: str) -> str:
    """Return a file name of at most 120 bytes for an id. Different ids have different names."""
    name = quote(identity, safe="")
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - 17]}-{sha256(identity.encode()).hexdigest()[:16]}"


def make_folder(folder: Path) -> None:
    """Create a folder below output_dir. Raises UserError if it, or one above it, is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} must be a folder, but it or a folder above it is a file; remove the file, "
            "or use another output_dir."
        ) from error


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write all lines or none: a temporary file is renamed only after it is complete."""
    path = Path(path)
    make_folder(path.parent)
    if path.is_dir():
        raise UserError(f"{path} must be a file, but is a folder; remove the folder.")
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(valid_unicode(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line, all of them or none."""
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def write_json(path: str | Path, value: object) -> None:
    """Write one indented JSON value, completely or not at all."""
    write_lines(path, [json.dumps(value, ensure_ascii=False, indent=1)])


class Journal:
    """An append-only JSONL file of finished work. A killed job reopens it and continues there.

    Each unit of work is one line, flushed before the next unit starts. An incomplete last line,
    which a kill can leave, is dropped.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        make_folder(self.path.parent)
        whole = read_bytes(self.path) if self.path.exists() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        if kept != whole:
            os.truncate(self.path, len(kept))
        self.rows: list[Row] = [row for _, row in parse_lines(decode_text(kept, path), path)]
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for its lifetime)

    def append(self, row: Row) -> None:
        """Write one row and flush it, so that it survives a kill of this process."""
        line = valid_unicode(json.dumps(row, ensure_ascii=False))
        self._file.write(line + "\n")
        self._file.flush()
        self.rows.append(parse_json(line))  # exactly the row that a resumed job reads

    def close(self) -> None:
        """Force all rows to the disk, so that they survive a crash of the machine, and close."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def part_of(path: Path, rank: int) -> Path:
    """Return the path of one rank's journal. Rank 0 uses `path` itself."""
    return path.with_suffix(f".rank{rank}{path.suffix}") if rank else path


def parts_of(path: Path) -> list[Path]:
    """Return the existing journals of ranks other than 0."""
    return sorted(path.parent.glob(f"{escape(path.stem)}.rank*{path.suffix}"))


def forget(path: Path) -> None:
    """Delete a journal and the parts of all ranks."""
    for old in (path, *parts_of(path)):
        old.unlink(missing_ok=True)


def gather_parts(path: Path) -> Journal:
    """Merge the journals of all ranks into that of rank 0, delete the others and return it.

    The returned journal is closed.
    """
    whole = Journal(path)
    known = {row["id"] for row in whole.rows}
    names = parts_of(path)
    parts = [Journal(name) for name in names]
    for row in chain.from_iterable(part.rows for part in parts):
        if row["id"] not in known:  # a kill before all parts are deleted merges them twice
            whole.append(row)
    for journal in (whole, *parts):
        journal.close()
    for name in names:
        name.unlink()
    return whole


def open_part(
    path: Path, world: World, made_from: Mapping[str, str] | None = None, *, anew: bool = False
) -> tuple[Journal, set[str]]:
    """Return this rank's part of a journal and the ids that any rank has finished. Collective.

    `made_from` contains digests of the inputs, which are stored beside the journal. Raises
    UserError if they differ from the stored ones, unless `anew` deletes the journal first. Rows
    with their own digest do not need `made_from`.
    """
    record = path.with_suffix(".made_from.json")
    if world.is_main:
        if anew:
            forget(path)
        gather_parts(path)
    world.barrier()
    done = {row["id"] for row in Journal(path).rows}
    if done and made_from is not None:
        _require_same_source(path, record, made_from)
    world.barrier()  # all ranks compare the record before rank 0 writes a new one
    if world.is_main and made_from is not None:
        write_json(record, dict(made_from))
    return Journal(part_of(path, world.rank)), done


def _require_same_source(path: Path, record: Path, made_from: Mapping[str, str]) -> None:
    before = parse_json(decode_text(read_bytes(record), record)) if record.exists() else {}
    changed = [name for name, digest in made_from.items() if before.get(name) != digest]
    if changed:
        raise UserError(
            f"{path} was made from other {' and '.join(changed)} than this run; use a new "
            "output_dir, or set overwrite_output_dir: true to start over."
        )
