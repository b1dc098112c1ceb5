"""Read the prompts of phase 1: rftt/prompts.yaml, and a user's file that replaces parts of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rftt.prompts import HOLES, Prompts
from rftt.run.config import typed_yaml
from rftt.run.files import decode_text
from rftt.tokens import ACTS, CLOSERS, FUNCTIONS, OPENERS, ROOT
from rftt.types import UserError

DEFAULT = Path(__file__).parents[1] / "prompts.yaml"


@cache
def load_prompts(path: str | None = None) -> Prompts:
    """Return the prompts of prompts.yaml with the parts that the file at `path` replaces.

    Raise UserError naming the file and the key of a mistake.
    """
    own = _read(path) if path else {}
    try:
        prompts = Prompts.model_validate(_replaced(_read(DEFAULT), own))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path or DEFAULT}: `{key}` is not valid: {first['msg']}.") from None
    for mistake in _mistakes(prompts):
        raise UserError(f"{path or DEFAULT}: {mistake}")
    return prompts


def _read(path: str | Path) -> dict[str, Any]:
    try:
        text = decode_text(Path(path).read_bytes(), path)
        value = typed_yaml(text)
    except OSError as error:
        raise UserError(f"prompts_file {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"prompts_file {path} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"prompts_file {path} must be a mapping; see rftt/prompts.yaml.")
    return value


def _replaced(default: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return `default` with the values of `own`, mapping by mapping."""
    merged = dict(default)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(default.get(key), dict)
        merged[key] = _replaced(default[key], value) if both else value
    return merged


def _asked_for() -> set[str]:
    """Return the acts that phase 1 asks for: those of its tree, and the two of a merged row."""
    transitions = [function.next_in_phase_1 for function in FUNCTIONS.values()]
    return {"verify", "refine", *ROOT["prompted"], *chain(*transitions)}


def _mistakes(prompts: Prompts) -> list[str]:
    """Return what the types cannot express: names, placeholders, functional tokens in a text."""
    found = [
        f"`acts.{act}` is not an act; the acts are {', '.join(ACTS)}."
        for act in prompts.acts
        if act not in ACTS
    ]
    found += [
        f"`acts.{act}` must have a system text and an instruction; add them to {DEFAULT.name} or "
        "to your prompts_file."
        for act in sorted(_asked_for() - set(prompts.acts))
    ]
    for name, template in prompts.templates.items():
        holes = set(re.findall(r"\{(\w+)\}", template))
        if name not in HOLES:
            found.append(f"`templates.{name}` is not a template; they are {', '.join(HOLES)}.")
        elif holes != HOLES[name]:
            wanted = ", ".join(f"{{{hole}}}" for hole in sorted(HOLES[name]))
            found.append(f"`templates.{name}` must contain {wanted}, and no other placeholder.")
    for act, prompt in prompts.acts.items():
        given = {"question", "so_far"} | HOLES.get(act, set()) - {"instruction"}
        for number, example in enumerate(prompt.examples):
            fields = set(example.model_dump(exclude_none=True)) | {"so_far"}
            if fields != given | {"reply"}:
                wanted = ", ".join(sorted(given | {"reply"}))
                found.append(f"`acts.{act}.examples.{number}` must have the keys {wanted}.")
    written = prompts.model_dump_json()
    for token in (*OPENERS, *CLOSERS):
        if token in written:
            found.append(f"a text contains the functional token {token}, which no prompt may.")
    return found
