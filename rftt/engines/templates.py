"""Adapt chat templates: fixed settings and dates, and control tokens in users' texts.

Settings and the date are written into the template itself. An exported model therefore uses the
same prompts in every program.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from rftt.prompts import Messages
from rftt.run.files import decode_text, read_bytes
from rftt.tokens import CLOSERS, OPENERS
from rftt.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAULTS = (
    ArithmeticError, LookupError, MemoryError, RecursionError, TemplateError, TypeError, ValueError,
)  # fmt: skip
"""What a chat template can raise while it is rendered: Jinja's errors and those of expressions."""
FOREIGN = re.compile(
    r"<[|｜][^<>|｜\s]{1,40}[|｜]?>|<[^<>|｜\s]{1,40}[|｜]>|\[/?[A-Z_]{3,20}\]|<</?SYS>>"
    r"|</?(?:s|bos|eos|pad|unk|think|tool_call|tool_response|start_of_turn|end_of_turn)>"
)
"""Control tokens as model families write them. A server's tokenizer may have any of them."""
CUT = "\ufdd0"
"""A noncharacter of Unicode that marks where a control text is cut in a rendered prompt."""
SETTINGS = re.compile(r"\A\{# rftt settings #\}.*?\{\{ '' \}\}", re.DOTALL)
"""Output of `with_settings`. The expression at its end keeps a line break that Jinja drops."""
DATE_CALL = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>[^"'\\]*)(?P=quote)\s*\)""")
OWN_NAMES = ("messages", "add_generation_prompt", "tools", "documents", "bos_token", "eos_token")
"""Variables of a template that are not settings."""


def single_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> str:
    """Return the chat template in `file`, or the tokenizer's. Raises UserError without one."""
    if file:
        return decode_text(read_bytes(file), file)
    own: Any = tokenizer.chat_template
    name = tokenizer.name_or_path
    if isinstance(own, Mapping):
        if "default" not in own:
            names = ", ".join(sorted(own))
            raise UserError(
                f"{name} must have a chat template named default, got {names}; save one of them as "
                "a file and set chat_template to it."
            )
        own = own["default"]
    if own is None:
        raise UserError(f"the tokenizer of {name} has no chat template; use an instruct model.")
    return own


def with_settings(template: str, settings: Mapping[str, Any]) -> str:
    """Return `template` with variables such as enable_thinking set. Earlier settings are replaced.

    Raises UserError for a name that is not a setting.
    """
    if not settings:
        return template
    statements = []
    for name, value in settings.items():
        if not name.isidentifier() or name in OWN_NAMES:
            raise UserError(
                f"chat_template_kwargs: {name!r} is not a setting of a chat template; remove it."
            )
        statements.append(f"{{% set {name} = {_literal(value)} %}}")
    return f"{{# rftt settings #}}{''.join(statements)}{{{{ '' }}}}{SETTINGS.sub('', template, 1)}"


def _literal(value: Any) -> str:
    """Return a JSON value as a Jinja literal."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)  # True, None and quoted text are literals in Jinja as well


def with_date(template: str, today: date) -> str:
    """Return `template` with a fixed date, so that a resumed run uses the same prompts.

    Raises UserError if the template computes the format of its date.
    """

    def written(found: re.Match[str]) -> str:
        return _literal(datetime(today.year, today.month, today.day).strftime(found["format"]))

    dated = DATE_CALL.sub(written, template)
    if "strftime_now(" in dated:
        raise UserError(
            "the format of the date in the chat template must be a constant, but it is computed; "
            "set chat_template to a file with a fixed date."
        )
    return dated


# ---- Control tokens in users' texts ----


@lru_cache(maxsize=8)
def _control_pattern(
    tokenizer: PreTrainedTokenizerBase, _size: int, *, in_responses: bool, functional: bool
) -> re.Pattern[str] | None:
    """Return a pattern that matches the control tokens of a tokenizer with `_size` ids.

    Control tokens are special and functional tokens. If `functional`, the latter count before the
    tokenizer has them. Outside of responses, all added tokens in brackets, such as <think>, count
    as well. Longer tokens are tried first.
    """
    texts = set(OPENERS + CLOSERS) if functional else set[str]()
    for token in tokenizer.added_tokens_decoder.values():
        bracketed = token.content[:1] in ("<", "[") and not in_responses
        if token.content and (token.special or bracketed or token.content in OPENERS + CLOSERS):
            texts.add(token.content)
    if not texts:
        return None
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def holds_control_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, functional: bool = False
) -> bool:
    """Return whether `text` contains special or functional tokens, which no step may contain.

    Phase 1 sets `functional`, because only the warm-up adds these tokens to the tokenizer. Other
    added tokens, such as <think>, are allowed, because models use them in responses.
    """
    size = len(tokenizer)
    pattern = _control_pattern(tokenizer, size, in_responses=True, functional=functional)
    return bool(pattern and pattern.search(text))


def apart(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Messages | None:
    """Return messages in which control texts of users are cut after the first character.

    Returns None if there is nothing to cut, which is the usual case. The system prompt belongs to
    the run and may contain control tokens.
    """
    pattern = _control_pattern(tokenizer, len(tokenizer), in_responses=False, functional=False)
    users = [message["content"] for message in messages if message["role"] == "user"]
    if pattern is None or not any(map(pattern.search, users)):
        return None
    return [
        message
        | {"content": _cut(message["content"], pattern if message["role"] == "user" else None)}
        for message in messages
    ]


def neutral(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Messages:
    """Return messages for a server, in which control texts of users hold a space.

    A server encodes text with a tokenizer that is not known here: `<|im_end|>` would end the turn
    there. `< |im_end|>` reads the same and is not a control token.
    """
    own = _control_pattern(tokenizer, len(tokenizer), in_responses=False, functional=True)

    def spaced(text: str) -> str:
        for pattern in (own, FOREIGN):
            text = _cut(text, pattern).replace(CUT, " ")
        return text

    return [
        message | {"content": spaced(message["content"])} if message["role"] == "user" else message
        for message in messages
    ]


def cut_control(
    tokenizer: PreTrainedTokenizerBase, text: str, *, in_responses: bool = False
) -> str:
    """Return a foreign text with CUT after the first character of each control text in it."""
    size = len(tokenizer)
    return _cut(
        text, _control_pattern(tokenizer, size, in_responses=in_responses, functional=False)
    )


def _cut(text: str, pattern: re.Pattern[str] | None) -> str:
    text = text.replace(CUT, "")
    pieces, start = [], 0
    while pattern and (found := pattern.search(text, start)):
        pieces.append(text[start : found.start() + 1])
        start = found.start() + 1
    return CUT.join([*pieces, text[start:]])


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> list[int]:
    """Return the ids of a rendered text, in which no token crosses the end of a piece."""
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids
