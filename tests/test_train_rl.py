"""Test train_rl.py on a tiny model: what is learnt does not depend on the packing."""

from random import Random
from typing import Literal

import pytest
import torch
from torch import Tensor

from rftt.batch import collate
from rftt.learner.fsdp import Totals, deal, equal_count
from rftt.learner.model import Critic, prepare, score_metrics
from rftt.learner.prefix_tree import n_saved, tree_microbatches
from rftt.learner.setup import Models
from rftt.run.config import RLConfig
from rftt.types import Problem, Rollout
from rftt.update import add_logprobs
from tests.learners import VOCABULARY, tiny_model
from tests.test_update import Ranks
from train_rl import add_advantages, rl_loss

Estimator = Literal["ppo", "reinforce++", "grpo"]


def tree_of_rollouts(*, mask_forced: bool) -> list[Rollout]:
    """Three problems of five paths: a common system prompt, two stems, forced openers, a twin."""
    random, rollouts = Random(3), []

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(random.randrange(VOCABULARY) for _ in range(n))

    system = tokens(3)
    for group in range(3):
        prompt, stems = system + tokens(4), [tokens(6), tokens(6)]
        responses = [stems[i % 2] + tokens(2 + 3 * i) for i in range(4)]
        for response in [*responses, responses[-1]]:
            forced = tuple(i in (0, 6) for i in range(len(response)))
            rollouts.append(
                Rollout(
                    problem=Problem(f"p{group}", "?"),
                    prompt_ids=prompt,
                    response_ids=response,
                    sampling_logprobs=tuple(-4 * random.random() for _ in response),
                    action_mask=tuple(not (mask_forced and opener) for opener in forced),
                    forced=forced,
                    branching=tuple(2.5 * opener for opener in forced),
                    step_ends=(5, len(response) - 1),
                    acts=("analysis", "output"),
                    finish="stop",
                    group=group,
                    n_generated=len(response),
                    step_rewards=(0.1, random.random()),
                )
            )
    return rollouts


def learn(
    packing: Literal["flat", "tree"],
    estimator: Estimator,
    forced: Literal["keep", "weigh", "mask"],
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], dict[str, float]]:
    """Scores, advantages and summed gradients of one minibatch in microbatches, and its metrics."""
    cfg = RLConfig(
        model_name_or_path="", output_dir="", train_file="", learning_rate=1.0, packing=packing,
        advantage_estimator=estimator, forced_actions=forced, kl_coef=0.1, entropy_coef=0.01,
        max_tokens_per_microbatch=64,
    )  # fmt: skip
    rollouts, world, totals = tree_of_rollouts(mask_forced=forced == "mask"), Ranks(), Totals()
    policy, reference = prepare(tiny_model()), prepare(tiny_model(seed=1))
    critic = Critic(prepare(tiny_model(seed=2)).model) if estimator == "ppo" else None
    modules = [policy, reference, *([critic] if critic else [])]
    if critic:
        torch.nn.init.ones_(critic.head.weight)
    for module in modules:
        module.to(dtype)
    models = Models(policy, reference, critic, VOCABULARY)
    (order,) = deal([len(r.response_ids) for r in rollouts], 1, seed=0, world=world)
    batch = collate([rollouts[i] for i in order], packs_prefixes=packing == "tree")
    batch = add_logprobs(cfg, models, batch, world)
    batch = add_advantages(cfg, batch, rollouts, order, cfg.kl_coef, world)
    for group in equal_count(batch, cfg.max_tokens_per_microbatch, world):
        loss, metrics = rl_loss(cfg, models, cfg.kl_coef, batch.select(group))
        loss.backward()
        totals.add(metrics)
    scores = [batch.old_logprobs, batch.ref_logprobs, batch.values, batch.advantages, batch.returns]
    gradients = [p.grad for module in modules for p in module.parameters()]
    found = [x for x in (*scores, *gradients) if x is not None]
    return found, totals.reduce(world, per=1) | score_metrics(batch, world)


