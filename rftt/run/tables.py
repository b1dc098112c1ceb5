"""Read the rows of data sets: JSON, JSONL, CSV, Parquet, gzip, Hugging Face hub.

The content and not the name determines the format: an array in a file named .jsonl is read as an
array. columns.py interprets the rows.
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

from rftt.run.files import (
    MAX_NAME,
    Row,
    decode_text,
    file_name,
    one_line,
    parse_json,
    parse_lines,
    read_bytes,
)
from rftt.types import UserError

HUB = "hf:"
"""Prefix of a data set on the Hugging Face hub: hf:owner/name[:config][@split]."""
HUB_NAME = re.compile(r"hf:(?P<name>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")
GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
INSTALL = "pip install -r requirements-data.txt"


@dataclass(frozen=True)
class Record:
    """A row and its place in the source."""

    number: int
    """Line in a JSONL file. In other formats the position, counted from 1."""
    place: str
    """Place for error messages: the line `train.jsonl:3`, or the position `train.parquet row 3`."""
    row: Row


def read_table(source: str) -> list[Record]:
    """Return the rows of a file or of a data set on the hub.

    Raises UserError if it is missing, empty, damaged or not UTF-8, or needs a missing package.
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
        raise UserError(f"{source} must have at least one row, but has 0 rows; check its source.")
    return records


def name_of(source: str) -> str:
    """Return a short name of a data set that can be part of a file name."""
    if source.startswith(HUB):
        name = re.sub(r"[^\w.-]+", "-", source.removeprefix(HUB)).strip("-")
    else:
        name = Path(_without_gz(source)).stem
    return name if len(name.encode()) <= MAX_NAME else file_name(name)


def _without_gz(path: str) -> str:
    return path[: -len(".gz")] if path.lower().endswith(".gz") else path


def _decompress(data: bytes, path: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} must be a complete gzip file ({error}); copy it again.") from error


# ---- JSON ----


def _read_json(text: str, path: str) -> list[Record]:
    start = text.lstrip()[:1]
    if start == "[":
        return list(_read_array(text, path))
    if start == "{" and Path(_without_gz(path)).suffix.lower() == ".json":
        try:
            whole = parse_json(text)
        except ValueError:  # a .json file with one object per line
            whole = None
        if isinstance(whole, dict):
            return _read_object(whole, path)
    return [Record(n, f"{path}:{n}", row) for n, row in parse_lines(text, path)]


def _read_array(text: str, path: str) -> Iterator[Record]:
    """Yield the objects of a JSON array, each with the line on which it starts."""
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
            raise UserError(f"{place} is not JSON ({reason}); correct the file.") from error
        if not isinstance(value, dict):
            raise UserError(
                f"{place} must be a JSON object, got {type(value).__name__}; correct the array."
            )
        yield Record(number, place, value)
        position = next_sign(end)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            raise UserError(
                f"{place} is not JSON (a comma or ] is missing after this item); correct the file."
            )
        position = next_sign(position + 1)
    if text[position + 1 :].strip():
        raise UserError(f"{path} is not JSON (text follows the array); remove the text.")


def _read_object(whole: Row, path: str) -> list[Record]:
    """Return the rows of `{"data": [row, …]}`, or `whole` itself if it has no list of rows."""
    lists = [
        key
        for key, value in whole.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    if not lists or any(isinstance(value, str) for value in whole.values()):
        return [Record(1, f"{path}:1", whole)]
    if len(lists) > 1:
        raise UserError(
            f"{path} must contain one list of rows, got {', '.join(lists)}; save one of them."
        )
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
            raise UserError(
                f"{path}:{before + 1} is not CSV ({error}); check the quotes."
            ) from error
        if cells is None:
            return
        place, before = f"{path}:{before + 1}", lines.line_num
        if not cells:
            continue
        if not header:
            header = cells
            if len(set(header)) < len(header):
                raise UserError(
                    f"{place} must not name a column twice ({', '.join(header)}); rename one."
                )
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{place} must have {len(header)} fields like the header, got {len(cells)}; quote "
                f"fields that contain {delimiter!r} or line breaks."
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
        raise UserError(
            f"{path} cannot be read as Parquet ({one_line(error)}); copy it again."
        ) from error
    return [Record(i, f"{path} row {i}", row) for i, row in enumerate(rows, 1)]


def _read_hub(source: str) -> list[Record]:
    """Return the rows of a data set on the hub, or of one that `datasets` has cached.

    If there are several splits, the source must name one, so that no run trains on a test split.
    """
    found = HUB_NAME.fullmatch(source)
    if not found:
        raise UserError(
            f"a data set on the hub must be hf:owner/name[:config][@split], got {source}; correct "
            "it."
        )
    try:
        from datasets import Dataset, load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(f"{source} needs the package datasets; {INSTALL}.") from error
    try:
        loaded = load_dataset(found["name"], found["config"], split=found["split"])
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such config or split
        raise UserError(
            f"{source} cannot be loaded ({one_line(error)}); check its name, or use a file."
        ) from error
    if not isinstance(loaded, Dataset):
        if len(loaded) != 1:
            raise UserError(
                f"{source} has the splits {', '.join(loaded)}; add one, such as @train."
            )
        loaded = next(iter(loaded.values()))
    return [Record(i, f"{source} row {i}", dict(row)) for i, row in enumerate(loaded, 1)]
