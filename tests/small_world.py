"""Build random models, a few problems and small runs, for tests that need no learning."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rftt.run.files import write_jsonl
from rftt.tokens import add_function_tokens
from tests.conftest import ROOT
from tools.tiny_world import build_tokenizer, make_tale

CONFIGS = {"search": "search", "train_sft": "sft", "train_rl": "rl", "evaluate": "evaluate"}


def make_world(path: Path) -> Path:
    """Random models (`speaks` has functional tokens, `base` has none) and eight problems."""
    for name in ("base", "speaks"):
        tokenizer = build_tokenizer()
        if name == "speaks":
            add_function_tokens(tokenizer)
        torch.manual_seed(0)
        sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        config = Qwen2Config(vocab_size=len(tokenizer), **sizes, **heads, **ends)  # type: ignore[arg-type]
        Qwen2ForCausalLM(config).save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    rng, seen = Random(0), set[str]()
    tales = [make_tale(rng, seen) for _ in range(8)]
    write_jsonl(
        path / "train.jsonl", [{"problem": t.question, "answer": str(t.values[-1])} for t in tales]
    )
    return path


def settings(script: str, world: Path, out: Path, *more: str) -> list[str]:
    """Arguments of a small run of `script` on the random world; later ones win."""
    model = world / ("base" if script in ("search", "train_sft") else "speaks")
    data = "eval_file" if script == "evaluate" else "train_file"
    small = {
        "search": ["simulations=2", "max_problems=2", "max_completion_length=8"],
        "train_sft": ["train_batch_size=2"],
        "train_rl": ["rollout_batch_size=2", "num_generations=2", "train_batch_size=4",
                     "max_steps=2", "max_completion_length=8", "allow_cold_start=true",
                     f"eval_file={world / 'train.jsonl'}"],
        "evaluate": ["num_samples=1", "simulations=[]", "max_completion_length=8"],
    }  # fmt: skip
    return [
        str(ROOT / f"configs/tiny/{CONFIGS[script]}.yaml"), f"model_name_or_path={model}",
        f"{data}={world / 'train.jsonl'}", f"output_dir={out}", *small[script], *more,
    ]  # fmt: skip


def damage(model: Path, path: Path, fault: str) -> None:
    """A copy of `model` with fewer rows than ids, a template that doubles BOS, another, or none."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model)
    template = tokenizer.chat_template
    match fault:
        case "short":
            policy.resize_token_embeddings(len(tokenizer) - 5)
        case "doubled":
            tokenizer.bos_token = tokenizer.eos_token
            tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + template
        case "other":
            tokenizer.chat_template = "{{ eos_token }}" + template
        case "mute":
            tokenizer.chat_template = None
    policy.save_pretrained(path)
    tokenizer.save_pretrained(path)
