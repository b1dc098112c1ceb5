"""Find the question, gold answer and responses in a row of a foreign data set, as text.

A key is a column, a path to a value inside one (`reward_model.ground_truth`, `prompt.1.content`),
or a template of such names (`{Body} {Question}`). Without keys the usual names are tried. If they
contradict each other, nothing is guessed: the error lists the possible keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from rftt.run.files import Row
from rftt.types import UserError

QUESTIONS: tuple[tuple[str, ...], ...] = (
    ("problem",),
    ("question",),
    ("prompt",),
    ("query",),
    ("{Body} {Question}", "Question"),  # SVAMP
    ("Problem",),
    ("sQuestion",),  # MultiArith, AddSub, SingleEq
    ("{instruction}\n\n{input}", "instruction"),  # Alpaca
)
"""Keys of questions in public data sets. Of each group the first key that a row has is used."""
CONVERSATIONS = ("messages", "conversations")
"""Columns with a whole conversation, which are used only if a row has none of QUESTIONS."""
ANSWERS = (
    *("answer", "final_answer", "gold", "Answer", "ground_truth", "expected_answer"),
    "lSolutions",  # MultiArith, AddSub, SingleEq
    "reward_model.ground_truth",  # verl, DAPO
)
SOLUTIONS = ("solution", "Solution")
"""Columns with a worked solution, from which the answer is read if all of ANSWERS are empty."""
RESPONSES = ("response", "completion", "output")
LABELS = {
    "level": ("level", "difficulty"),
    "subject": ("subject", "subfield", "type", "Type"),
    "id": ("id", "unique_id", "idx", "ID", "iIndex", "extra_info.index"),
}
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles -> the usual ones."""
ASKING = ("question", "problem", "query", "prompt", "input", "instruction", "text", "body")
ANSWERING = ("answer", "solution", "gold", "truth", "target", "label", "result", "output")
"""Parts of column names by which an error proposes a key, the best first."""


# ---- Values ----


def value_at(row: Row, key: str) -> Any:
    """Return the value of a column or, with dots, a value inside it. None if it is missing."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def as_text(value: Any, name: str, place: str, *, lists: bool = False) -> str | None:
    """Return text or a number as text, None for a missing value.

    With `lists`, a list of texts and numbers is joined by commas (OlympiadBench's answers). Raises
    UserError for any other value.
    """
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():  # AMC: 27.0
        return str(int(value))
    if is_finite(value):
        return str(value)
    if isinstance(value, list) and lists:
        return ", ".join(as_text(item, name, place) or "" for item in value)
    what = "text, a number or a list of them" if lists else "text or a number"
    inside = next((key for key, _ in _texts(value, f"{name}.")), None)
    cure = f" A key such as {inside} names a value inside it." if inside else ""
    raise UserError(f"{place}: '{name}' must be {what}, got {value!r:.80}.{cure}")


def is_number(value: Any) -> bool:
    """Return whether a value is a number, which true and false are not."""
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number. An integer may be too large for a float."""
    return is_number(value) and (isinstance(value, int) or math.isfinite(value))


def filled(row: Row, key: str, place: str, *, lists: bool = False) -> str | None:
    """Return the text of the column or template `key`. None if it is missing.

    Raises UserError if the row lacks a name of the template.
    """
    if key in row or not PLACEHOLDER.search(key):
        return as_text(value_at(row, key), key, place, lists=lists)

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if value_at(row, name) is None and name not in row:
            raise UserError(
                f"{place} has no '{name}', a name in the template {key!r} (found: "
                f"{names_of(row)}); correct the template."
            )
        return as_text(value_at(row, name), name, place, lists=lists) or ""

    return PLACEHOLDER.sub(value, key).strip() or None


def label_of(row: Row, label: str) -> str | None:
    """Return an id, a level or a subject. Values other than text and numbers are ignored."""
    for key in LABELS[label]:
        value = value_at(row, key)
        if isinstance(value, str) or is_finite(value):
            text = as_text(value, key, "")
            if text is not None:
                return text
    return None


# ---- Conversations ----


def messages_in(value: Any, place: str) -> list[dict[str, str]] | None:
    """Return chat messages as {"role", "content"}. None if `value` is not a conversation.

    ShareGPT's from and value are supported, and content that is a list of text parts.
    """
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    messages = []
    for message in value:
        if not isinstance(message, dict):
            return None
        names = ("role", "content") if "role" in message else ("from", "value")
        if not set(names) <= message.keys():
            return None
        role, content = message[names[0]], message[names[1]]
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            others = [part for part in content if not isinstance(part.get("text"), str)]
            if others:
                raise UserError(
                    f"{place}: all parts of a message must be text, got {others[0]!r:.80}; remove "
                    "the row."
                )
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"{place}: role and content of a message must be text, got {message!r:.80}; "
                "correct the row."
            )
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages


