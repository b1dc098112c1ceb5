"""Test optim.py: schedules computed by hand, decay on matrices only."""

import logging
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from rftt.learner.fsdp import World, close_world, full_weights, open_world, shard
from rftt.learner.model import prepare
from rftt.learner.optim import build_optimizer, lr_at, parts_of, set_lr
from rftt.run.config import Training
from rftt.types import UserError
from tests.toy_training import train, wide_model
from tools.memory import MOMENTS


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.5, 1.0, 1.0, 0.868198, 0.55, 0.231802]),
    ],
)
def test_schedules_match_their_oracle(kind: str, expected: list[float]) -> None:
    cfg = Training(learning_rate=0.9, lr_scheduler_type=kind, warmup_ratio=0.25, min_lr_ratio=0.1)
    assert [lr_at(cfg, 1.0, s, 6) for s in range(6)] == pytest.approx(expected, abs=1e-6)
    assert lr_at(cfg, 1.0, 99, 6) == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_only_matrices_decay_and_the_rate_follows_set_lr() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = build_optimizer(Training(learning_rate=0.9, weight_decay=0.5), model, 0.0)
    set_lr(optimizer, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


# ---- 8-bit moments ----

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = open_world("cpu")
    yield world
    close_world(world)


def test_a_missing_torchao_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"needs torchao; pip install -r requirements-8bit\.txt"):
        build_optimizer(Training(learning_rate=0.9, optim="adamw_8bit"), nn.Linear(2, 2), 1e-3)
    assert logging.root.manager.disable == 0


@needs_torchao
@pytest.mark.gpu_ready
@pytest.mark.oracle
def test_8_bit_moments_follow_those_of_32_bits(world: World, tmp_path: Path) -> None:
    start = {name: w.clone() for name, w in full_weights(shard(prepare(wide_model()), world))}
    exact, small = (
        train(world, tmp_path / optim, 4, optim=optim, wide=True, checkpoint=False)
        for optim in ("adamw", "adamw_8bit")
    )
    for mine, theirs in zip(small.history, exact.history, strict=True):
        assert mine == pytest.approx(theirs, rel=0.02, abs=2e-3)
    for name, before in start.items():
        way, expected = small.weights[name] - before, exact.weights[name] - before
        assert not torch.equal(way, expected) or before.ndim == 1 or before.shape[1] % 64
        assert (way - expected).norm() < 0.1 * expected.norm(), name


@needs_torchao
@pytest.mark.gpu_ready
def test_8_bit_moments_are_as_small_as_the_doctor_counts() -> None:
    model = nn.Linear(256, 512)
    optimizer = build_optimizer(Training(learning_rate=0.9, optim="adamw_8bit"), model, 1e-3)
    parts = [
        part
        for key, moment in optimizer.state[model.weight].items()
        for part in (parts_of(moment).values() if key != "step" else ())
    ]
    assert sum(part.nbytes for part in parts) == MOMENTS["adamw_8bit"] * model.weight.numel()
    assert optimizer.state[model.bias]["exp_avg"].dtype == torch.float32


@needs_torchao
@pytest.mark.gpu_ready
@pytest.mark.invariant
def test_8_bit_moments_resume_to_the_bit(world: World, tmp_path: Path) -> None:
    unbroken = train(world, tmp_path / "a", 3, optim="adamw_8bit", wide=True)
    train(world, tmp_path / "b", 2, optim="adamw_8bit", wide=True)
    resumed = train(world, tmp_path / "b", 3, optim="adamw_8bit", wide=True)
    assert resumed.digest == unbroken.digest
    with pytest.raises(UserError, match="with the same optim"):
        train(world, tmp_path / "b", 4, optim="adamw", wide=True)
