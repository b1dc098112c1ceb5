"""Test guard.py: an update that is not finite is named, skipped, dumped, and stops the run."""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rftt.batch import Batch
from rftt.learner import offline
from rftt.learner.fsdp import World, close_world, full_weights, open_world, shard
from rftt.learner.guard import LIMIT
from rftt.learner.logprobs import token_logprobs
from rftt.learner.model import prepare
from rftt.learner.offline import collate_rows
from rftt.rl import Metrics
from rftt.run.config import SFTConfig
from rftt.types import UserError
from rftt.update import Learner
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


def batch_of_four() -> Batch:
    return collate_rows(rows(LENGTHS)).replace(names=tuple(NAMES))


def trainer(world: World, folder: Path) -> tuple[Callable[[Batch, str], None], Learner, list[str]]:
    """One update of a tiny model; `bad` is what document p2 does, told by its length."""
    model = shard(prepare(tiny_model()), world)
    cfg = SFTConfig(output_dir="", model_name_or_path="", train_file="", learning_rate=1e-3)
    said: list[str] = []
    learner = Learner(cfg, {"policy": model}, 1, world, folder, said.append)
    learner.begin(31)

    def loss_of(bad: str, micro: Batch) -> tuple[Tensor, Metrics]:
        values = token_logprobs(model, micro, 1.0, VOCABULARY)[0]
        if bad == "gradient" and LENGTHS[2] in micro.lengths:
            values = Spike.apply(values)
        if bad == "loss" and LENGTHS[2] in micro.lengths:
            values = values * math.inf
        weights = torch.ones_like(values) if micro.advantages is None else micro.advantages
        return offline.sft_loss(values * weights, micro.action_mask), {}

    def step(batch: Batch, bad: str) -> None:
        before = {name: weight.clone() for name, weight in full_weights(model)}
        try:
            learner.step(batch, partial(loss_of, bad))
        finally:
            same = all(torch.equal(weight, before[name]) for name, weight in full_weights(model))
            assert same == bool(bad)  # skipped

    return step, learner, said


def test_a_finite_update_is_nobodys_business(world: World, tmp_path: Path) -> None:
    step, learner, said = trainer(world, tmp_path / "debug")
    step(batch_of_four(), "")
    assert (learner.metrics()["updates_skipped"], said, list(tmp_path.iterdir())) == (0, [], [])


def test_the_norm_is_logged_as_mean_and_maximum_over_minibatches(
    world: World, tmp_path: Path
) -> None:
    """One document at a time, whose norms differ; a learner's next step begins anew."""
    step, learner, _ = trainer(world, tmp_path)
    norms = []
    for part in batch_of_four().split([1, 1, 2]):
        learner.begin(31)
        step(part, "")
        norms.append(learner.metrics()["grad_norm"])
    step, learner, _ = trainer(world, tmp_path)
    for part in batch_of_four().split([1, 1, 2]):
        step(part, "")
    metrics = learner.metrics()
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 3)
    assert metrics["grad_norm_max"] == pytest.approx(max(norms))
    assert max(norms) > 1.01 * min(norms)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_bad_loss_or_gradient_names_its_sample(world: World, tmp_path: Path, bad: str) -> None:
    step, learner, said = trainer(world, tmp_path)
    step(batch_of_four(), bad)
    assert said == [
        f"{bad} is NaN or infinite at step 31 (first bad tensor: {bad}, sample id p2). "
        f"Batch dumped to {tmp_path}/. Update skipped."
    ]
    metrics = learner.metrics()
    assert metrics["updates_skipped"] == 1
    assert math.isnan(metrics["grad_norm"])
    assert math.isnan(metrics["grad_norm_max"])


def test_the_source_is_named_and_not_what_it_spread_to(world: World, tmp_path: Path) -> None:
    """One NaN reward whitens into NaN advantages of all documents."""
    step, _, said = trainer(world, tmp_path)
    batch = batch_of_four()
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
    step, learner, said = trainer(world, tmp_path)
    batch = batch_of_four()
    for bad in ["loss"] * (LIMIT - 1) + [""] + ["loss"] * (LIMIT - 1):
        step(batch, bad)
    assert learner.metrics()["updates_skipped"] == 2 * LIMIT - 2
    with pytest.raises(UserError, match=r"sample id p2\).*This is update 3 in a row"):
        step(batch, "loss")
    assert len(said) == 2 * LIMIT - 2
