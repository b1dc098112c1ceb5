"""Test train_rl.py with vLLM: the engine follows the learner, on one rank and on two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rftt.learner.fsdp import agreed
from rftt.run.files import write_jsonl
from rftt.tokens import add_function_tokens
from rftt.types import UserError
from tests.conftest import run
from tests.learners import random_qwen2
from tools.tiny_world import build_tokenizer

SETTINGS = {
    "engine": "vllm",
    "allow_cold_start": "true",
    "max_steps": 3,
    "rollout_batch_size": 4,
    "num_generations": 4,
    "train_batch_size": 8,
    "max_completion_length": 24,
    "max_model_len": 128,
    "max_num_seqs": 16,
    "max_eval_problems": 4,
    "eval_steps": 2,
    "save_steps": 0,
    "kl_coef": 0,
    "entropy_coef": 1,  # a random model earns nothing: this moves its weights all the same
    "learning_rate": 1e-3,
    "warmup_ratio": 0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that knows functional tokens, with heads of a width vLLM takes; problems."""
    path = tmp_path_factory.mktemp("world")
    tokenizer = build_tokenizer()
    add_function_tokens(tokenizer)
    model = random_qwen2(
        len(tokenizer), max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    problems = [{"id": str(i), "question": f"Eva has {i} pens.", "answer": i} for i in range(8)]
    write_jsonl(path / "problems.jsonl", problems)
    return path


def arguments(world: Path, out: Path, **changes: object) -> list[str]:
    """Of train_rl.py, on the small world."""
    paths = {
        "model_name_or_path": world / "model",
        "train_file": world / "problems.jsonl",
        "eval_file": world / "problems.jsonl",
        "output_dir": out,
    }
    settings = [f"{key}={value}" for key, value in (SETTINGS | paths | changes).items()]
    return ["train_rl.py", "configs/tiny/rl.yaml", *settings]


LAUNCHERS = {
    "one rank": [],
    "two ranks": ["-m", "torch.distributed.run", "--nproc_per_node", "2"],
}


@pytest.mark.invariant
@pytest.mark.vllm
@pytest.mark.dist
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_engine_follows_the_learner(launcher: str, world: Path, tmp_path: Path) -> None:
    script = [*LAUNCHERS[launcher], *arguments(world, tmp_path)]
    done = run(sys.executable, *script, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    for step in steps:
        assert step["rollouts"] == 16
        assert step["grad_norm"] > 0
        assert 0 <= step["mismatch_kl"] < 1e-3
        assert step["reward"] >= 0
    assert len({step["weights_checksum"] for step in steps}) == 3


@pytest.mark.vllm
def test_vllm_refuses_in_one_line_what_it_cannot_run(world: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    add_function_tokens(tokenizer)
    tokenizer.save_pretrained(tmp_path / "narrow")
    narrow = random_qwen2(len(tokenizer), num_attention_heads=4, num_key_value_heads=4)
    narrow.save_pretrained(tmp_path / "narrow")
    for change, message in (
        ({"model_name_or_path": tmp_path / "narrow"}, "heads of 16"),
        ({"max_model_len": 4096}, "max_model_len=4096 is beyond the 128 positions"),
    ):
        done = run(sys.executable, *arguments(world, tmp_path / "x", **change), check=False)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_ranks_that_hold_different_weights_stop_the_run() -> None:
    assert agreed([5.0, 5.0 + 1e-12]) == 5.0
    with pytest.raises(UserError, match="must have the same weights"):
        agreed([5.0, 5.001])
