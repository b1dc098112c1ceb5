"""Check a tokenizer when it is opened: its ids, its text, its prompts, and what ends a turn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from rftt.engines import vocabulary_size
from rftt.engines.templates import FAULTS
from rftt.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.prompts import Messages

SENTENCE = (
    "What is 2+2? It is 4, so x = 4.\n\nHe has  12 pens , and she:\n\t- $5 (or 6 %) ;\n  - 7 < 8."
)
"""Text that a tokenizer must give back: words, signs and spaces of which questions consist."""
QUESTION = "How many are 3 and 4?"
REPLY = "There are 7 of them."
LONG_QUESTION = (
    "How many are 12 and 7? Is 2 < 3 & \"x\" > 'y'?\n\n  Two  spaces,\ta tab, \\frac{1}{2} {{ x }} "
    "{% y %}, é 数 🙂 .\n"
    f"Add up {', '.join(map(str, range(3000)))}.\n\n* [a](b) `c` **d**\n- How many?"
)
"""Signs and spaces that a template could change, in a text that it could cut off."""
MAX_OVERHEAD = 200_000
"""Characters that a template may add to a question."""
MAX_SECONDS = 10.0
"""CPU time in which a template must write a prompt. It usually takes a millisecond."""


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
    ask: Callable[[str], Messages],
    cure: str = "set chat_template to a file that writes message.content",
) -> None:
    """Raise UserError if the prompt of `ask(question)` does not hold the question once, unchanged.

    Blanks around a question may be dropped, as Llama and Gemma do. A template that refuses the
    messages is left to encode_chat, which names the reason.
    """
    name = tokenizer.name_or_path
    for question in (QUESTION, LONG_QUESTION):
        try:
            # Jinja has no limit of its own: two loops of 100,000 would run for hours.
            with cpu_limit(MAX_SECONDS):
                text = cast(
                    str,
                    tokenizer.apply_chat_template(
                        ask(question), add_generation_prompt=True, tokenize=False
                    ),
                )
        except TimeoutError as error:
            raise UserError(
                f"the chat template of {name} writes no prompt within {MAX_SECONDS:g} CPU seconds; "
                "set chat_template to another file."
            ) from error
        except FAULTS:
            return
        if len(text) > len(question) + MAX_OVERHEAD:
            raise UserError(
                f"the chat template of {name} writes {len(text)} characters for a question of "
                f"{len(question)}; set chat_template to another file."
            )
        begin = question[: question.index("?")]
        if (n := text.count(begin)) == 1 and question not in text:
            raise UserError(
                f"the chat template of {name} must write the question unchanged, but "
                f"{_first_change(question, text[text.index(begin) :])}; {cure}."
            )
        if n != 1:
            raise UserError(
                f"the chat template of {name} must write the question once, but writes it {n} "
                f"times; {cure}."
            )


def _first_change(question: str, written: str) -> str:
    """Return where a written question differs from the question itself."""
    at = next(i for i, sign in enumerate(question) if written[i : i + 1] != sign)
    return f"writes {written[at : at + 12]!r} for {question[at : at + 12]!r} at character {at}"


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after that many CPU seconds of this process.

    Only the main thread can be interrupted, so that other threads have no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


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
