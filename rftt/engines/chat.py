"""Convert messages to ids and ids to text, and provide a `Chat`, which phase 1 samples with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rftt.engines import build_engine, vocabulary_size
from rftt.engines.base import Reply, Sampling
from rftt.engines.templates import (
    CUT,
    FAULTS,
    apart,
    encode_pieces,
    neutral,
    single_template,
    with_date,
    with_settings,
)
from rftt.engines.vocabulary import check_question, check_text, end_ids
from rftt.prompts import Messages, question_messages
from rftt.run.files import one_line
from rftt.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.engines.base import Engine
    from rftt.run.config import Common, SearchConfig

Chat = Callable[[Messages, Sampling], Awaitable[Reply]]
"""The only interface of phase 1 to a model. The reply is empty if the messages leave no room."""


# ---- Tokenizers ----


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, chat: bool = True
) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises UserError if it is missing or, with `chat`, has no chat template."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    broken = (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (*broken, StrictDataclassError) as error:
        raise UserError(
            f"model_name_or_path must be a folder with a tokenizer or a reachable hub name, got "
            f"{path!r} ({one_line(error)})."
        ) from error
    except Exception as error:
        if type(error) is Exception:  # tokenizers raises nothing narrower for a file it cannot read
            raise UserError(
                f"the tokenizer.json of {path} was written by another version of tokenizers "
                f"({one_line(error, 100)}); install that version, or save the tokenizer again."
            ) from error
        raise
    if chat:
        tokenizer.chat_template = single_template(tokenizer, None)
    return tokenizer


def open_tokenizer(cfg: Common) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run; its chat template holds the run's settings and date.

    Raise UserError as load_tokenizer does, and on a template or settings that cannot be used.
    """
    path, trust = cfg.model_name_or_path, cfg.trust_remote_code
    tokenizer = load_tokenizer(path, trust_remote_code=trust, chat=False)
    template = single_template(tokenizer, cfg.chat_template)
    today = date.fromisoformat(cfg.template_date) if cfg.template_date else date.today()
    template = with_settings(with_date(template, today), cfg.chat_template_kwargs)
    tokenizer.chat_template = template
    if not cfg.skip_model_check:
        check_text(tokenizer)
        check_question(tokenizer, lambda asked: question_messages(asked, cfg.system_prompt))
    return tokenizer


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Return the prompt ids up to the reply, or up to the end of the beginning of a reply.

    If the last message is the assistant's, it is such a beginning. Prompts are encoded only here. A
    user's text that reads like a control token stays text. Raises UserError where the template
    refuses the messages or doubles the BOS token.
    """
    if messages[-1]["role"] == "assistant":
        *before, begun = messages
        beginning = tokenizer.encode(begun["content"], add_special_tokens=False)
        return encode_chat(tokenizer, before) + beginning
    cut = apart(tokenizer, messages)
    try:
        if cut is None:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        else:
            text = tokenizer.apply_chat_template(cut, add_generation_prompt=True, tokenize=False)
            ids = encode_pieces(tokenizer, cast(str, text).split(CUT))
    except FAULTS as error:
        roles = ", ".join(message["role"] for message in messages)
        cure = "set system_prompt: null" if "system" in roles else "set chat_template to another"
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} must accept the roles {roles} "
            f"({one_line(error)}); {cure}."
        ) from error
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise UserError(
            f"a prompt must start with one BOS token, got two BOS tokens from the chat template of "
            f"{tokenizer.name_or_path}; remove one from the template or from system_prompt."
        )
    return cast(list[int], list(ids))


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special: bool = False
) -> str:
    """Return the text of `ids`. Functional tokens are not special tokens and remain."""
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=skip_special))


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the EOS token. Raises UserError if there is not exactly one."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} must have one EOS token, got "
            f"{tokenizer.eos_token_id!r}; set eos_token in its tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def reply_ends(tokenizer: PreTrainedTokenizerBase, path: str) -> tuple[int, ...]:
    """Return every id that ends a reply of the model at `path` (vocabulary.py:end_ids).

    Raises UserError if the tokenizer does not have one EOS token.
    """
    from rftt.engines.opened import listed_ends

    eos_id(tokenizer)
    return end_ids(tokenizer, listed_ends(path))


# ---- A chat with an instruct model ----


@asynccontextmanager
async def open_chat(
    cfg: SearchConfig, tokenizer: PreTrainedTokenizerBase, ledger: Path, say: Callable[[str], None]
) -> AsyncIterator[Chat]:
    """Open the instruct model of a search: a local engine, or an API with its `ledger`.

    The API's model has another tokenizer. `max_model_len` is therefore enforced with the token
    counts of the local one, and control text of users is spaced instead of cut.
    """
    if cfg.engine != "api":
        engine = build_engine(cfg, cfg.model_name_or_path, vocabulary_size(tokenizer))
        try:
            ends = reply_ends(tokenizer, cfg.model_name_or_path)
            yield partial(engine_chat, engine, tokenizer, ends=ends)
        finally:
            engine.close()
        return
    from rftt.engines.openai import open_api

    async with open_api(cfg, ledger) as api:

        async def api_chat(messages: Messages, sampling: Sampling) -> Reply:
            room = cfg.max_model_len - len(encode_chat(tokenizer, messages))
            if room <= 0:
                return Reply("", whole=False)
            capped = replace(sampling, max_tokens=min(sampling.max_tokens, room))
            return await api.chat(neutral(tokenizer, messages), capped)

        yield api_chat
    say(f"{cfg.api_url}: {api.spending}")


async def engine_chat(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    sampling: Sampling,
    *,
    ends: tuple[int, ...] = (),
) -> Reply:
    """Return the reply of a local model. With its first two arguments bound it is a `Chat`.

    Any of `ends` ends the reply; the tokenizer's EOS does where there are none.
    """
    prompt, stop = encode_chat(tokenizer, messages), ends or (eos_id(tokenizer),)
    room = engine.max_model_len - len(prompt)
    if room <= 0:
        return Reply("", whole=False)
    capped = replace(sampling, max_tokens=min(sampling.max_tokens, room), stop_ids=stop)
    completion = await engine.generate(prompt, capped)
    if sampling.meter:
        sampling.meter.end(len(completion.token_ids))
    text = decode(tokenizer, completion.token_ids, skip_special=True)
    whole, logprob = completion.finish == "stop", sum(completion.logprobs)
    return Reply(text, whole, len(prompt), len(completion.token_ids), logprob=logprob)
