"""Test checkpoint.py: resume is exact to the bit, after kill −9 and on other ranks."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rftt.learner.checkpoint import Checkpoints, export_hf, latest, newest_whole, restore
from rftt.learner.fsdp import World, close_world, full_weights, open_world, shard
from rftt.learner.model import prepare
from rftt.learner.optim import build_optimizer
from rftt.types import UserError
from tests.conftest import wait_until
from tests.learners import tiny_model, word_tokenizer
from tests.test_fsdp import ENVIRONMENT, ROOT, run
from tests.toy_training import SCHEDULE, train


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = open_world("cpu")
    yield world
    close_world(world)


@pytest.mark.invariant
def test_resume_equals_an_unbroken_run_to_the_bit(world: World, tmp_path: Path) -> None:
    unbroken = train(world, tmp_path / "a", 4)
    half = train(world, tmp_path / "b", 2)
    resumed = train(world, tmp_path / "b", 4)
    assert half.digest != unbroken.digest
    assert resumed.digest == unbroken.digest
    assert resumed.history == unbroken.history


@pytest.mark.invariant
@pytest.mark.faults
def test_killed_at_any_moment_it_ends_in_the_same_weights(world: World, tmp_path: Path) -> None:
    expected = train(world, tmp_path / "unbroken", 6)
    path = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "tests/toy_training.py"), str(path), "6"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    wait_until(lambda: latest(path) is not None, process)
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
    checkpoints = Checkpoints(tmp_path, world, word_tokenizer(67))
    checkpoints.rate(1, 0.5)
    checkpoints.rate(2, 0.5)
    checkpoints.close()
    train(world, tmp_path, 4, keep=2)
    names = sorted(path.name for path in tmp_path.glob("checkpoints/step_*"))
    assert names == ["step_000001", "step_000003", "step_000004"]


def damage(path: Path, how: str) -> None:
    """One bit of the weights, their end, all of them, or the marker itself."""
    (shard_file,) = (path / "state").glob("*.safetensors")
    content = bytearray(shard_file.read_bytes())
    match how:
        case "flipped":
            content[-100] ^= 1
            shard_file.write_bytes(content)
        case "truncated":
            shard_file.write_bytes(content[:-100])
        case "missing":
            shard_file.unlink()
        case "marker":
            (path / "COMPLETE").write_bytes(b"\x00" * 10)
        case "list":
            (path / "COMPLETE").write_text("[]")


@pytest.mark.cases
@pytest.mark.faults
def test_files_of_others_do_not_damage_a_checkpoint(world: World, tmp_path: Path) -> None:
    train(world, tmp_path, 1)
    path = latest(tmp_path)
    assert path is not None
    for name in (".DS_Store", "hf/.DS_Store", "state/Thumbs.db", "state/._1.safetensors"):
        (path / name).write_bytes(b"\x00")
    assert newest_whole(tmp_path, world) == path
    train(world, tmp_path, 2)  # goes on from it


@pytest.mark.faults
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "marker", "list"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    world: World, tmp_path: Path, how: str
) -> None:
    train(world, tmp_path, 2)
    first, second = sorted(tmp_path.glob("checkpoints/step_*"))
    assert newest_whole(tmp_path, world) == second
    damage(second, how)
    with pytest.warns(UserWarning, match="step_000002 is damaged; going on from step_000001"):
        assert newest_whole(tmp_path, world) == first
    assert latest(tmp_path) == first
    damage(first, how)
    with pytest.raises(UserError, match="step_000001 is damaged, and there is no older"):
        newest_whole(tmp_path, world)


def test_a_checkpoint_holds_the_moment_of_the_call(world: World, tmp_path: Path) -> None:
    """The next one, best or not, comes after it."""
    policy = shard(prepare(tiny_model()), world)
    optimizer = build_optimizer(SCHEDULE, policy, 1e-3)
    wanted = {name: weight.clone() for name, weight in full_weights(policy)}
    checkpoints = Checkpoints(tmp_path, world, word_tokenizer(67), keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, {"policy": policy}, {"policy": optimizer}, {})
        checkpoints.rate(step, 1.0 / step)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(1.0)
    checkpoints.close()
    names = sorted(path.name for path in tmp_path.glob("checkpoints/*"))
    assert names == ["best", "latest", "step_000001", "step_000003"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints/step_000001/hf")
    restore(tmp_path / "checkpoints/step_000001", {"policy": policy}, {})
    for name, weight in full_weights(policy):
        assert torch.equal(weight, wanted[name])
        assert torch.equal(exported.state_dict()[name], wanted[name])


def test_a_checkpoint_of_several_files_is_read_back(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rftt.learner.checkpoint.FILE_BYTES", 1000)
    policy = shard(prepare(tiny_model()), world)
    optimizer = build_optimizer(SCHEDULE, policy, 1e-3)
    wanted = {name: weight.clone() for name, weight in full_weights(policy)}
    checkpoints = Checkpoints(tmp_path, world, word_tokenizer(67))
    checkpoints.save(1, {"policy": policy}, {"policy": optimizer}, {})
    checkpoints.close()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    assert len(list(tmp_path.glob("checkpoints/step_000001/state/*"))) > 3
    restore(tmp_path / "checkpoints/step_000001", {"policy": policy}, {"policy": optimizer})
    for name, weight in full_weights(policy):
        assert torch.equal(weight, wanted[name])


@pytest.mark.faults
def test_a_checkpoint_that_cannot_be_written_stops_the_run(world: World, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    policy = shard(prepare(tiny_model()), world)
    checkpoints = Checkpoints(tmp_path, world, word_tokenizer(67))
    checkpoints.save(1, {"policy": policy}, {}, {})
    with pytest.raises(UserError, match="must be a folder"):
        checkpoints.save(2, {"policy": policy}, {}, {})


def test_nothing_on_disk_is_a_pickle(world: World, tmp_path: Path) -> None:
    train(world, tmp_path, 1)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ""}


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [True, False])
def test_the_exported_folder_is_the_model(world: World, tmp_path: Path, tied: bool) -> None:
    model, tokenizer = tiny_model(tied=tied), word_tokenizer(67)
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    policy = shard(prepare(model), world)
    optimizer = build_optimizer(SCHEDULE, policy, 1e-3)
    checkpoints = Checkpoints(tmp_path, world, tokenizer)
    checkpoints.save(3, {"policy": policy}, {"policy": optimizer}, {"data": [1, 2]})
    checkpoints.close()
    path = tmp_path / "checkpoints/step_000003"
    loaded = AutoModelForCausalLM.from_pretrained(path / "hf")
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.config.use_cache
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, plain[name])
    read = PreTrainedTokenizerFast.from_pretrained(path / "hf")
    assert read.get_vocab() == tokenizer.get_vocab()
    extra = restore(path, {"policy": policy}, {"policy": optimizer})
    assert extra == {"step": 3, "data": [1, 2]}
    export_hf(policy, tokenizer, tmp_path / "alone", world)
    assert (tmp_path / "alone/model.safetensors").exists()
