"""Test batch.py: where each token of a rollout lands, and that splitting loses none."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rftt.batch import collate
from rftt.learner.fsdp import empty_like, flat_microbatches
from rftt.learner.offline import collate_rows
from rftt.types import Problem, Rollout, UserError
from tests.learners import random_batch

ROLLOUT = Rollout(
    problem=Problem("p1", "?"),
    prompt_ids=(11, 12),
    response_ids=(21, 22, 23),
    sampling_logprobs=(-0.1, -0.2, -0.3),
    action_mask=(False, True, True),
    step_ends=(1, 2),
    acts=("analysis", "output"),
    finish="stop",
    group=0,
    n_generated=3,
    step_rewards=(0.5, 1.0),
)
SHORT = replace(
    ROLLOUT, response_ids=(31,), sampling_logprobs=(-0.9,), action_mask=(True,), step_ends=(0,),
    step_rewards=(0.25,), finish="length",
)  # fmt: skip


def test_collate_aligns_every_token() -> None:
    batch = collate([ROLLOUT, SHORT])
    assert batch.lengths == (5, 3)
    assert batch.input_ids.tolist() == [11, 12, 21, 22, 23, 11, 12, 31]
    assert batch.action_mask.tolist() == [0, 0, 0, 1, 1, 0, 0, 1]
    assert batch.rewards.tolist() == [0, 0, 0, 0.5, 1.0, 0, 0, 0.25]
    expected = torch.tensor([0, 0, -0.1, -0.2, -0.3, 0, 0, -0.9])
    torch.testing.assert_close(batch.sampling_logprobs, expected)
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.document.tolist() == [0] * 5 + [1] * 3
    assert batch.n_actions == 3


def test_collate_can_leave_out_truncated_responses() -> None:
    assert collate([ROLLOUT, SHORT], mask_truncated=True).n_actions == 2


@pytest.mark.parametrize(
    "bad", [{"prompt_ids": ()}, {"step_rewards": ()}, {"action_mask": (True,)}]
)
def test_collate_names_the_bad_rollout(bad: dict) -> None:
    with pytest.raises(UserError, match="p1"):
        collate([ROLLOUT, replace(ROLLOUT, **bad)])


def test_rows_train_on_their_masked_response_only() -> None:
    batch = collate_rows([((1, 2), (3, 4), (True, False)), ((5,), (6,), (True,))])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.action_mask.tolist() == [0, 0, 1, 0, 0, 1]


@pytest.mark.invariant
@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.integers(4, 60))
def test_microbatches_split_without_loss(lengths: list[int], budget: int) -> None:
    batch = random_batch(lengths)
    groups = flat_microbatches(batch, budget)
    assert sorted(document for group in groups for document in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[document] for document in group) <= budget
    for group in groups:
        part, at = batch.select(group), 0
        assert part.lengths == tuple(lengths[document] for document in group)
        for document in group:
            here, there = slice(at, at + lengths[document]), int(batch.starts[document])
            whole = slice(there, there + lengths[document])
            at = here.stop
            assert torch.equal(part.input_ids[here], batch.input_ids[whole])
            assert torch.equal(part.action_mask[here], batch.action_mask[whole])
            assert torch.equal(part.advantages[here], batch.advantages[whole])


def test_spread_puts_a_documents_number_on_its_tokens() -> None:
    batch = random_batch([2, 3])
    assert batch.spread([0.5, -1.0]).tolist() == [0.5, 0.5, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("documents", [[0, 1, 2], []], ids=["of three", "of none"])
def test_empty_like_has_no_actions(documents: list[int]) -> None:
    empty = empty_like(random_batch([7, 3, 5]).select(documents))
    assert empty.lengths == (2,)
    assert empty.n_actions == 0
