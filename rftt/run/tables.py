"""Data sets as people have them -> rows: JSON, JSONL, CSV, Parquet, gzip, Hugging Face hub.

The content decides, not the name: an array in a file called .jsonl is read as an array. What a row
means is the matter of columns.py.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rftt.run.files import Row, decode_text, parse_json, parse_lines, read_bytes
from rftt.types import UserError

HUB = "hf:"
"""Prefix of a data set on the Hugging Face hub: hf:owner/name[:config][@split]."""
HUB_NAME = re.compile(r"hf:(?P<name>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")
GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
INSTALL = "pip install -r requirements-data.txt"


@dataclass(frozen=True)
class Record:
    """A row and where it stands."""

    number: int
    """Line in a JSONL file; elsewhere the position from 1."""
    place: str
    """For messages: `train.jsonl:3` is a line, `train.parquet row 3` a position."""
    row: Row


def read_table(source: str) -> list[Record]:
    """Return the rows of a file or of a data set on the hub.

    Raise UserError where it is missing, empty, broken or not UTF-8, or needs a missing package.
    """
    if source.startswith(HUB):
        records = _read_hub(source)
    else:
        data = read_bytes(source)
        if data.startswith(GZIP_MAGIC):
            data = _decompress(data, source)
        delimiter = DELIMITERS.get(Path(_without_gz(source)).suffix.lower())
        if data.startswith(PARQUET_MAGIC):
            records = _read_parquet(data, source)
        elif delimiter:
            records = list(_read_csv(decode_text(data, source), source, delimiter))
        else:
            records = _read_json(decode_text(data, source), source)
    if not records:
        raise UserError(f"{source} has 0 rows; look at what should have written it.")
    return records


def name_of(source: str) -> str:
    """Return a short name of a data set that can be part of a file name."""
    if source.startswith(HUB):
        return re.sub(r"[^\w.-]+", "-", source.removeprefix(HUB)).strip("-")
    return Path(_without_gz(source)).stem


def _without_gz(path: str) -> str:
    return path[: -len(".gz")] if path.lower().endswith(".gz") else path


def _decompress(data: bytes, path: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); copy it again.") from error


# ---- JSON ----


def _read_json(text: str, path: str) -> list[Record]:
    start = text.lstrip()[:1]
    if start == "[":
        return list(_read_array(text, path))
    if start == "{" and Path(_without_gz(path)).suffix.lower() == ".json":
        try:
            whole = parse_json(text)
        except ValueError:  # one object per line, under this name
            whole = None
        if isinstance(whole, dict):
            return _read_object(whole, path)
    return [Record(n, f"{path}:{n}", row) for n, row in parse_lines(text, path)]


def _read_array(text: str, path: str) -> Iterator[Record]:
    """Yield the objects of a JSON array, each with the line on which it begins."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")

    def next_sign(position: int) -> int:
        found = blank.match(text, position)
        assert found, "the pattern matches an empty text"
        return found.end()

    position = next_sign(text.index("[") + 1)
    line, counted, number = 1, 0, 0
    while number or text[position : position + 1] != "]":
        number += 1
        line += text.count("\n", counted, position)
        counted = position
        place = f"{path}:{line}"
        try:
            _, end = decoder.raw_decode(text, position)
            value = parse_json(text[position:end])
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{place} is not JSON ({reason}).") from error
        if not isinstance(value, dict):
            raise UserError(f"{place} holds a {type(value).__name__}, not an object.")
        yield Record(number, place, value)
        position = next_sign(end)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            raise UserError(f"{place} is not JSON (after this item a comma or ] is missing).")
        position = next_sign(position + 1)
    if text[position + 1 :].strip():
        raise UserError(f"{path} is not JSON (there is text after its array).")


def _read_object(whole: Row, path: str) -> list[Record]:
    """Return the rows of `{"data": [row, …]}`, or `whole` itself where it holds no list of rows."""
    lists = [
        key
        for key, value in whole.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    if not lists or any(isinstance(value, str) for value in whole.values()):
        return [Record(1, f"{path}:1", whole)]
    if len(lists) > 1:
        raise UserError(f"{path} holds several lists ({', '.join(lists)}); save one of them.")
    key = lists[0]
    return [Record(i, f"{path} {key}[{i - 1}]", row) for i, row in enumerate(whole[key], 1)]


# ---- CSV ----


def _read_csv(text: str, path: str, delimiter: str) -> Iterator[Record]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number, before = 0, 0
    header: list[str] = []
    while True:
        try:
            cells = next(lines, None)
        except csv.Error as error:
            raise UserError(f"{path}:{before + 1} is not CSV ({error}).") from error
        if cells is None:
            return
        place, before = f"{path}:{before + 1}", lines.line_num
        if not cells:
            continue
        if not header:
            header = cells
            if len(set(header)) < len(header):
                raise UserError(f"{place} names a column twice ({', '.join(header)}).")
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{place} has {len(cells)} fields, the header {len(header)}; quote fields that "
                f"contain {delimiter!r} or line breaks."
            )
        number += 1
        yield Record(number, place, dict(zip(header, cells, strict=True)))


# ---- Parquet and the hub: optional packages ----


def _read_parquet(data: bytes, path: str) -> list[Record]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"{path}: Parquet needs pyarrow; {INSTALL}, or save it as JSONL."
        ) from error
    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as Parquet ({reason}).") from error
    return [Record(i, f"{path} row {i}", row) for i, row in enumerate(rows, 1)]


def _read_hub(source: str) -> list[Record]:
    """Return the rows of a data set on the hub, or of one that `datasets` has cached.

    A data set with several splits needs the name of one: a run must not train on its test split.
    """
    found = HUB_NAME.fullmatch(source)
    if not found:
        raise UserError(f"{source} must have the form hf:owner/name[:config][@split].")
    try:
        from datasets import Dataset, load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(f"{source} needs the package datasets; {INSTALL}.") from error
    try:
        loaded = load_dataset(found["name"], found["config"], split=found["split"])
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such config or split
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source} cannot be loaded ({reason}).") from error
    if not isinstance(loaded, Dataset):
        if len(loaded) != 1:
            raise UserError(
                f"{source} has the splits {', '.join(loaded)}; add one, such as @train."
            )
        loaded = next(iter(loaded.values()))
    return [Record(i, f"{source} row {i}", dict(row)) for i, row in enumerate(loaded, 1)]
