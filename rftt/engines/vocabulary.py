"""Check a tokenizer when it is opened: its ids, its text, its prompts, and what ends a turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from rftt.engines import vocabulary_size
from rftt.engines.templates import FAULTS
from rftt.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.prompts import Messages

SENTENCE = "What is 2+2? It is 4, so x = 4."
"""Text that a tokenizer must give back: its words and spaces are what most questions consist of."""
QUESTION = "How many are 3 and 4?"
REPLY = "There are 7 of them."


def check_free(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Raise UserError if any of `tokens` has an id that another token has as well."""
    vocabulary = tokenizer.get_vocab()
    others = {id_: token for token, id_ in vocabulary.items() if token not in set(tokens)}
    for token in tokens:
        if other := others.get(vocabulary[token]):
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has a hole in its ids: the new token "
                f"{token} got the id {vocabulary[token]}, which is that of {other!r}; give the "
                "tokens of its tokenizer.json ids without gaps, or fill them with unused tokens."
            )


def check_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if a sentence does not survive being encoded and decoded.

    Characters that the vocabulary lacks are left out of the sentence.
    """
    unknown = tokenizer.unk_token_id
    sentence = "".join(
        c for c in SENTENCE if unknown not in tokenizer.encode(c, add_special_tokens=False)
    )
    ids = tokenizer.encode(sentence, add_special_tokens=False)
    back = cast(str, tokenizer.decode(ids, skip_special_tokens=False)).strip()
    if back != sentence.strip():
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} loses text: {sentence!r} is {back!r} after "
            "encoding and decoding; use its own tokenizer class or another version of transformers."
        )


def check_question(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    cure: str = "set chat_template to a file that writes message.content",
) -> None:
    """Raise UserError if the prompt that `messages` become does not hold QUESTION exactly once.

    A template that refuses the messages is left to encode_chat, which names the reason.
    """
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except FAULTS:
        return
    if (n := cast(str, text).count(QUESTION)) != 1:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} must write the question once, but "
            f"writes it {n} times; {cure}."
        )


# ---- What ends a turn ----


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the control token that the chat template writes behind a reply.

    None is returned if the template writes none, or refuses a reply.
    """
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": REPLY}]
    try:
        text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
    except FAULTS:
        return None
    _, found, rest = text.rpartition(REPLY)
    control = set(tokenizer.all_special_ids)
    control |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer.encode(rest.lstrip(), add_special_tokens=False) if found else []
    return ids[0] if ids and ids[0] in control else None


def end_ids(tokenizer: PreTrainedTokenizerBase, listed: Sequence[int]) -> tuple[int, ...]:
    """Return every id that ends a reply, without doubles.

    These are the tokenizer's EOS, the ids `listed` in generation_config.json, and the template's
    end of turn. Instruct models end a turn with any of them.
    """
    ends = [tokenizer.eos_token_id, *listed, turn_end(tokenizer)]
    bound = vocabulary_size(tokenizer)
    return tuple(dict.fromkeys(i for i in ends if isinstance(i, int) and 0 <= i < bound))