def single_turn(
    messages: Sequence[dict[str, str]], key: str, place: str, system_prompt: str | None
) -> tuple[str, str | None]:
    """Return the question of a conversation, and the reply or None.

    Raises UserError for several turns. A system message other than `system_prompt` is an error as
    well, because training and evaluation would use different prompts.
    """
    roles = [message["role"] for message in messages]
    if roles[:1] == ["system"]:
        system = messages[0]["content"]
        if system != system_prompt:
            shown = "set to another text" if system_prompt else "not set"
            raise UserError(
                f"{place}: '{key}' has the system message {system!r:.80}, but system_prompt is "
                f"{shown}. Set it to this text, or set prompt_key: {key}.1.content to ignore it."
            )
        messages, roles = messages[1:], roles[1:]
    if roles not in (["user"], ["user", "assistant"]):
        raise UserError(
            f"{place}: '{key}' must have one question and at most one reply, got the turns "
            f"{', '.join(roles) or 'none'}; split the row into single turns."
        )
    return messages[0]["content"], messages[1]["content"] if len(messages) == 2 else None


# ---- Question, gold answer, responses ----


def question_of(row: Row, key: str | None, place: str, system_prompt: str | None = None) -> str:
    """Return the question of a row.

    Raises UserError if it is missing, blank or not text, or if two usual columns differ.
    """
    found: dict[str, str] = {}
    groups = ((key,),) if key else (*QUESTIONS, CONVERSATIONS)
    for group in groups:
        name = key or next((name for name in group if _has(row, name)), None)
        if name is None or (group is CONVERSATIONS and found):
            continue
        messages = messages_in(value_at(row, name), place)
        if messages is None:
            question = filled(row, name, place)
        else:
            question, _ = single_turn(messages, name, place, system_prompt)
        if question is not None:
            found[name] = question
    if not found:
        wanted = key or "' or '".join(group[0] for group in QUESTIONS[:4])
        guess = _proposed(row, ASKING)
        raise UserError(
            f"{place} has no '{wanted}' (found: {names_of(row)}). Set prompt_key: {guess}."
        )
    names = list(found)
    for name in names[1:]:
        if found[name].split() != found[names[0]].split():
            raise UserError(
                f"{place} has different questions in '{names[0]}' and '{name}'. Set prompt_key: "
                f"{names[0]} or {name}."
            )
    if not found[names[0]].strip():
        raise UserError(f"{place}: the question in '{names[0]}' is blank; remove the row.")
    return found[names[0]]


def gold_texts(row: Row, key: str | None, place: str) -> dict[str, str]:
    """Return column -> text with the gold answer, the best column first."""
    found: dict[str, str] = {}
    for name in (key,) if key else ANSWERS:
        text = filled(row, name, place, lists=True)
        if text is not None:
            found[name] = text
    if not found and not key:
        for name in SOLUTIONS:
            value = value_at(row, name)
            parts = {name: value}
            if isinstance(value, list):  # OlympiadBench's solutions must all have one answer
                parts = {f"{name}.{i}": part for i, part in enumerate(value)}
            texts = {part: as_text(content, part, place) for part, content in parts.items()}
            found |= {part: text for part, text in texts.items() if text is not None}
    return found


def solution_of(row: Row) -> str | None:
    """Return the worked solution of a row, or None."""
    found = [row[name] for name in SOLUTIONS if isinstance(row.get(name), str)]
    return found[0] if found else None


def response_in(row: Row, key: str | None, place: str) -> str | list[Row]:
    """Return the training response of a row: steps or text. Raises UserError if it is missing."""
    if not key and row.get("steps"):
        return steps_in(row["steps"], place)
    found: dict[str, str] = {}
    for name in (key,) if key else RESPONSES:
        text = _reply_at(row, name, place)
        if text:
            found[name] = text
    if not found and not key:
        for name in (*SOLUTIONS, *CONVERSATIONS):
            text = _reply_at(row, name, place)
            if text:
                return text
    if not found:
        wanted = f"no '{key}'" if key else "neither 'steps' nor 'response'"
        raise UserError(
            f"{place} has {wanted} (found: {names_of(row)}). Set response_key: "
            f"{_proposed(row, ANSWERING)}; search.py writes such rows to data/sft.jsonl."
        )
    names = list(found)
    for name in names[1:]:
        if found[name] != found[names[0]]:
            raise UserError(
                f"{place} has different responses in '{names[0]}' and '{name}'. Set response_key: "
                f"{names[0]} or {name}."
            )
    return found[names[0]]


def pair_in(
    row: Row, key: str | None, place: str, system_prompt: str | None
) -> tuple[str, list[str | list[Row]]]:
    """Return the question and the chosen and the rejected response of a row (DPO).

    A response is steps, text, a message with the reply, or a whole conversation (TRL). In the last
    case the row need not have a question of its own.
    """
    questions: list[str] = []
    responses: list[str | list[Row]] = []
    for name in ("chosen", "rejected"):
        value = row.get(name)
        if not isinstance(value, str | list) or not value:
            raise UserError(
                f"{place} lacks 'chosen' or 'rejected', text or steps (found: {names_of(row)}); "
                "search.py writes such rows to data/dpo.jsonl."
            )
        messages = messages_in(value, place)
        if isinstance(value, str):
            responses.append(value)
        elif messages is None:
            responses.append(steps_in(value, place))
        elif len(messages) == 1 and messages[0]["role"] == "assistant":
            responses.append(messages[0]["content"])
        else:
            question, reply = single_turn(messages, name, place, system_prompt)
            if reply is None:
                raise UserError(
                    f"{place}: '{name}' must end with a reply, got only a question; remove the row."
                )
            questions.append(question)
            responses.append(reply)
    has_own = key is not None or any(_has(row, name) for group in QUESTIONS for name in group)
    if has_own or not questions:
        questions.append(question_of(row, key, place, system_prompt))
    if any(question != questions[-1] for question in questions):
        raise UserError(
            f"{place}: 'chosen' and 'rejected' must answer the same question, got different ones; "
            "remove the row."
        )
    return questions[-1], responses


def steps_in(steps: Any, place: str) -> list[Row]:
    """Check the shape of `steps` and return them. Raises UserError for anything else."""
    if not isinstance(steps, list):
        raise UserError(f"{place}: 'steps' must be a list, got {steps!r:.80}; correct the row.")
    for step in steps:
        if not isinstance(step, dict) or not {"act", "text"} <= step.keys():
            raise UserError(
                f"{place}: a step must have 'act' and 'text', got {step!r:.80}; correct the row."
            )
        if not isinstance(step["act"], str) or not isinstance(step["text"], str):
            raise UserError(
                f"{place}: 'act' and 'text' of a step must be text, got {step!r:.80}; correct the "
                "row."
            )
        if not isinstance(step.get("wrong", False), bool):
            raise UserError(
                f"{place}: 'wrong' of a step must be true or false, got {step!r:.80}; correct the "
                "row."
            )
    return steps


def _reply_at(row: Row, key: str, place: str) -> str | None:
    """Return a reply that is text, a message, or the end of a conversation."""
    messages = messages_in(value_at(row, key), place)
    if messages is None:
        return filled(row, key, place)
    return messages[-1]["content"] if messages[-1]["role"] == "assistant" else None


# ---- Contents of a row, for error messages ----


def _has(row: Row, key: str) -> bool:
    """Return whether a row has a value for the column `key`, or all columns of a template."""
    if key not in row and PLACEHOLDER.search(key):
        return all(name in row for name in PLACEHOLDER.findall(key))
    return value_at(row, key) not in (None, "", [])


def names_of(row: Row) -> str:
    """Return the column names of a row, for an error message."""
    return ", ".join(map(str, row)) or "nothing"


def _texts(row: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, text) of each value in a row, up to three levels deep."""
    pairs: Any = ()
    if isinstance(row, dict | list):
        pairs = row.items() if isinstance(row, dict) else enumerate(row)
    for name, value in pairs:
        if isinstance(value, str) or is_number(value):
            yield f"{prefix}{name}", str(value)
        elif isinstance(value, dict | list) and prefix.count(".") < 3:
            yield from _texts(value, f"{prefix}{name}.")


def proposed_answer(row: Row) -> str | None:
    """Return a key that may name the gold answer, preferably one with `####` or a box."""
    texts = dict(_texts(row))
    marked = [key for key, text in texts.items() if "####" in text or "\\boxed" in text]
    return marked[0] if marked else _best(texts, ANSWERING)


def _proposed(row: Row, parts: Sequence[str]) -> str:
    texts = {key: text for key, text in _texts(row) if text.strip()}
    return _best(texts, parts) or max(texts, key=lambda key: len(texts[key]), default="…")


def _best(texts: dict[str, str], parts: Sequence[str]) -> str | None:
    """Return the key whose last name contains the earliest of `parts`."""
    for part in parts:
        for key in texts:
            names = key.lower().split(".")
            if part in names[-1] or (names[-1] == "content" and part in names[0]):
                return key
    return None
