"""checkpoint.py: resume is exact, to the bit, through kill −9 and on another number of ranks."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rftt.learn.checkpoint import export_hf, latest, mark_best, restore, save
from rftt.learn.distributed import World, close_world, open_world, shard
from rftt.learn.model import prepare
from rftt.learn.optim import build_optimizer
from tests.learners import tiny_model
from tests.test_distributed import ENVIRONMENT, ROOT, run
from tests.test_model import word_tokenizer
from tests.toy_training import train


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = open_world("cpu")
    yield world
    close_world(world)


def test_resume_equals_an_unbroken_run_to_the_bit_invariant(world: World, tmp_path: Path) -> None:
    unbroken = train(world, tmp_path / "a", 4)
    half = train(world, tmp_path / "b", 2)
    resumed = train(world, tmp_path / "b", 4)
    assert half.digest != unbroken.digest
    assert resumed.digest == unbroken.digest
    assert resumed.history == unbroken.history


def test_killed_at_any_moment_it_ends_in_the_same_weights_invariant(
    world: World, tmp_path: Path
) -> None:
    expected = train(world, tmp_path / "unbroken", 6)
    path = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "tests/toy_training.py"), str(path), "6"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while latest(path) is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert latest(path) is not None
    assert run("tests/toy_training.py", str(path), "6").split() == [expected.digest]


def test_an_incomplete_checkpoint_is_ignored(world: World, tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    train(world, tmp_path, 1)
    complete = latest(tmp_path)
    (tmp_path / "checkpoints/step_000009/state").mkdir(parents=True)
    assert complete is not None
    assert complete.name == "step_000001"
    assert latest(tmp_path) == complete
    assert (tmp_path / "checkpoints/latest").read_text() == "step_000001"


def test_only_the_newest_and_the_best_are_kept(world: World, tmp_path: Path) -> None:
    train(world, tmp_path, 1)
    mark_best(tmp_path, tmp_path / "checkpoints/step_000001")
    train(world, tmp_path, 4, keep=2)
    names = sorted(path.name for path in tmp_path.glob("checkpoints/step_*"))
    assert names == ["step_000001", "step_000003", "step_000004"]


def test_nothing_on_disk_is_a_pickle(world: World, tmp_path: Path) -> None:
    train(world, tmp_path, 1)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ""}


@pytest.mark.parametrize("tied", [True, False])
def test_the_exported_folder_is_the_model_oracle(world: World, tmp_path: Path, tied: bool) -> None:
    model, tokenizer = tiny_model(tied=tied), word_tokenizer(67)
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    policy = shard(prepare(model), world)
    optimizer = build_optimizer(policy, lr=1e-3)
    path = save(
        tmp_path, 3, modules={"policy": policy}, optimizers={"policy": optimizer},
        extra={"data": [1, 2]}, world=world, tokenizer=tokenizer,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(path / "hf")
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.config.use_cache
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, plain[name])
    read = PreTrainedTokenizerFast.from_pretrained(path / "hf")
    assert read.get_vocab() == tokenizer.get_vocab()
    extra = restore(path, {"policy": policy}, {"policy": optimizer}, world)
    assert extra == {"step": 3, "data": [1, 2]}
    export_hf(policy, tokenizer, tmp_path / "alone", world)
    assert (tmp_path / "alone/model.safetensors").exists()
