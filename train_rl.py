"""Phase 2: online RL that explores by tree search over functional tokens (arXiv 2502.13389).

    python train_rl.py configs/tiny/rl.yaml [key=value …]
    torchrun --nproc_per_node 8 train_rl.py configs/qwen2.5-7b/rl.yaml

Every step explores, scores, learns and looks. One process is one rank with its own engine. Every
rank holds all rollouts of a step and trains on its share of each minibatch, so the number of ranks
does not change the mathematics.
"""

from __future__ import annotations

from rftt.run.config import RLConfig
from rftt.run.front import front

if __name__ == "__main__":  # answers --help and config errors before torch is imported
    front("train_rl", RLConfig)  # runs main() and exits

import asyncio
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, compress, islice

import torch
from torch import Tensor

from rftt import rl
from rftt.batch import Batch, spread_steps
from rftt.engines import build_engine, vocabulary_size
from rftt.engines.chat import open_tokenizer
from rftt.engines.sampler import functional_ids, sampler_of
from rftt.graders import open_prm
from rftt.graders.prm import Unscored, accepted
from rftt.learner import credit
from rftt.learner.fsdp import World, agreed, full_weights, process_group
from rftt.learner.logprobs import token_logprobs, token_values
from rftt.learner.model import score_metrics
from rftt.learner.prefix_tree import n_saved
from rftt.learner.setup import Models, load_models
from rftt.learner.share import pack_own_rollouts
from rftt.rollout import Explorer
from rftt.run.checks import check_prompts, check_warm, greedy_accuracy
from rftt.run.data import endless, read_problems
from rftt.run.judge import Reward
from rftt.run.stats import learned_metrics, nothing_to_learn, rollout_metrics
from rftt.run.training import Run
from rftt.types import Problem, Rollout, seed_for
from rftt.update import Learner, add_logprobs, add_loss_weights

PRINTED = ("accuracy", "reward", "response_length", "kl", "entropy", "clip_share", "search_seconds",
        "train_seconds", "eval/greedy")  # fmt: skip
"""Metrics in the printed line of a step; metrics.jsonl has every key of docs/metrics.md."""


def main(cfg: RLConfig) -> None:
    with process_group(cfg.device, wait=True, hsdp=cfg.hsdp) as world:
        train(cfg, world)


def train(cfg: RLConfig, world: World) -> None:
    problems, eval_problems = read_problems(cfg)
    tokenizer = open_tokenizer(cfg)
    check_prompts(tokenizer, problems + eval_problems, cfg.system_prompt, cfg.max_model_len)
    needs_acts = cfg.sampling_method != "normal" or bool(cfg.forbidden_acts)
    ids = functional_ids(tokenizer, required=needs_acts)
    run = Run(cfg, world, tokenizer, PRINTED)
    n_tokens = vocabulary_size(tokenizer)
    engine = build_engine(cfg, cfg.model_name_or_path, n_tokens, overwritten=True)  # before FSDP
    sampler = sampler_of(cfg, engine, tokenizer, ids, stepwise=cfg.rollout_mode == "stepwise")
    explorer = Explorer(cfg, sampler)
    reward = Reward(cfg, tokenizer, ids, asyncio.run(open_prm(cfg, run.info)))
    models = load_models(cfg, world, engine.n_tokens, ids)
    learner = Learner(cfg, models.trained(), cfg.max_steps, world, run.folder / "debug", run.info)
    if run.is_new:
        check_warm(cfg, sampler, problems[:8])
    run.resume(learner)
    run.require_same_source(problems, tokenizer)
    kl = rl.AdaptiveKL(run.state.get("kl_coef", cfg.kl_coef), cfg.kl_target, cfg.kl_horizon)
    n_taken = run.state.get("problems_taken", 0)
    stream = endless(problems, cfg.seed, skip=n_taken)

    for step in run.steps(cfg.max_steps, cfg.max_generated_tokens):
        # 1. Explore: the newest weights search for solutions.
        engine.wake()
        checksums = world.gather(engine.load_weights(full_weights(models.policy)))
        metrics = {"weights_checksum": agreed(checksums)} | run.clock.lap("sync_seconds")
        if cfg.eval_steps and (run.is_saved(step) or step % cfg.eval_steps == 0):
            metrics["eval/greedy"] = greedy_accuracy(cfg, sampler, eval_problems, world)
            run.rate_if_saved(step, metrics["eval/greedy"])
            metrics |= run.clock.lap("eval_seconds")
        explored, rollouts, n_picked = explore(cfg, step, explorer, reward, stream, run.info, world)
        engine.sleep()  # the learner needs the memory
        metrics |= run.clock.lap("search_seconds")

        # 2. Score: log-probs, values and advantages of every token. Each rank scores its share.
        batch, mine, sizes = pack_own_rollouts(cfg, step, rollouts, world)
        batch = add_logprobs(cfg, models, batch, world)  # old_logprobs, ref_logprobs, values
        batch = add_advantages(cfg, batch, rollouts, mine, kl.coef, world)
        metrics |= score_metrics(batch, world) | run.clock.lap("score_seconds")

        # 3. Learn: a few clipped passes over the same rollouts.
        learner.begin(step)
        for _ in range(cfg.num_ppo_epochs):
            for minibatch in batch.split(sizes):
                minibatch = add_loss_weights(minibatch, cfg, world)
                learner.step(minibatch, partial(rl_loss, cfg, models, kl.coef))
        metrics |= learner.metrics() | run.clock.lap("train_seconds")

        # 4. Look: numbers, examples, a place to resume from.
        n_actions = world.sum(float(batch.n_actions))
        metrics |= rollout_metrics(explored) | learned_metrics(rollouts, n_picked, n_actions)
        metrics["saved_share"] *= n_actions / metrics["tokens_trained"]  # per token, not per action
        metrics["kl_coef"] = kl.coef
        kl = kl.update(metrics.get("kl", 0.0), len(rollouts))
        n_taken += n_picked
        run.state |= {"kl_coef": kl.coef, "problems_taken": n_taken}
        run.log(step, metrics)
        run.write_examples_if_due(step, rollouts, explorer.example)
        run.save_if_due(step)
    run.finish()
    engine.close()


