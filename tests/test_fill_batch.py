"""Test exploration in train_rl.py: problems with equal rewards are replaced by new ones."""

import asyncio

import pytest

import train_rl
from rftt.run.config import RLConfig
from rftt.types import Problem, Rollout
from tests.test_update import Ranks


def config(**changes: object) -> RLConfig:
    return RLConfig(
        output_dir="", model_name_or_path="", train_file="", learning_rate=1.0,
        rollout_batch_size=2, num_generations=2, train_batch_size=4, **changes,
    )  # fmt: skip


def filled(monkeypatch, rewards, **changes):
    """(groups explored, groups learned from, problems drawn, what was said)."""

    async def explore(cfg, policy, problems, trees):
        await asyncio.sleep(0)
        return [
            Rollout(
                problem=problem,
                prompt_ids=(1,),
                response_ids=(2,),
                sampling_logprobs=(0.0,),
                action_mask=(True,),
                step_ends=(0,),
                step_rewards=(reward,),
                outcome=0.0,
                finish="stop",
                acts=("output",),
                n_generated=1,
                group=group,
            )
            for group, problem in problems
            for reward in rewards[int(problem.id)]
        ]

    monkeypatch.setattr(train_rl, "explore", explore)
    stream = (Problem(id=str(i), question="?", answer="1") for i in range(99))
    said = []
    explored, kept, n = train_rl.fill_batch(
        config(**changes), 12, None, stream, Ranks(), None, list, said.append
    )
    assert next(stream).id == str(n)  # the next step, resumed or not, begins there
    return sorted({r.group for r in explored}), sorted({r.group for r in kept}), n, said


EQUAL, MIXED = (0.1, 0.1), (0.1, 1.0)


def test_without_resampling_every_group_is_learned_from(monkeypatch) -> None:
    assert filled(monkeypatch, [EQUAL, MIXED]) == ([0, 1], [0, 1], 2, [])


def test_equal_groups_are_replaced_up_to_a_bound(monkeypatch) -> None:
    found = filled(monkeypatch, [EQUAL, MIXED, EQUAL, MIXED], resample_rounds=3)
    assert found == ([0, 1, 2, 3], [1, 3], 4, [])
    found = filled(monkeypatch, [EQUAL, MIXED, EQUAL, MIXED], resample_rounds=1)
    assert found == ([0, 1, 2], [1], 3, [])


@pytest.mark.parametrize("rounds", [0, 1])
def test_nothing_to_learn_is_said(monkeypatch, rounds: int) -> None:
    explored, kept, n, said = filled(monkeypatch, [EQUAL] * 4, resample_rounds=rounds)
    assert (len(explored), len(kept), n) == (2 + 2 * rounds, 2, 2 + 2 * rounds)
    assert said[0].startswith(
        f"step 12: all {n} groups have equal rewards; nothing to learn (solve rate 0.00)."
    )
