"""Test guard.py: an update that is not finite is named, skipped, dumped, and stops the run."""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rftt.batch import Batch, collate_rows
from rftt.learner import offline
from rftt.learner.fsdp import World, close_world, full_weights, open_world, shard
from rftt.learner.guard import LIMIT, Guard
from rftt.learner.logprobs import token_logprobs
from rftt.learner.model import prepare
from rftt.learner.optim import build_optimizer
from rftt.run.config import SFTConfig
from rftt.types import UserError
from rftt.update import update
from tests.learners import VOCABULARY, rows, tiny_model

NAMES = ["p0", "p1", "p2", "p3"]
LENGTHS = [9, 12, 5, 7]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = open_world("cpu")
    yield world
    close_world(world)


class Spike(torch.autograd.Function):
    """A finite loss with a gradient that is not, as an overflow in a backward pass."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * math.inf


def trainer(world: World, folder: Path) -> tuple[Callable[[Batch, str], None], Guard, list[str]]:
    """One update of a tiny model; `bad` is what document p2 does, told by its last token."""
    model = shard(prepare(tiny_model()), world)
    cfg = SFTConfig(output_dir="", model_name_or_path="", train_file="", learning_rate=1e-3)
    optimizer = build_optimizer(cfg, model, 1e-3)
    said: list[str] = []
    guard = Guard(folder, {"policy": model}, world, said.append)

    def loss_of(bad: str, micro: Batch) -> Tensor:
        values = token_logprobs(model, micro, 1.0, VOCABULARY)[0]
        if bad == "gradient" and LENGTHS[2] in micro.lengths:
            values = Spike.apply(values)
        if bad == "loss" and LENGTHS[2] in micro.lengths:
            values = values * math.inf
        weights = torch.ones_like(values) if micro.advantages is None else micro.advantages
        return offline.sft_loss(values * weights, micro.action_mask)

    def step(batch: Batch, bad: str) -> None:
        before = {name: weight.clone() for name, weight in full_weights(model)}
        loss = partial(loss_of, bad)
        modules, optimizers = {"policy": model}, {"policy": optimizer}
        norms = update(modules, optimizers, {"policy": 1e-3}, batch, loss, cfg, world)
        same = all(torch.equal(weight, before[name]) for name, weight in full_weights(model))
        assert same == bool(bad)  # skipped
        guard.check(norms, 31, batch, NAMES, loss)

    return step, guard, said


def test_a_finite_update_is_nobodys_business(world: World, tmp_path: Path) -> None:
    step, guard, said = trainer(world, tmp_path / "debug")
    step(collate_rows(rows(LENGTHS)), "")
    assert (guard.skipped, said, list(tmp_path.iterdir())) == (0, [], [])


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_bad_loss_or_gradient_names_its_sample(world: World, tmp_path: Path, bad: str) -> None:
    step, guard, said = trainer(world, tmp_path)
    step(collate_rows(rows(LENGTHS)), bad)
    assert said == [
        f"{bad} is NaN or infinite at step 31 (first bad tensor: {bad}, sample id p2). "
        f"Batch dumped to {tmp_path}/. Update skipped."
    ]
    assert guard.skipped == guard.in_a_row == 1


def test_the_source_is_named_and_not_what_it_spread_to(world: World, tmp_path: Path) -> None:
    """One NaN reward whitens into NaN advantages of all documents."""
    step, _, said = trainer(world, tmp_path)
    batch = collate_rows(rows(LENGTHS))
    rewards = torch.zeros_like(batch.rewards)
    rewards[sum(LENGTHS[:2]) - 1] = math.nan
    advantages = torch.full_like(rewards, math.nan)
    step(batch.replace(rewards=rewards, advantages=advantages), "inputs")
    assert "first bad tensor: rewards, sample id p1)" in said[0]
    documents = json.loads((tmp_path / "step_000031_rank_0.json").read_text())
    assert [document["sample"] for document in documents] == NAMES
    assert documents[1]["rewards"] == [0.0] * (LENGTHS[1] - 1) + ["nan"]
    assert documents[3]["advantages"] == ["nan"] * LENGTHS[3]
    assert sum(len(document["input_ids"]) for document in documents) == sum(LENGTHS)


def test_only_a_run_of_bad_updates_stops_the_run(world: World, tmp_path: Path) -> None:
    step, guard, said = trainer(world, tmp_path)
    batch = collate_rows(rows(LENGTHS))
    for bad in ["loss"] * (LIMIT - 1) + [""] + ["loss"] * (LIMIT - 1):
        step(batch, bad)
    assert (guard.skipped, guard.in_a_row) == (2 * LIMIT - 2, LIMIT - 1)
    with pytest.raises(UserError, match=r"sample id p2\).*It is update 3 in a row"):
        step(batch, "loss")
    assert len(said) == 2 * LIMIT - 2
