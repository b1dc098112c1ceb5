"""Run a toy PPO loop over the learner's API with checkpoints, for the dist tests.

python tests/toy_training.py RUN_DIR STEPS, or under torchrun. It continues where RUN_DIR stopped.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from rftt import rl
from rftt.learner.checkpoint import Checkpoints, latest, restore
from rftt.learner.fsdp import (
    World,
    clip_gradients,
    close_world,
    empty_like,
    flat_microbatches,
    full_weights,
    mesh_of,
    open_world,
    shard,
)
from rftt.learner.logprobs import token_logprobs, token_values
from rftt.learner.lora import attach
from rftt.learner.model import Critic, prepare
from rftt.learner.optim import build_optimizer, lr_at, set_lr
from rftt.run.config import Training
from rftt.types import UserError
from tests.learners import VOCABULARY, random_batch, random_qwen2, tiny_model, word_tokenizer

LENGTHS = [14, 5, 30, 8, 3, 21, 6]
SCHEDULE = Training(learning_rate=3e-3, lr_scheduler_type="cosine", warmup_ratio=0.25)


def wide_model(seed: int = 0) -> PreTrainedModel:
    """A model with 8-bit moments for some of its matrices; a vocabulary of odd size."""
    return random_qwen2(VOCABULARY, seed=seed)


@dataclass(frozen=True)
class Result:
    history: list[list[float]]
    """loss, value loss, two gradient norms: per step"""
    digest: str
    weights: dict[str, torch.Tensor]
    mesh: list[int]
    """Shape of the mesh of the policy's first weight."""


def train(
    world: World,
    run_dir: Path,
    steps: int,
    *,
    param_dtype: torch.dtype | None = None,
    keep: int = 0,
    checkpoint: bool = True,
    adapted: bool = False,
    optim: Literal["adamw", "adamw_8bit"] = "adamw",
    wide: bool = False,
) -> Result:
    """Train from the run's latest checkpoint to `steps`, all weights or an adapter."""
    make = wide_model if wide else tiny_model
    policy = prepare(make())
    if adapted:
        attach(replace(SCHEDULE, use_peft=True, lora_r=4), policy, range(48, 64), seed=0)
    modules = {
        "policy": shard(policy, world, param_dtype=param_dtype),
        "critic": shard(Critic(prepare(make(seed=1)).model), world, param_dtype=param_dtype),
    }
    schedule = replace(SCHEDULE, optim=optim)
    optimizers = {name: build_optimizer(schedule, module, 1e-3) for name, module in modules.items()}
    controller, first, history = rl.AdaptiveKL(0.1, 0.05, 100.0), 0, []
    checkpoints = Checkpoints(run_dir, world, word_tokenizer(VOCABULARY), keep=keep)
    if path := latest(run_dir):
        extra = restore(path, modules, optimizers)
        controller, first = rl.AdaptiveKL(**extra["kl"]), extra["step"]
        history = extra["history"]
    for step in range(first, steps):
        losses, kl = one_step(world, modules, controller.coef, step)
        for name, optimizer in optimizers.items():
            set_lr(optimizer, lr_at(SCHEDULE, 3e-3, step, 6))
            losses.append(clip_gradients(modules[name], 1.0))
            optimizer.step()
            optimizer.zero_grad()
        controller = controller.update(kl, len(LENGTHS))
        history = [*history, losses]
        extra = {"kl": vars(controller), "history": history}
        if checkpoint:
            checkpoints.save(step + 1, modules, optimizers, extra)
    checkpoints.close()
    weights = {name: tensor.clone() for name, tensor in full_weights(modules["policy"])}
    weights |= {name: tensor.clone() for name, tensor in full_weights(modules["critic"])}
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()
    mesh = list(next(modules["policy"].parameters()).device_mesh.shape)
    return Result(history, digest, weights, mesh)


