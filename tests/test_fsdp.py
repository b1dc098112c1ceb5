"""Test fsdp.py: one rank and two compute the same, and release all resources."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from rftt.learner import offline
from rftt.learner.fsdp import (
    World,
    clip_gradients,
    close_world,
    full_weights,
    mesh_of,
    open_world,
    shard,
)
from rftt.learner.logprobs import token_logprobs
from rftt.learner.lora import attach
from rftt.learner.model import prepare
from rftt.learner.optim import build_optimizer
from rftt.types import UserError
from tests.learners import VOCABULARY, random_batch, tiny_model
from tests.toy_training import SCHEDULE, train

ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}


def run(*command: str) -> str:
    """Run a command from the root of the repository; its stdout."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = open_world("cpu")
    yield world
    close_world(world)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy suite's output folder, written by torchrun with two ranks."""
    path = tmp_path_factory.mktemp("two")
    script = str(ROOT / "tests/toy_training.py")
    run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        str(path),
        "suite",
    )
    return path


def test_one_process_is_a_world(world: World) -> None:
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.sum(1.5) == 1.5
    assert world.max(2.5) == 2.5
    x = torch.ones(3)
    assert torch.equal(world.sum(x), x)
    assert world.gather({"a": 1}) == [{"a": 1}]


def test_an_absent_device_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="device=tpu"):
        open_world("tpu")


@pytest.mark.invariant
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"cpu_offload": True}])
def test_sharding_changes_no_bit_at_world_size_one(
    world: World, tied: bool, options: dict[str, bool]
) -> None:
    batch = random_batch([9, 14, 4])
    results = []
    for sharded in (False, True):
        model = prepare(tiny_model(tied=tied))
        names = list(dict(model.named_parameters()))
        if sharded:
            shard(model, world, **options)
        logprobs, _ = token_logprobs(model, batch, 1.0, VOCABULARY)
        offline.sft_loss(logprobs, batch.action_mask).backward()
        norm = clip_gradients(model, 0.5)
        weights = dict(full_weights(model))
        assert list(weights) == names
        gradients = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters()]
        results.append([logprobs.detach(), *gradients, torch.tensor(norm)])
    for plain, fsdp in zip(*results, strict=True):
        torch.testing.assert_close(plain, fsdp, atol=0, rtol=1e-6)


def test_clip_gradients_scales_to_the_norm_and_reports_the_old_one(world: World) -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(layer, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.8]]), atol=1e-5, rtol=1e-5)


@pytest.mark.invariant
@pytest.mark.dist
def test_two_ranks_equal_one(world: World, two_ranks: Path, tmp_path: Path) -> None:
    """Losses, gradient norms and weights; PPO with whitening over ranks, unequal microbatches."""
    result = json.loads((two_ranks / "result.json").read_text())
    one = train(world, tmp_path, 4)
    assert result["world"][:3] == [2, [{"rank": 0}, {"rank": 1}], 4.0]
    for mine, theirs in zip(one.history, result["history"], strict=True):
        assert mine[:4] == pytest.approx(theirs[:4], rel=1e-5, abs=1e-5)
    weights = torch.load(two_ranks / "weights.pt", weights_only=True)
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, weights[name], atol=1e-4, rtol=0)


@pytest.mark.invariant
@pytest.mark.dist
def test_two_ranks_resume_to_the_bit_and_one_rank_takes_over(
    world: World,
    two_ranks: Path,
) -> None:
    result = json.loads((two_ranks / "result.json").read_text())
    unbroken, resumed = result["world"][3]
    assert resumed == unbroken
    taken_over = train(world, two_ranks / "broken", 5)
    alone = train(world, two_ranks / "alone", 5)
    assert len(taken_over.history) == 5
    assert taken_over.history[4][:4] == pytest.approx(alone.history[4][:4], rel=1e-4)


@pytest.mark.lora
@pytest.mark.invariant
@pytest.mark.dist
def test_an_adapter_on_two_ranks_equals_one_and_resumes_to_the_bit(
    world: World, two_ranks: Path, tmp_path: Path
) -> None:
    """Checkpoints hold the adapter, the rows and their moments, but no frozen weight."""
    result = json.loads((two_ranks / "result.json").read_text())
    unbroken, resumed = result["lora"]
    assert resumed == unbroken
    one = train(world, tmp_path / "one", 4, adapted=True)
    train(world, tmp_path / "broken", 2, adapted=True)
    assert train(world, tmp_path / "broken", 4, adapted=True).digest == one.digest
    for mine, theirs in zip(one.history, result["lora_history"], strict=True):
        assert mine[:4] == pytest.approx(theirs[:4], rel=1e-5, abs=1e-5)
    weights = torch.load(two_ranks / "lora_weights.pt", weights_only=True)
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, weights[name], atol=1e-4, rtol=0)
    (state,) = (tmp_path / "one/checkpoints/step_000004/state").glob("*.safetensors")
    with safe_open(state, "pt") as file:
        policy = [name for name in file.keys() if "policy" in name]  # noqa: SIM118
    assert policy
    assert all("lora_" in name or "function_rows" in name for name in policy)


