"""Estimate the memory of a run by arithmetic, before anything is loaded and without torch.

Two phases share a device and do not overlap: `explore` (the engine samples) and `learn` (forward,
backward, update). The estimate counts float32 weights, moments and gradients, and compute in
bfloat16 or float32 (learner/fsdp.py). It also counts the tensors that Llama-like layers save for
the backward pass, which tests/test_doctor.py measures with saved-tensor hooks. It does not count
the allocator, the CUDA context and NCCL, which take a few GB on a GPU.
"""

from __future__ import annotations

from typing import Any

from rftt.run.config import EvalConfig, RLConfig, SearchConfig, SFTConfig
from rftt.tokens import ACTS

MLP = ("gate_proj", "up_proj", "down_proj")
"""Linear layers of a gated feed-forward layer."""
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 64}
"""Bytes of both Adam moments per parameter; 8-bit ones have a float32 scale per 64 values."""
Config = SearchConfig | SFTConfig | RLConfig | EvalConfig
Parts = dict[str, float]
CURES = {
    "params": "fsdp_cpu_offload: true or more GPUs",
    "optimizer": "optim: adamw_8bit or fsdp_cpu_offload: true",
    "activations": "gradient_checkpointing: true or a smaller max_tokens_per_microbatch",
    "KV": "a smaller max_num_seqs or max_model_len",
}
"""Kind of memory -> settings that reduce it."""


def estimate(
    model: Any, n_params: int, cfg: Config, *, ranks: int, logits: tuple[int, int], gpu_bytes: float
) -> dict[str, Parts]:
    """Return phase -> kind -> bytes on the device of one rank, in the worst case.

    `model` is the Hugging Face config of a decoder with gated feed-forward layers. `logits` are the
    bounds of learner/logprobs.py (at one time, kept). `gpu_bytes` is the memory of the GPU, or 0.
    """
    compute = 2 if cfg.dtype == "bfloat16" else 4
    parts, phases = dict.fromkeys(CURES, 0.0), dict[str, Parts]()
    learn = dict(parts)
    if isinstance(cfg, SFTConfig | RLConfig):
        rl = isinstance(cfg, RLConfig)
        learners = n_params * (2 if rl and cfg.advantage_estimator == "ppo" else 1)
        frozen = n_params if rl and cfg.kl_coef else 0
        if cfg.use_peft:  # the frozen weights are the reference too
            learners, frozen = adapter_size(model, cfg), n_params
        share = 0 if cfg.fsdp_cpu_offload and gpu_bytes else 1 / ranks
        # FSDP keeps the vocabulary and two layers unsharded, the current and the next one.
        vocabulary = model.vocab_size * model.hidden_size
        whole = vocabulary + 2 * (n_params - vocabulary) / model.num_hidden_layers
        parts["params"] = share * (4 * learners + compute * frozen) + compute * whole
        parts["optimizer"] = share * learners * MOMENTS[cfg.optim]
        activations = _activations(model, cfg, compute, logits)
        learn = parts | {"activations": activations}
        learn["optimizer"] += share * 4 * learners  # gradients
        phases["learn"] = learn
    if not isinstance(cfg, SFTConfig) and cfg.engine != "api":
        held = compute * n_params
        width = key_value_heads(model) * head_size(model)
        cache = compute * 2 * model.num_hidden_layers * width * _kv_tokens(cfg)
        if cfg.engine == "vllm" and gpu_bytes:  # vLLM sleeps during `learn` and frees its memory
            cache = cfg.gpu_memory_utilization * gpu_bytes - held
        else:
            learn["params"] += held
        phases["explore"] = parts | {"params": parts["params"] + held, "KV": float(cache)}
    return phases


def complaint(phases: dict[str, Parts], available: float, where: str) -> str | None:
    """Return an error if a phase needs more than `available` bytes, otherwise None."""
    phase, parts = max(phases.items(), key=lambda item: sum(item[1].values()))
    if sum(parts.values()) <= available:
        return None
    largest = sorted(parts, key=lambda kind: -parts[kind])
    return (
        f"estimate {gigabytes(sum(parts.values()))} > {gigabytes(available)} on {where} in phase "
        f"{phase} ({details(parts)}). Try {', '.join(CURES[kind] for kind in largest[:2])}."
    )


def details(parts: Parts) -> str:
    """Format each kind of memory in GB."""
    return ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in parts.items())


def gigabytes(size: float) -> str:
    """Format a number of bytes in GB."""
    return f"{size / 1e9:.3g} GB"


def _kv_tokens(cfg: SearchConfig | RLConfig | EvalConfig) -> int:
    """Return the columns of the key/value slots. engines/slots.py has up to twice the rows."""
    problems = cfg.rollout_batch_size if isinstance(cfg, RLConfig) else cfg.problems_in_flight
    samples = {RLConfig: "num_generations", SearchConfig: "simulations", EvalConfig: "num_samples"}
    plain = getattr(cfg, samples[type(cfg)])
    return (
        min(cfg.max_num_seqs, 2 * problems * max(plain, cfg.leaves_in_flight)) * cfg.max_model_len
    )


def adapter_size(model: Any, cfg: SFTConfig | RLConfig) -> int:
    """Return the number of trained parameters with use_peft, for the layers of Llama-like models.

    An adapter has lora_r · (inputs + outputs). The functional tokens have 16 rows of the embedding,
    and 16 of a head that is not tied.
    """
    width, feed = model.hidden_size, getattr(model, "intermediate_size", 4 * model.hidden_size)
    heads, groups = (
        n * head_size(model) for n in (model.num_attention_heads, key_value_heads(model))
    )
    sizes = {"q_proj": width + heads, "k_proj": width + groups, "v_proj": width + groups}
    sizes |= {"o_proj": heads + width} | dict.fromkeys(MLP, width + feed)
    wanted = cfg.lora_target_modules
    chosen = [n for name, n in sizes.items() if wanted == ["all-linear"] or name in wanted]
    rows = (1 if model.tie_word_embeddings else 2) * 2 * len(ACTS) * width
    return model.num_hidden_layers * cfg.lora_r * sum(chosen) + rows


def head_size(model: Any) -> int:
    """Return the width of an attention head."""
    return getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads


def key_value_heads(model: Any) -> int:
    """Return the number of key and value heads. Older families have one per attention head."""
    return getattr(model, "num_key_value_heads", None) or model.num_attention_heads


def _activations(
    model: Any, cfg: SFTConfig | RLConfig, compute: int, logits: tuple[int, int]
) -> float:
    """Return the bytes of one microbatch: tensors that layers save, and the chunk of logits."""
    tokens, width = cfg.max_tokens_per_microbatch, model.hidden_size
    heads = head_size(model) * (3 * model.num_attention_heads + 2 * key_value_heads(model))
    # Norms use float32, other tensors the compute type. A gated MLP keeps two of its four tensors,
    # or all of them while a checkpointed layer is computed again (learner/model.py).
    mlp_width = getattr(model, "intermediate_size", None) or 4 * width  # GPT-2 and Bloom: 4
    mlp = (4 if cfg.gradient_checkpointing else 2) * mlp_width
    layer = compute * (mlp + heads + 4 * width) + 8 * width
    layers = model.num_hidden_layers * layer
    if cfg.gradient_checkpointing:
        layers = model.num_hidden_layers * compute * width + layer
    chunk, kept = (min(most, tokens * model.vocab_size) for most in logits)
    head = 0.0 if cfg.use_peft else 4.0 * model.vocab_size * width  # its gradient
    # Log-probs and their gradient, and the logits kept.
    return 8.0 * chunk + compute * kept + head + tokens * layers