# ---- 1. Explore ----


def explore(
    cfg: RLConfig,
    step: int,
    explorer: Explorer,
    reward: Reward,
    stream: Iterator[Problem],
    log: Callable[[str], None],
    world: World,
) -> tuple[list[Rollout], list[Rollout], int]:
    """Return all rollouts of a step, those to learn from, and the number of problems. Collective.

    Each of `resample_rounds` replaces the problems whose rollouts all have the same reward (DAPO).
    """
    seed = seed_for(cfg.seed, "step", step)

    async def search(problems: list[tuple[int, Problem]]) -> list[Rollout | Unscored]:
        return await reward.score(await explorer.rollouts(problems, seed=seed))

    explored: list[Rollout] = []
    kept: list[Rollout] = []
    new: list[Rollout] = []
    n_picked = 0
    for _ in range(1 + cfg.resample_rounds):
        n_missing = cfg.rollout_batch_size - len({rollout.group for rollout in kept})
        picked = list(enumerate(islice(stream, n_missing), n_picked))  # (group, problem)
        n_picked += n_missing
        share = picked[world.rank :: world.size]  # each rank searches for its own problems
        found = world.gather_or_raise(partial(asyncio.run, search(share)))
        new = accepted(list(chain(*found)), log)
        explored += new
        groups = [rollout.group for rollout in new]
        kept += compress(new, rl.informative([rollout.reward for rollout in new], groups))
    if not kept:
        log(nothing_to_learn(step, explored, n_picked))
    if not cfg.resample_rounds:
        kept = explored  # groups of equal rewards stay: their KL still counts
    if cfg.reward_scheme == "prof":
        kept = credit.prof_keep(kept, cfg.prof_share)
    # If no group is informative, learn from the last round: advantages are 0, only the KL counts.
    return explored, kept or new, n_picked


# ---- 2. Score ----


def add_advantages(
    cfg: RLConfig,
    batch: Batch,
    rollouts: list[Rollout],
    mine: list[int],
    kl_coef: float,
    world: World,
) -> Batch:
    """Add advantages and, for the critic, returns. `mine` are the rollouts in `batch`. Collective.

    Four estimators stand side by side: GAE, whitened returns, rewards relative to a group, and
    values of the nodes that rollouts share.
    """
    mask, lengths, old = batch.action_mask, batch.lengths, batch.old_logprobs
    assert old is not None, "add_logprobs comes first"
    rewards = rl.token_rewards(  # (T,)
        batch.rewards, old, batch.ref_logprobs, batch.drawn, kl_coef
    )
    if cfg.whiten_rewards:  # also rewards on tokens that are not actions
        rewards = rl.whiten(rewards, mask | (rewards != 0), world.sum, shift_mean=False)
    match cfg.advantage_estimator:
        case "ppo":
            assert batch.values is not None, "ppo has a critic"
            advantages, returns = rl.gae(rewards, batch.values, mask, lengths, cfg.gamma, cfg.lam)
            return batch.replace(advantages=rl.whiten(advantages, mask, world.sum), returns=returns)
        case "reinforce++":
            returns = rl.discounted_returns(rewards, mask, lengths, cfg.gamma)
            return batch.replace(advantages=rl.whiten(returns, mask, world.sum))
        case "grpo":  # one number per rollout; its KL is in the loss
            totals = [rollout.reward for rollout in rollouts]
            groups = [(rollout.group, rollout.fork) for rollout in rollouts]
            relative = rl.group_advantages(totals, groups, cfg.scale_rewards)
            return batch.replace(advantages=batch.spread([relative[i] for i in mine]) * mask)
        case "tree":  # one number per step; its KL is in the loss
            of_steps = credit.TREE_ADVANTAGES[cfg.tree_advantage](rollouts)
            own = [rollouts[i] for i in mine]
            spread = spread_steps(own, [of_steps[i] for i in mine]).to(mask.device)  # (T,)
            if cfg.tree_advantage == "spo":  # what has no gain is not trained
                mask = mask & (spread != 0)
                return batch.replace(advantages=spread * mask, action_mask=mask)
            return batch.replace(advantages=rl.whiten(spread, mask, world.sum))


# ---- 3. Learn ----


def rl_loss(
    cfg: RLConfig, models: Models, kl_coef: float, micro: Batch
) -> tuple[Tensor, rl.Metrics]:
    """Return the clipped policy loss, plus KL, entropy and value terms, summed over tokens."""
    mask, old, advantages = micro.action_mask, micro.old_logprobs, micro.advantages
    assert old is not None, "add_logprobs comes first"
    assert advantages is not None, "add_advantages comes first"
    logprobs, entropy = token_logprobs(  # (T,), (T,)
        models.policy, micro, cfg.temperature, models.vocabulary, with_entropy=True
    )
    assert entropy is not None, "with_entropy returns it"
    token_weights = micro.loss_weights  # (T,)
    if token_weights is None:  # every action token counts the same
        token_weights = mask.float()
    cap = cfg.importance_cap or math.inf
    ratios, metrics = rl.importance_weights(old, micro.sampling_logprobs, mask, cap)
    weights = token_weights
    if cfg.importance_cap:  # corrects the difference between engine and trainer
        weights = ratios * weights
    if cfg.forced_actions == "weigh" and micro.branching is not None:
        weights = weights * rl.enumeration_weights(old, micro.branching)
    loss, clipping = rl.policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        epsilon=cfg.epsilon,
        epsilon_high=cfg.epsilon_high,
        dual_clip=cfg.dual_clip,
        weights=weights,
    )
    metrics |= clipping | {"policy_loss": loss.detach(), "entropy": entropy.detach().sum()}
    metrics["saved_share"] = torch.tensor(float(n_saved(micro)))
    if cfg.advantage_estimator in ("grpo", "tree") and micro.ref_logprobs is not None:
        # The other estimators pay the KL as a reward; these differentiate through it.
        penalty = rl.kl_estimate(logprobs, micro.ref_logprobs, cfg.kl_estimator) * token_weights
        loss = loss + kl_coef * torch.where(micro.drawn, penalty, 0.0).sum()
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * (entropy * token_weights).sum()
    if models.critic and micro.values is not None and micro.returns is not None:
        values = token_values(models.critic, micro)  # (T,)
        critic_loss, clip = rl.value_loss(values, micro.values, micro.returns, mask, cfg.value_clip)
        metrics |= clip | {"value_loss": critic_loss.detach()}
        loss = loss + critic_loss  # policy and critic share no weights
    return loss, metrics