@pytest.mark.lora
@pytest.mark.invariant
def test_a_small_step_of_an_adapter_on_a_bfloat16_base_is_not_lost(world: World) -> None:
    """1e-6 is below the spacing of bfloat16 at the rows, so bfloat16 would lose it."""
    model = prepare(tiny_model(tied=False)).bfloat16()
    adapter = replace(SCHEDULE, use_peft=True, lora_r=4)
    attach(adapter, model, range(48, 64), seed=0)
    shard(model, world, param_dtype=torch.bfloat16)
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(adapter, model, 1e-6)
    logprobs, _ = token_logprobs(model, random_batch([9, 14, 4]), 1.0, VOCABULARY)
    logprobs.sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        now = parameter.full_tensor()
        assert now.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
        moved = "lora_B" in name or "function_rows" in name  # A has no gradient while B is 0
        assert torch.equal(now, before[name]) != moved
        if "function_rows" in name:
            assert (now.bfloat16() == before[name].bfloat16()).float().mean() > 0.9


@pytest.mark.gpu_ready
@pytest.mark.invariant
@pytest.mark.dist
@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_8_bit_moments_are_sharded_and_resume_to_the_bit(
    world: World, two_ranks: Path, tmp_path: Path
) -> None:
    """Blocks are the same on any number of ranks, so one rank also takes over."""
    unbroken, resumed, history = json.loads((two_ranks / "result.json").read_text())["eight"]
    assert resumed == unbroken
    one = train(world, tmp_path, 3, optim="adamw_8bit", wide=True)
    taken_over = train(world, two_ranks / "eight", 3, optim="adamw_8bit", wide=True)
    for mine, theirs in zip(one.history, [*history, taken_over.history[2]], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    stored = [
        safe_open(file, "pt")
        for file in (two_ranks / "eight/checkpoints/step_000002/state").glob("*.safetensors")
    ]
    codes = {k for file in stored for k in file.keys() if k.endswith("exp_avg.codes")}  # noqa: SIM118
    assert "optimizer.policy.state.model.embed_tokens.weight.exp_avg.codes" in codes


@pytest.mark.gpu_ready
@pytest.mark.invariant
@pytest.mark.dist
def test_replicas_on_two_nodes_equal_one_sharded_model(world: World, two_ranks: Path) -> None:
    """A replica writes checkpoints that a flat mesh continues."""
    result = json.loads((two_ranks / "result.json").read_text())
    shape, history = result["hybrid"]
    assert shape == [2, 1]
    for mine, theirs in zip(history, result["history"], strict=False):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    taken_over = train(world, two_ranks / "hybrid", 3)
    assert taken_over.history[2][:4] == pytest.approx(result["history"][2][:4], rel=1e-4, abs=1e-5)


@pytest.mark.gpu_ready
@pytest.mark.dist
def test_the_ranks_of_a_node_load_their_models_in_turns(two_ranks: Path) -> None:
    """Otherwise its memory would have to hold a whole model for each. An error reaches all."""
    turns = json.loads((two_ranks / "result.json").read_text())["turns"]
    assert turns[:2] == ["0: rank 1 has no model", "1: rank 1 has no model"]
    assert turns[2:] == ["begin 0", "end 0", "begin 1", "end 1"]


def test_unequal_nodes_are_one_clear_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(
        UserError, match="needs equally many ranks on every node, got 1 ranks and 3"
    ):
        mesh_of("cpu", hsdp=True)


@pytest.mark.dist
def test_bfloat16_compute_stays_near_float32(two_ranks: Path) -> None:
    result = json.loads((two_ranks / "result.json").read_text())
    for half, single in zip(result["half"], result["history"], strict=False):
        assert half[1:4] == pytest.approx(single[1:4], rel=0.05)
        assert half[2] != single[2]


def test_closing_joins_the_threads_of_the_process_group() -> None:
    """A gloo thread that survives can abort the interpreter at exit."""
    code = """
import os, pathlib, tempfile
from rftt.learner.fsdp import close_world, open_world
from tests.toy_training import train

def gloo_threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)

world = open_world("cpu")
train(world, pathlib.Path(tempfile.mkdtemp()), 1, checkpoint=False)
print(gloo_threads())
close_world(world)
print(gloo_threads())
"""
    before, after = run("-c", code).split()
    assert int(before) > 0
    assert int(after) == 0
