"""From messages to ids and from ids to text, and the one callable that phase 1 needs: a `Chat`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from rftt.engines import build_engine
from rftt.engines.base import Reply, Sampling
from rftt.engines.templates import (
    CUT,
    apart,
    encode_pieces,
    single_template,
    with_date,
    with_settings,
)
from rftt.prompts import Messages
from rftt.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.engines.base import Engine
    from rftt.run.config import Common, SearchConfig

Chat = Callable[[Messages, Sampling], Awaitable[Reply]]
"""All that phase 1 asks of a model; the reply is empty where the messages leave no room for one."""


# ---- Tokenizers ----


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, chat: bool = True
) -> PreTrainedTokenizerBase:
    """Raises UserError where there is none, or where `chat` needs a template that it lacks."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name_or_path {path} is neither a folder with a tokenizer nor a hub model that "
            f"can be reached ({str(error).splitlines()[0]})."
        ) from error
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
    return tokenizer


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Prompt ids up to where the reply begins: the one way from messages to ids.

    A user's text that reads like a control token stays text. Raises UserError where the template
    refuses the messages or doubles the BOS token.
    """
    cut = apart(tokenizer, messages)
    try:
        if cut is None:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        else:
            text = tokenizer.apply_chat_template(cut, add_generation_prompt=True, tokenize=False)
            ids = encode_pieces(tokenizer, cast(str, text).split(CUT))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        cure = "set system_prompt: null" if "system" in roles else "set chat_template to another"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} refuses the roles {roles} ({reason}); "
            f"{cure}."
        ) from error
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise UserError(
            f"prompt starts with two BOS tokens; the chat template of {tokenizer.name_or_path} "
            "already adds one: take the other out of it, or out of system_prompt."
        )
    return cast(list[int], list(ids))


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special: bool = False
) -> str:
    """The text of `ids`; functional tokens are not special and stay."""
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=skip_special))


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no single EOS token.")
    return tokenizer.eos_token_id


# ---- A chat with an instruct model ----


@asynccontextmanager
async def open_chat(
    cfg: SearchConfig, tokenizer: PreTrainedTokenizerBase, ledger: Path, say: Callable[[str], None]
) -> AsyncIterator[Chat]:
    """The instruct model of a search: an engine of our own, or an API with its `ledger`.

    The API's model has another tokenizer; `max_model_len` is held by the count of ours.
    """
    if cfg.engine != "api":
        engine = build_engine(cfg, cfg.model_name_or_path, len(tokenizer))
        try:
            yield partial(engine_chat, engine, tokenizer)
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
            return await api.chat(messages, capped)

        yield api_chat
    say(f"{cfg.api_url}: {api.spending}")


async def engine_chat(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, messages: Messages, sampling: Sampling
) -> Reply:
    """A `Chat` with a local model."""
    prompt, stop = encode_chat(tokenizer, messages), (eos_id(tokenizer),)
    room = engine.max_model_len - len(prompt)
    if room <= 0:
        return Reply("", whole=False)
    capped = replace(sampling, max_tokens=min(sampling.max_tokens, room), stop_ids=stop)
    completion = await engine.generate(prompt, capped)
    text = decode(tokenizer, completion.token_ids, skip_special=True)
    whole, logprob = completion.finish == "stop", sum(completion.logprobs)
    return Reply(text, whole, len(prompt), len(completion.token_ids), logprob=logprob)
