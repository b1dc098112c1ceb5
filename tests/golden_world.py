"""Build a world that runs both training scripts in seconds, as real processes.

A random two-layer model, problems of one change, and rows that solve them in two steps. Everything
follows from fixed seeds: the golden losses and the kill-and-resume tests run on it.

    python -m tests.golden_world FOLDER NAME    both scripts; continues where a killed one was
    python -m tests.golden_world record         new golden losses
"""

import json
import sys
import tempfile
from pathlib import Path
from random import Random

import train_rl
import train_sft
from rftt.learner.fsdp import close_world, open_world
from rftt.run.config import RLConfig, SFTConfig, load_config
from rftt.run.files import write_json, write_jsonl
from tests.learners import random_qwen2
from tools.tiny_world import END, PAD, build_tokenizer, make_tale, write_line

SFT = [
    "dtype=float32", "learning_rate=1e-2", "train_batch_size=16", "num_train_epochs=3",
    "eval_ratio=0.1", "max_length=128", "max_tokens_per_microbatch=300", "save_steps=2",
    "save_total_limit=9", "eval_steps=4",
]  # fmt: skip
RL = [
    "dtype=float32", "learning_rate=2e-4", "advantage_estimator=ppo", "critic_learning_rate=1e-3",
    "rollout_batch_size=4", "num_generations=4", "train_batch_size=8", "max_steps=6",
    "search_depth=4", "max_completion_length=40", "max_model_len=128", "temperature=1.0",
    "max_tokens_per_microbatch=400", "save_steps=1", "save_total_limit=9", "eval_steps=2",
    "max_eval_problems=4", "kl_target=0.01",
]  # fmt: skip

KEYS = {
    "sft": ["loss", "eval_loss", "grad_norm"],
    "rl": ["reward", "policy_loss", "value_loss", "kl", "entropy", "grad_norm"],
}
GOLDEN = Path(__file__).parent / "golden"


def build(folder: Path) -> None:
    """folder/base, train.jsonl, test.jsonl and sft.jsonl."""
    rng, seen = Random(0), set()
    problems, rows = [], []
    while len(problems) < 168:
        tale = make_tale(rng, seen)
        if len(tale.changes) > 1:
            continue
        seen.add(tale.question)
        first = write_line("subquestion", tale, (0, tale.start))
        steps = [first, write_line("output", tale, first.end)]
        problem = {"id": f"p{len(problems)}", "question": tale.question}
        problems.append(problem | {"answer": str(tale.values[-1])})
        rows.append(problem | {"steps": [{"act": line.act, "text": line.text} for line in steps]})
    write_jsonl(folder / "sft.jsonl", rows)
    write_jsonl(folder / "train.jsonl", problems[:160])
    write_jsonl(folder / "test.jsonl", problems[160:])
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2}
    ends = {"eos_token_id": ids[END], "pad_token_id": ids[PAD]}
    model = random_qwen2(len(tokenizer), **sizes, **ends, initializer_range=0.1)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def train(folder: Path, name: str) -> None:
    """Warm-up and RL, in one process to save its start, into folder/name-sft and -rl."""
    world = open_world("cpu")
    base, warm = folder / "base", folder / f"{name}-sft"
    files = [f"model_name_or_path={base}", f"train_file={folder / 'sft.jsonl'}"]
    train_sft.train(load_config(SFTConfig, [*files, f"output_dir={warm}", *SFT]), world)
    files = [f"train_file={folder / 'train.jsonl'}", f"eval_file={folder / 'test.jsonl'}"]
    files += [f"model_name_or_path={warm / 'hf'}", f"output_dir={folder / name}-rl"]
    train_rl.train(load_config(RLConfig, [*files, *RL]), world)
    close_world(world)


def metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl, without what depends on the machine's load."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows]


def curves(folder: Path, name: str) -> dict[str, dict[str, list[float]]]:
    """What the golden files hold: stage -> key -> its value at every step that has one."""
    return {
        stage: {
            key: [row[key] for row in metrics(folder / f"{name}-{stage}") if key in row]
            for key in keys
        }
        for stage, keys in KEYS.items()
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["record"]:
        folder = Path(tempfile.mkdtemp())
        build(folder)
        train(folder, "recorded")
        for stage, found in curves(folder, "recorded").items():
            write_json(GOLDEN / f"{stage}.json", found)
    else:
        train(Path(sys.argv[1]), sys.argv[2])
