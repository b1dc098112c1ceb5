"""How much memory a run needs, by arithmetic, before anything is loaded. No torch here.

Two phases share a device and do not overlap: `explore` (the engine samples) and `learn` (forward,
backward, update). Bytes are those that this code keeps: float32 weights, moments and gradients,
bfloat16 or float32 compute (learner/fsdp.py), and what Llama-like layers save for the backward
pass, counted with saved-tensor hooks in tests/test_doctor.py. What libraries keep beside it
(allocator, CUDA context, NCCL: a few GB on a GPU) is not in it.
"""

from __future__ import annotations

from typing import Any

from rftt.run.config import EvalConfig, RLConfig, SearchConfig, SFTConfig

Config = SearchConfig | SFTConfig | RLConfig | EvalConfig
Parts = dict[str, float]
CURES = {
    "params": "fsdp_cpu_offload: true or more GPUs",
    "optimizer": "optim: adamw_8bit or fsdp_cpu_offload: true",
    "activations": "gradient_checkpointing: true or a smaller max_tokens_per_microbatch",
    "KV": "a smaller max_num_seqs or max_model_len",
}
"""What fills the memory -> what to try against it."""


def estimate(
    model: Any, n_params: int, cfg: Config, *, ranks: int, logits: tuple[int, int], gpu_bytes: float
) -> dict[str, Parts]:
    """phase -> what for -> bytes on one rank's device, at worst.

    `model` is the Hugging Face config of a decoder with gated feed-forward layers, `logits` are
    learner/logprobs.py's bounds (at one time, kept), `gpu_bytes` the device's memory, 0 without
    one.
    """
    compute = 2 if cfg.dtype == "bfloat16" else 4
    parts, phases = dict.fromkeys(CURES, 0.0), dict[str, Parts]()
    learn = dict(parts)
    if isinstance(cfg, SFTConfig | RLConfig):
        rl = isinstance(cfg, RLConfig)
        learners = n_params * (2 if rl and cfg.advantage_estimator == "ppo" else 1)
        reference = compute * n_params if rl and cfg.kl_coef else 0
        share = 0 if cfg.fsdp_cpu_offload and gpu_bytes else 1 / ranks
        # FSDP holds the vocabulary and two layers whole, the one at work and the next.
        vocabulary = model.vocab_size * model.hidden_size
        whole = vocabulary + 2 * (n_params - vocabulary) / model.num_hidden_layers
        parts["params"] = share * (4 * learners + reference) + compute * whole
        parts["optimizer"] = share * learners * (8 if cfg.optim == "adamw" else 2)
        activations = _activations(model, cfg, compute, logits)
        learn = parts | {"activations": activations}
        learn["optimizer"] += share * 4 * learners  # gradients
        phases["learn"] = learn
    if not isinstance(cfg, SFTConfig) and cfg.engine != "api":
        held = compute * n_params
        width = model.num_key_value_heads * head_size(model)
        cache = compute * 2 * model.num_hidden_layers * width * _kv_tokens(cfg)
        if cfg.engine == "vllm" and gpu_bytes:  # and it gives all of it back to the learner
            cache = cfg.gpu_memory_utilization * gpu_bytes - held
        else:
            learn["params"] += held
        phases["explore"] = parts | {"params": parts["params"] + held, "KV": float(cache)}
    return phases


def complaint(phases: dict[str, Parts], available: float, where: str) -> str | None:
    """What to say where a phase does not fit into `available` bytes; None where all do."""
    phase, parts = max(phases.items(), key=lambda item: sum(item[1].values()))
    if sum(parts.values()) <= available:
        return None
    largest = sorted(parts, key=lambda kind: -parts[kind])
    return (
        f"estimate {gigabytes(sum(parts.values()))} > {gigabytes(available)} on {where} in phase "
        f"{phase} ({details(parts)}). Try {', '.join(CURES[kind] for kind in largest[:2])}."
    )


def details(parts: Parts) -> str:
    return ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in parts.items())


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _kv_tokens(cfg: SearchConfig | RLConfig | EvalConfig) -> int:
    """Columns of the key/value slots: engines/slots.py keeps up to twice the rows that run."""
    problems = cfg.rollout_batch_size if isinstance(cfg, RLConfig) else cfg.problems_in_flight
    samples = {RLConfig: "num_generations", SearchConfig: "simulations", EvalConfig: "num_samples"}
    plain = getattr(cfg, samples[type(cfg)])
    return (
        min(cfg.max_num_seqs, 2 * problems * max(plain, cfg.leaves_in_flight)) * cfg.max_model_len
    )


def head_size(model: Any) -> int:
    return getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads


def _activations(
    model: Any, cfg: SFTConfig | RLConfig, compute: int, logits: tuple[int, int]
) -> float:
    """Of one microbatch: what each layer saves (or its input alone), and the chunk of logits."""
    tokens, width = cfg.max_tokens_per_microbatch, model.hidden_size
    heads = head_size(model) * (3 * model.num_attention_heads + 2 * model.num_key_value_heads)
    # Norms normalise in float32, the rest is in the compute type. A gated MLP keeps two of its four
    # tensors, or all while a checkpointed layer is computed again (learner/model.py).
    mlp = (4 if cfg.gradient_checkpointing else 2) * model.intermediate_size
    layer = compute * (mlp + heads + 4 * width) + 8 * width
    layers = model.num_hidden_layers * layer
    if cfg.gradient_checkpointing:
        layers = model.num_hidden_layers * compute * width + layer
    chunk, kept = (min(most, tokens * model.vocab_size) for most in logits)
    # Log-probs and their gradient, the logits kept, the head's gradient.
    return 8.0 * chunk + compute * kept + 4.0 * model.vocab_size * width + tokens * layers
