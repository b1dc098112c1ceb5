"""Chat templates: settings and dates that stay with a model, and text that must stay text.

Settings and the date are written into the template itself. The model that a run exports therefore
asks in the same way, whoever loads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rftt.prompts import Messages
from rftt.run.files import decode_text, read_bytes
from rftt.tokens import CLOSERS, OPENERS
from rftt.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT = "\ufdd0"
"""A noncharacter of Unicode: stands in rendered prompts where a control text is cut in two."""
SETTINGS = re.compile(r"\{# rftt settings #\}.*?\{\{ '' \}\}", re.DOTALL)
"""What `with_settings` writes. At its end an expression keeps a line break that Jinja drops."""
DATE_CALL = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>[^"'\\]*)(?P=quote)\s*\)""")
OWN_NAMES = ("messages", "add_generation_prompt", "tools", "documents", "bos_token", "eos_token")
"""Variables of a template that are not settings."""


def single_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> str:
    """Return the chat template in `file`, else the tokenizer's own. Raise UserError without one."""
    if file:
        return decode_text(read_bytes(file), file)
    own: Any = tokenizer.chat_template
    name = tokenizer.name_or_path
    if isinstance(own, Mapping):
        if "default" not in own:
            names = ", ".join(sorted(own))
            raise UserError(
                f"{name} has the chat templates {names} and none named default; save one of them "
                "as a file and set chat_template to it."
            )
        own = own["default"]
    if own is None:
        raise UserError(f"the tokenizer of {name} has no chat template; use an instruct model.")
    return own


def with_settings(template: str, settings: Mapping[str, Any]) -> str:
    """Return `template` with variables such as enable_thinking set, instead of those it had.

    Raise UserError on a name that a template cannot set.
    """
    if not settings:
        return template
    statements = []
    for name, value in settings.items():
        if not name.isidentifier() or name in OWN_NAMES:
            raise UserError(f"chat_template_kwargs: {name!r} is not a setting of a chat template.")
        statements.append(f"{{% set {name} = {_literal(value)} %}}")
    return f"{{# rftt settings #}}{''.join(statements)}{{{{ '' }}}}{SETTINGS.sub('', template, 1)}"


def _literal(value: Any) -> str:
    """Return a JSON value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)  # True, None and quoted text are Jinja's as well


def with_date(template: str, today: date) -> str:
    """Return `template` with the date written out: a run resumed tomorrow asks as it did today.

    Raise UserError where the template computes the format of its date.
    """

    def written(found: re.Match[str]) -> str:
        return _literal(datetime(today.year, today.month, today.day).strftime(found["format"]))

    dated = DATE_CALL.sub(written, template)
    if "strftime_now(" in dated:
        raise UserError(
            "the chat template asks for the date in a form that cannot be frozen; set "
            "chat_template to a file with the date written out."
        )
    return dated


# ---- Text that stays text ----


@lru_cache(maxsize=8)
def _control_pattern(
    tokenizer: PreTrainedTokenizerBase, _size: int, in_responses: bool
) -> re.Pattern[str] | None:
    """Return what matches each control token of a tokenizer of `_size` ids, the longest first.

    Control tokens are special and functional ones and, outside of responses, all added ones in
    brackets, such as <think>.
    """
    texts = set()
    for token in tokenizer.added_tokens_decoder.values():
        bracketed = token.content[:1] in ("<", "[") and not in_responses
        if token.content and (token.special or bracketed or token.content in OPENERS + CLOSERS):
            texts.add(token.content)
    if not texts:
        return None
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def holds_control_text(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether `text` has special or functional tokens, which no step may contain.

    Other added tokens, such as <think>, are a model's own words in its responses.
    """
    pattern = _control_pattern(tokenizer, len(tokenizer), True)
    return bool(pattern and pattern.search(text))


def apart(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Messages | None:
    """Return messages whose users' control texts are cut after the first character.

    Return None where there is nothing to cut, which is nearly always. The system prompt is the
    run's own text and may use control tokens.
    """
    pattern = _control_pattern(tokenizer, len(tokenizer), False)
    users = [message["content"] for message in messages if message["role"] == "user"]
    if pattern is None or not any(map(pattern.search, users)):
        return None
    cut: Messages = []
    for message in messages:
        content = message["content"].replace(CUT, "")
        pieces, start = [], 0
        while message["role"] == "user" and (found := pattern.search(content, start)):
            pieces.append(content[start : found.start() + 1])
            start = found.start() + 1
        cut.append(message | {"content": CUT.join([*pieces, content[start:]])})
    return cut


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> list[int]:
    """Return the ids of a rendered text, none of whose tokens reaches over the end of a piece."""
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids
