"""The prompts: a bare question, and phase 1's messages for each act.

In phase 1 an act is an instruction to an ordinary instruct model, shown to it on a few examples.
The texts are in prompts.yaml, of which a user's `prompts_file` replaces any part. contract.py
checks the replies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from rftt.tokens import ACTS, CLOSERS, OPENERS
from rftt.types import UserError

Messages = list[dict[str, str]]
Text = Annotated[str, StringConstraints(strict=True, min_length=1)]
Reasons = dict[str, list[Text]]
"""Reason of a refusal -> phrases."""

DEFAULT = Path(__file__).with_name("prompts.yaml")
HOLES = {
    "act": {"question", "so_far", "instruction"},
    "verify": {"question", "so_far", "wrong", "correct", "instruction"},
    "refine": {"question", "so_far", "check", "instruction"},
}
"""The placeholders of each template."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Example(Part):
    """One worked example: what the model is shown, and what it should reply."""

    question: Text
    so_far: str = ""
    wrong: str | None = None
    correct: str | None = None
    check: str | None = None
    reply: Text


class ActPrompt(Part):
    system: Text
    instruction: Text
    examples: list[Example] = []
    refuse: Reasons = {}
    require: Reasons = {}


class Prompts(Part):
    """All texts of phase 1; prompts.yaml describes each field."""

    nothing_yet: Text
    templates: dict[str, Text]
    labels: list[Text]
    refuse: Reasons
    acts: dict[str, ActPrompt]

    def ask(self, act: str, question: str, so_far: str, **parts: str) -> Messages:
        """Return messages that ask for one act as the continuation of the solution `so_far`.

        `parts` are the other placeholders of the act's template: `wrong` and `correct` of verify,
        `check` of refine.
        """
        prompt = self.acts[act]
        messages = [{"role": "system", "content": prompt.system}]
        for example in prompt.examples:
            shown = example.model_dump(exclude_none=True, exclude={"reply"})
            messages.append({"role": "user", "content": self._fill(act, **shown)})
            messages.append({"role": "assistant", "content": example.reply})
        asked = self._fill(act, question=question, so_far=so_far, **parts)
        return [*messages, {"role": "user", "content": asked}]

    def _fill(self, act: str, so_far: str, **parts: str) -> str:
        template = self.templates[act if act in self.templates else "act"]
        values = parts | {"so_far": so_far or self.nothing_yet}
        values["instruction"] = self.acts[act].instruction
        return re.sub(r"\{(\w+)\}", lambda hole: values[hole[1]], template)


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
        raise UserError(f"{path}: `{key}` is not valid: {first['msg']}.") from None
    for mistake in _mistakes(prompts):
        raise UserError(f"{path}: {mistake}")
    return prompts


def _read(path: str | Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"prompts_file {path} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"prompts_file {path} is not YAML in UTF-8 ({reason}).") from None
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


def _mistakes(prompts: Prompts) -> list[str]:
    """Return what the types cannot express: names, placeholders, functional tokens in a text."""
    found = [
        f"`acts.{act}` is not an act; the acts are {', '.join(ACTS)}."
        for act in prompts.acts
        if act not in ACTS
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


def question_messages(question: str, system_prompt: str | None = None) -> Messages:
    """Return the conversation of SFT, RL and evaluation; phase 1 has no system prompt."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def sentences(text: str) -> list[str]:
    """Return the sentences of `text`; a decimal point does not end one."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