@pytest.mark.invariant
@pytest.mark.parametrize("forced", ["keep", "weigh", "mask"])
@pytest.mark.parametrize("estimator", ["ppo", "reinforce++", "grpo"])
def test_tree_packing_learns_what_flat_packing_learns(
    estimator: Estimator, forced: Literal["keep", "weigh", "mask"]
) -> None:
    """Policy, reference and critic: log-probs, values, loss, every gradient, in microbatches."""
    (flat, metrics), (tree, others) = (learn(p, estimator, forced) for p in ("flat", "tree"))
    assert len(flat) > 20
    for one, other in zip(flat, tree, strict=True):
        scale = max(1.0, one.abs().max().item())
        torch.testing.assert_close(one, other, atol=1e-5 * scale, rtol=1e-5)
    assert metrics.pop("saved_share") == 0
    assert others.pop("saved_share") > 100  # tokens: these totals are not divided
    assert others == pytest.approx(metrics, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("estimator", ["reinforce++", "grpo"])
def test_the_kl_leaves_out_openers_that_the_tree_forced(estimator: Estimator) -> None:
    """They are no samples of the policy: their k1 and k3 estimate nothing (penalty and metric)."""
    cfg = RLConfig(
        model_name_or_path="", output_dir="", train_file="", kl_coef=0.1, learning_rate=1.0,
        advantage_estimator=estimator, importance_cap=None,
    )  # fmt: skip
    rollouts, world = tree_of_rollouts(mask_forced=False), Ranks()
    policy, reference = prepare(tiny_model()), prepare(tiny_model(seed=1))
    models = Models(policy, reference, None, VOCABULARY)
    scored = add_logprobs(cfg, models, collate(rollouts), world)
    assert scored.ref_logprobs is not None
    assert scored.forced is not None
    far = scored.replace(ref_logprobs=scored.ref_logprobs - 30.0 * scored.forced)
    results = []
    for batch in (scored, far):
        batch = add_advantages(cfg, batch, rollouts, list(range(len(rollouts))), 0.1, world)
        loss, _ = rl_loss(cfg, models, 0.1, batch)
        results.append((loss.item(), score_metrics(batch, world)["kl"]))
    assert results[0] == pytest.approx(results[1])


def test_a_problem_stays_in_one_microbatch_where_it_fits() -> None:
    rollouts = tree_of_rollouts(mask_forced=False)
    whole = collate(rollouts, packs_prefixes=True)
    order = deal([1] * len(rollouts), 1, seed=0, world=Ranks())[0]
    batch = whole.select(order)
    for budget in (60, 64, 90):
        problems = [{order[i] // 5 for i in part} for part in tree_microbatches(batch, budget)]
        assert sum(map(len, problems)) == 3  # each problem is in one of them
    small = tree_microbatches(batch, 30)
    assert sorted(i for part in small for i in part) == list(range(len(rollouts)))
    assert len(small) > 3
    assert n_saved(whole) == sum(whole.lengths) - len(set(prefixes(rollouts)))


def prefixes(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    paths = [rollout.prompt_ids + rollout.response_ids for rollout in rollouts]
    return [path[: n + 1] for path in paths for n in range(len(path))]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_groups_stay_on_one_rank_but_for_one_cut_per_rank(size: int) -> None:
    sizes = [Random(i).randrange(20, 60) for i in range(64)]
    groups = [i // 8 for i in range(64)]
    shares = [deal(sizes, 2, 4, Ranks(rank, size), groups) for rank in range(size)]
    alone = deal(sizes, 2, 4, Ranks())
    for minibatch, expected in zip(zip(*shares, strict=True), alone, strict=True):
        assert sorted(i for share in minibatch for i in share) == sorted(expected)
        pieces = sum(len({groups[i] for i in share}) for share in minibatch)
        assert pieces <= 8 + size - 1
        tokens = [sum(sizes[i] for i in share) for share in minibatch]
        assert max(tokens) - min(tokens) <= 2 * 60


def test_a_batch_without_documents_has_no_tree() -> None:
    batch = collate(tree_of_rollouts(mask_forced=False), packs_prefixes=True).select([])
    assert tree_microbatches(batch, 10) == []
