"""Phase 2: online RL that explores by tree search over functional tokens (arXiv 2502.13389).

    python train_rl.py configs/tiny/rl.yaml [key=value …]
    torchrun --nproc_per_node 8 train_rl.py configs/qwen2.5-7b/rl.yaml

Every step: 1. explore, the newest weights search for solutions; 2. score, how good was every token;
3. learn, a few clipped passes over the same rollouts; 4. look, numbers, examples and a place to
resume from. One process is one rank with an engine of its own. Every rank sees all rollouts of a
step and trains on its share of each minibatch: the number of ranks does not change the mathematics.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rftt.engines.base import for_each
from rftt.engines.chat import load_tokenizer
from rftt.run.checks import greedy_accuracy
from rftt.run.cli import STOPPED, cli, stop_on_sigterm
from rftt.run.config import RLConfig
from rftt.run.data import read_problems, shuffled_epochs
from rftt.run.files import write_json, write_jsonl
from rftt.run.stats import tree_record
from rftt.tokens import function_ids, has_function_tokens
from rftt.types import Problem, Rollout, seed_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from rftt.batch import Batch
    from rftt.learner.fsdp import Totals, World
    from rftt.rollout import Learned

LINE = ("accuracy", "reward", "response_length", "kl", "entropy", "clip_share", "search_seconds",
        "train_seconds", "eval/greedy")  # fmt: skip
"""What the line of a step shows; metrics.jsonl has every key of docs/metrics.md."""


def main(cfg: RLConfig) -> None:
    # Heavy imports wait until the config is known to be good.
    from rftt.learner.fsdp import joined

    with joined(cfg.device, wait=True) as world:
        train(cfg, world)


def train(cfg: RLConfig, world: World) -> None:
    from rftt.batch import collate
    from rftt.engines import build_engine
    from rftt.graders import open_prm
    from rftt.learner.checkpoint import export_hf, restore
    from rftt.learner.fsdp import Totals, agreed, deal, full_weights
    from rftt.learner.guard import Guard
    from rftt.learner.model import critic_metrics
    from rftt.learner.optim import lr_at
    from rftt.learner.setup import build_models, checkpoint_to_resume, checkpoints_of
    from rftt.rewards import reward
    from rftt.rl import AdaptiveKL
    from rftt.rollout import speaker
    from rftt.run.checks import check_prompts, check_warm
    from rftt.run.log import Clock, RunLog
    from rftt.run.stats import examples, learned_metrics, rollout_metrics
    from rftt.update import score_tokens, update, weigh

    out = Path(cfg.output_dir)
    checkpoint = checkpoint_to_resume(cfg, world, cfg.resume_from_checkpoint)
    problems, eval_problems = read_problems(cfg)
    tokenizer = load_tokenizer(cfg.model_name_or_path, trust_remote_code=cfg.trust_remote_code)
    check_prompts(tokenizer, problems + eval_problems, cfg.system_prompt, cfg.max_model_len)
    speaks = cfg.sampling_method == "mcts" or cfg.forbidden_acts or has_function_tokens(tokenizer)
    ids, vocabulary = function_ids(tokenizer) if speaks else None, len(tokenizer)
    log = RunLog(out, asdict(cfg), enabled=world.is_main, report_to=cfg.report_to)
    engine = build_engine(cfg, cfg.model_name_or_path, vocabulary)  # before FSDP takes the device
    prm = asyncio.run(open_prm(cfg, log.info))
    pay = partial(reward, cfg, tokenizer, ids, prm, world.gather, log.info)
    models, modules, optimizers, peaks = build_models(cfg, world)
    policy = speaker(cfg, engine, tokenizer, ids, stepwise=cfg.rollout_mode == "stepwise")
    past = restore(checkpoint, modules, optimizers) if checkpoint else {}
    if not past and cfg.sampling_method == "mcts" and not cfg.allow_cold_start:
        asyncio.run(check_warm(policy, problems[:8], cfg.system_prompt))
    kl = AdaptiveKL(past.get("kl_coef", cfg.kl_coef), cfg.kl_target or math.inf, cfg.kl_horizon)
    first_step, taken = past.get("step", 0), past.get("problems_taken", 0)
    spent, budget = past.get("tokens_generated", 0.0), cfg.max_generated_tokens or math.inf
    checkpoints = checkpoints_of(cfg, world, tokenizer, past)
    log.rewind(first_step)
    guard, stop = Guard(out / "debug", modules, world, log.info), stop_on_sigterm()
    stream = (problems[i] for i in islice(shuffled_epochs(len(problems), cfg.seed), taken, None))

    for step in range(first_step, cfg.max_steps):
        if spent >= budget:
            break
        clock, scored, learned, norms = Clock(), Totals(), Totals(), dict[str, float]()
        due = bool(cfg.save_steps) and (step + 1) % cfg.save_steps == 0

        # 1. Explore: the newest weights search for solutions.
        engine.wake()
        held = engine.load_weights(full_weights(models["policy"]))
        metrics = {"weights_checksum": agreed(world.gather(held))} | clock.lap("sync_seconds")
        saved = bool(cfg.save_steps and step) and step % cfg.save_steps == 0
        if cfg.eval_steps and (saved or step % cfg.eval_steps == 0):
            accuracy = greedy_accuracy(cfg, policy, eval_problems, world)
            metrics |= {"eval/greedy": accuracy} | clock.lap("eval_seconds")
            if saved:
                checkpoints.rate(step, accuracy)
        explorer = replace(policy, seed=seed_for(cfg.seed, "step", step))
        trees = out / "trees" / f"step_{step:06d}" if due and world.is_main else None
        explored, rollouts, n = fill_batch(cfg, step, explorer, stream, world, trees, pay, log.info)
        engine.sleep()
        taken += n
        metrics |= clock.lap("search_seconds")

        # 2. Score: how good was every token?
        n_minibatches = max(1, round(len(rollouts) / cfg.train_batch_size))
        sizes = [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
        tree = cfg.packing == "tree"
        groups = [rollout.group for rollout in rollouts] if tree else None
        minibatches = deal(sizes, n_minibatches, seed_for(cfg.seed, "deal", step), world, groups)
        own = [i for minibatch in minibatches for i in minibatch]
        batch = collate(
            [rollouts[i] for i in own], mask_truncated=cfg.mask_truncated_completions, tree=tree
        ).to(world.device)
        n_tokens = world.sum(float(batch.n_actions))
        batch = score_tokens(cfg, models, batch, vocabulary, world, scored)
        advantages, returns = estimate_advantages(cfg, batch, rollouts, own, kl.coef, world)
        batch = batch.replace(advantages=advantages, returns=returns)
        metrics |= critic_metrics(batch.values, returns, batch.action_mask, world.sum)
        metrics |= scored.reduce(world, per=n_tokens) | clock.lap("score_seconds")

        # 3. Learn: a few clipped passes over the same rollouts.
        rates = {name: lr_at(cfg, peak, step, cfg.max_steps) for name, peak in peaks.items()}
        guard.skipped, learn = 0, partial(rl_loss, cfg, models, vocabulary, kl.coef)
        for _ in range(cfg.num_ppo_epochs):
            place = 0
            for minibatch in minibatches:
                part = batch.select(range(place, place := place + len(minibatch)))
                part = weigh(part, cfg, world)
                names = [rollouts[i].problem.id for i in minibatch]
                norms = update(
                    modules, optimizers, rates, part, partial(learn, learned), cfg, world
                )
                guard.check(norms, step, part, names, partial(learn, Totals()))
        metrics |= learned.reduce(world, per=n_tokens * cfg.num_ppo_epochs)
        metrics |= clock.lap("train_seconds")

        # 4. Look: numbers, examples, a place to resume from.
        metrics |= rollout_metrics(explored) | learned_metrics(rollouts, n, n_tokens)
        metrics["saved_share"] *= n_tokens / metrics["tokens_trained"]  # per token, not per action
        metrics |= {"grad_norm": norms["policy"], "updates_skipped": float(guard.skipped)}
        metrics |= {"kl_coef": kl.coef, "learning_rate": rates["policy"]}
        kl = kl.update(metrics.get("kl", 0.0), len(rollouts))
        spent += metrics["tokens_generated"]
        log.step(step, metrics, LINE, total=cfg.max_steps)
        if due and world.is_main:
            write_jsonl(out / "samples" / f"step_{step:06d}.jsonl", examples(rollouts, tokenizer))
        stopped = world.max(float(stop.is_set())) > 0
        if due or stopped or step + 1 == cfg.max_steps or spent >= budget:
            extra = {"kl_coef": kl.coef, "tokens_generated": spent, "problems_taken": taken}
            checkpoints.save(step + 1, modules, optimizers, extra)
        if stopped:
            checkpoints.close()
            raise SystemExit(STOPPED)
    checkpoints.close()
    export_hf(models["policy"], tokenizer, out / "hf", world, cfg.dtype)
    world.barrier()
    engine.close()
    log.info(f"model in {out / 'hf'}")


# ---- 1. Explore ----


def fill_batch(
    cfg: RLConfig,
    step: int,
    policy: Learned,
    stream: Iterator[Problem],
    world: World,
    trees: Path | None,
    pay: Callable[[list[Rollout]], list[Rollout]],
    say: Callable[[str], None],
) -> tuple[list[Rollout], list[Rollout], int]:
    """All rollouts of a step, those to learn from, and how many problems were picked. Collective.

    Each of `resample_rounds` replaces the problems whose rollouts all earned the same.
    """
    from rftt.rl import informative

    explored: list[Rollout] = []
    new: list[Rollout] = []
    kept: list[Rollout] = []
    n_picked = 0
    for _ in range(1 + cfg.resample_rounds):
        n_missing = cfg.rollout_batch_size - len({rollout.group for rollout in kept})
        picked = list(enumerate(islice(stream, n_missing), n_picked))
        n_picked += n_missing
        new = pay(asyncio.run(explore(cfg, policy, picked[world.rank :: world.size], trees)))
        rewards = [sum(rollout.step_rewards) for rollout in new]
        differ = informative(rewards, [rollout.group for rollout in new])
        kept += [rollout for rollout, keep in zip(new, differ, strict=True) if keep]
        explored += new
    if not kept:
        solved = sum(rollout.outcome for rollout in explored) / len(explored)
        say(
            f"step {step}: all {n_picked} groups have equal rewards; nothing to learn (solve rate "
            f"{solved:.2f}). Too easy, too hard, or answers that do not parse: read samples/."
        )
    return explored, (kept or new) if cfg.resample_rounds else explored, n_picked


async def explore(
    cfg: RLConfig, policy: Learned, problems: list[tuple[int, Problem]], trees: Path | None
) -> list[Rollout]:
    """Rollouts of every (group, problem)."""
    from rftt.rollout import encode_question, learned_tree, sample, tree_rollouts

    async def one(item: tuple[int, Problem]) -> list[Rollout]:
        group, problem = item
        own = replace(policy, seed=seed_for(policy.seed, group))  # a problem may come twice
        prompt = encode_question(own, problem, cfg.system_prompt)
        if cfg.sampling_method == "normal":
            return await sample(own, problem, prompt, n=cfg.num_generations, group=group)
        tree = await learned_tree(
            own,
            problem,
            prompt,
            simulations=cfg.num_generations,
            exploration_weight=cfg.exploration_weight,
            in_flight=cfg.leaves_in_flight,
        )
        if trees and group == 0:
            write_json(trees / "0.json", tree_record(tree, problem, policy.tokenizer))
        mask_forced = cfg.forced_actions == "mask"
        return tree_rollouts(policy, tree, problem, prompt, group=group, mask_forced=mask_forced)

    return list(chain(*await for_each(problems, one, in_flight=max(1, len(problems)))))


# ---- 2. Score ----


def estimate_advantages(
    cfg: RLConfig,
    batch: Batch,
    rollouts: list[Rollout],
    own: list[int],
    kl_coef: float,
    world: World,
) -> tuple[Tensor, Tensor | None]:
    """(T,) advantages and, for the critic, returns. Three estimators side by side."""
    from rftt.rl import discounted_returns, gae, group_advantages, token_rewards, whiten

    mask, lengths, old, values = batch.action_mask, batch.lengths, batch.old_logprobs, batch.values
    assert old is not None, "score_tokens comes first"
    rewards = token_rewards(batch.rewards, old, batch.ref_logprobs, mask, kl_coef)
    if cfg.whiten_rewards:  # also those on tokens that are no actions
        rewards = whiten(rewards, mask | (rewards != 0), world.sum, shift_mean=False)
    match cfg.advantage_estimator:
        case "ppo":
            assert values is not None, "ppo has a critic"
            advantages, returns = gae(rewards, values, mask, lengths, cfg.gamma, cfg.lam)
            return whiten(advantages, mask, world.sum), returns
        case "reinforce++":
            returns = discounted_returns(rewards, mask, lengths, cfg.gamma)
            return whiten(returns, mask, world.sum), None
        case "grpo":  # one number per rollout; its KL is in the loss
            totals = [sum(rollout.step_rewards) for rollout in rollouts]
            groups = [rollout.group for rollout in rollouts]
            relative = group_advantages(totals, groups, cfg.scale_rewards)
            return batch.spread([relative[i] for i in own]) * mask, None


# ---- 3. Learn ----


def rl_loss(
    cfg: RLConfig,
    models: dict[str, Any],
    vocabulary: int,
    kl_coef: float,
    totals: Totals,
    micro: Batch,
) -> Tensor:
    """Clipped policy loss and what the estimator adds: KL, entropy, value. Summed over tokens."""
    import torch

    from rftt.learner.logprobs import token_logprobs, token_values
    from rftt.learner.prefix_tree import n_saved
    from rftt.rl import importance_weights, kl_estimate, policy_loss, value_loss

    mask, old, advantages = micro.action_mask, micro.old_logprobs, micro.advantages
    assert old is not None, "score_tokens comes first"
    assert advantages is not None, "estimate_advantages comes first"
    logprobs, entropy = token_logprobs(
        models["policy"], micro, cfg.temperature, vocabulary, with_entropy=True
    )
    assert entropy is not None, "it was asked for"
    weights, mismatch = importance_weights(
        old, micro.sampling_logprobs, mask, cfg.importance_cap or math.inf
    )
    per_token = mask.float() if micro.loss_weights is None else micro.loss_weights
    weights = weights * per_token if cfg.importance_cap else per_token
    if cfg.forced_actions == "weigh" and micro.forced is not None:
        # The tree takes an act with certainty, the policy with probability π: with this weight,
        # trying every act once is the policy gradient summed over the acts.
        weights = torch.where(micro.forced, weights * old.exp(), weights)
    loss, clipping = policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        epsilon=cfg.epsilon,
        epsilon_high=cfg.epsilon_high,
        dual_clip=cfg.dual_clip,
        weights=weights,
    )
    totals.add(mismatch | clipping | {"policy_loss": loss, "entropy": entropy.sum()})
    totals.add({"saved_share": float(n_saved(micro))})
    if cfg.advantage_estimator == "grpo" and micro.ref_logprobs is not None:
        penalty = kl_estimate(logprobs, micro.ref_logprobs, cfg.kl_estimator) * per_token
        loss = loss + kl_coef * penalty.sum()
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * (entropy * per_token).sum()
    if micro.values is not None and micro.returns is not None:
        values = token_values(models["critic"], micro)
        critic_loss, clipping = value_loss(
            values, micro.values, micro.returns, mask, cfg.value_clip
        )
        totals.add(clipping | {"value_loss": critic_loss})
        loss = loss + critic_loss
    return loss


if __name__ == "__main__":
    cli(main, RLConfig)