def one_step(
    world: World, modules: dict[str, torch.nn.Module], kl_coef: float, step: int
) -> tuple[list[float], float]:
    """Forward and backward over this rank's documents; the global losses and KL per token."""
    whole = random_batch(LENGTHS, seed=step)
    batch = whole.select(range(world.rank, len(LENGTHS), world.size)).to(world.device)
    n_tokens = world.sum(float(batch.n_actions))
    rewards = rl.token_rewards(
        batch.rewards, batch.old_logprobs, batch.ref_logprobs, batch.action_mask, kl_coef
    )
    advantages, returns = rl.gae(
        rewards, batch.values, batch.action_mask, batch.lengths, gamma=1.0, lam=0.95
    )
    advantages = rl.whiten(advantages, batch.action_mask, world.sum)
    batch = batch.replace(advantages=advantages, returns=returns)
    parts = [batch.select(group) for group in flat_microbatches(batch, 24)]
    n_parts = int(world.max(float(len(parts))))
    parts += [empty_like(batch)] * (n_parts - len(parts))
    totals = torch.zeros(2)
    for part in parts:
        logprobs, _ = token_logprobs(modules["policy"], part, 1.0, VOCABULARY)
        old = logprobs.detach() + 0.1 * part.old_logprobs  # some ratios are clipped
        policy, _ = rl.policy_loss(logprobs, old, part.advantages, part.action_mask, epsilon=0.2)
        values = token_values(modules["critic"], part)
        value, _ = rl.value_loss(values, part.values, part.returns, part.action_mask, 0.2)
        ((policy + value) / n_tokens).backward()
        totals += torch.stack([policy.detach(), value.detach()])
    kl = rl.kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k1") * batch.action_mask
    return (world.sum(totals) / n_tokens).tolist(), world.sum(kl.sum().item()) / n_tokens


def in_turns(world: World, root: Path) -> list[str]:
    """What both ranks write while they work in turns, and an error of the second one."""
    file = root / "turns.txt"

    def note(text: str) -> None:
        with file.open("a") as opened:
            opened.write(f"{text}\n")

    def work() -> int:
        note(f"begin {world.rank}")
        shard(prepare(wide_model()), world)
        note(f"end {world.rank}")
        return world.rank

    def fail() -> None:
        if world.rank:
            raise UserError("rank 1 has no model")

    assert world.in_turns(work) == world.rank
    try:
        world.in_turns(fail)
    except UserError as error:
        note(f"{world.rank}: {error}")
    world.barrier()
    return sorted(file.read_text().splitlines()[4:]) + file.read_text().splitlines()[:4]


def eight_bit(world: World, root: Path) -> list[Any]:
    """Digests of a run with 8-bit moments and of a resumed one; the losses of the first."""
    unbroken = train(world, root / "eight", 2, optim="adamw_8bit", wide=True)
    train(world, root / "eight-broken", 1, optim="adamw_8bit", wide=True)
    resumed = train(world, root / "eight-broken", 2, optim="adamw_8bit", wide=True)
    return [unbroken.digest, resumed.digest, unbroken.history]


def suite(world: World, root: Path) -> None:
    """Everything the two-rank test wants, in one launch; rank 0 writes result.json."""
    unbroken = train(world, root / "unbroken", 4)
    train(world, root / "broken", 2)
    resumed = train(world, root / "broken", 4)
    half = train(world, root / "half", 2, param_dtype=torch.bfloat16, checkpoint=False)
    whole = train(world, root / "lora", 4, adapted=True)
    train(world, root / "lora_broken", 2, adapted=True)
    resumed_adapter = train(world, root / "lora_broken", 4, adapted=True)
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if each rank were on a node of its own
    hybrid = train(replace(world, mesh=mesh_of("cpu", hsdp=True)), root / "hybrid", 2)
    eight = eight_bit(world, root) if find_spec("torchao") else []
    turns = in_turns(world, root)
    gathered = world.gather({"rank": world.rank})
    if world.is_main:
        result = {
            "lora": [whole.digest, resumed_adapter.digest],
            "lora_history": whole.history,
            "world": [world.size, gathered, world.max(3.0), [unbroken.digest, resumed.digest]],
            "history": unbroken.history,
            "half": half.history,
            "hybrid": [hybrid.mesh, hybrid.history],
            "eight": eight,
            "turns": turns,
        }
        (root / "result.json").write_text(json.dumps(result))
        torch.save(unbroken.weights, root / "weights.pt")
        torch.save(whole.weights, root / "lora_weights.pt")
    else:
        world.max(4.0)


if __name__ == "__main__":
    world = open_world("cpu")
    if sys.argv[2] == "suite":
        suite(world, Path(sys.argv[1]))
    else:
        sys.stdout.write(train(world, Path(sys.argv[1]), int(sys.argv[2])).digest)
    close_world(world)
