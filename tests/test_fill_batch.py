"""Test exploration in train_rl.py: problems with equal rewards are replaced by new ones."""

from dataclasses import dataclass

import pytest

from rftt.run.config import RLConfig
from rftt.types import Problem, Rollout
from tests.test_update import Ranks
from train_rl import explore


def config(**changes: object) -> RLConfig:
    return RLConfig(
        output_dir="", model_name_or_path="", train_file="", learning_rate=1.0,
        rollout_batch_size=2, num_generations=2, train_batch_size=4, **changes,
    )  # fmt: skip


@dataclass
class Explorer:
    """Rollouts with the rewards of a table, by problem."""

    rewards: list[tuple[float, float]]

    async def rollouts(self, problems, *, seed):
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
            for reward in self.rewards[int(problem.id)]
        ]


class Known:
    """A reward that keeps the rewards which rollouts already have."""

    async def score(self, rollouts):
        return rollouts


def filled(rewards, **changes):
    """(groups explored, groups learned from, problems drawn, what was logged)."""
    stream = (Problem(id=str(i), question="?", answer="1") for i in range(99))
    said = []
    explored, kept, n = explore(
        config(**changes), 12, Explorer(rewards), Known(), stream, said.append, Ranks()
    )
    assert next(stream).id == str(n)  # the next step, resumed or not, begins there
    return sorted({r.group for r in explored}), sorted({r.group for r in kept}), n, said


EQUAL, MIXED = (0.1, 0.1), (0.1, 1.0)


def test_without_resampling_every_group_is_learned_from() -> None:
    assert filled([EQUAL, MIXED]) == ([0, 1], [0, 1], 2, [])


def test_equal_groups_are_replaced_up_to_a_bound() -> None:
    found = filled([EQUAL, MIXED, EQUAL, MIXED], resample_rounds=3)
    assert found == ([0, 1, 2, 3], [1, 3], 4, [])
    found = filled([EQUAL, MIXED, EQUAL, MIXED], resample_rounds=1)
    assert found == ([0, 1, 2], [1], 3, [])


@pytest.mark.parametrize("rounds", [0, 1])
def test_nothing_to_learn_is_said(rounds: int) -> None:
    explored, kept, n, said = filled([EQUAL] * 4, resample_rounds=rounds)
    assert (len(explored), len(kept), n) == (2 + 2 * rounds, 2, 2 + 2 * rounds)
    assert said[0].startswith(
        f"step 12: all {n} groups have equal rewards; nothing to learn (solve rate 0.00)."
    )
