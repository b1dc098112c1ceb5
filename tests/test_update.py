"""Test how a batch is dealt to ranks and microbatches, and how metrics are summed."""

from dataclasses import dataclass

import pytest
import torch

from rftt.learner.fsdp import Totals, deal, equal_count, per_token
from rftt.learner.offline import collate_rows
from rftt.rl import document_sums, gae, sequence_weights, whiten
from rftt.run.config import RLConfig
from rftt.update import add_loss_weights


@dataclass
class Ranks:
    """One rank among `size` that hears `others` from the rest."""

    rank: int = 0
    size: int = 1
    others: float = 0.0

    def sum(self, x):
        return x + self.others

    def max(self, x):
        return max(x, self.others)

    def gather_or_raise(self, work):
        return [work()]


def batch_of(lengths):
    return collate_rows([([1] * 2, [5] * (n - 2), [True] * (n - 2)) for n in lengths])


@pytest.mark.invariant
@pytest.mark.parametrize("size", [1, 2, 3])
def test_minibatches_do_not_depend_on_the_number_of_ranks(size):
    sizes = [5, 9, 3, 7, 7, 2, 8]
    dealt = [deal(sizes, 3, seed=4, world=Ranks(rank, size)) for rank in range(size)]
    together = [sorted(i for share in shares for i in share) for shares in zip(*dealt, strict=True)]
    alone = [sorted(minibatch) for minibatch in deal(sizes, 3, seed=4, world=Ranks())]
    assert together == alone
    assert sorted(sum(alone, start=[])) == list(range(len(sizes)))  # noqa: RUF017
    assert max(map(len, alone)) - min(map(len, alone)) <= 1


@pytest.mark.invariant
def test_all_ranks_run_as_many_microbatches():
    groups = equal_count(batch_of([8, 8, 8]), 8, Ranks(others=5.0))
    assert len(groups) == 5
    assert groups[3:] == [[], []]


def test_per_token_puts_every_value_back_in_its_place():
    batch = batch_of([6, 3, 9, 4])
    found = per_token(lambda micro: micro.position_ids.float(), batch, 10, Ranks())
    assert torch.equal(found, batch.position_ids.float())


def test_a_rank_without_documents_still_runs_its_forwards():
    calls = []
    empty = batch_of([4]).select([])

    def function(micro):
        calls.append(micro.n_actions)
        return micro.rewards

    assert len(per_token(function, empty, 10, Ranks(others=2.0))) == 0
    assert calls == [0, 0]


def test_the_mathematics_of_a_rank_without_documents_is_empty():
    """Resampling, pairs held out, the last lot of references: fewer documents than ranks."""
    none = batch_of([4]).select([])
    x, mask, lengths = none.rewards, none.action_mask, none.lengths
    assert none.position_ids.tolist() == none.spread([]).tolist() == []
    for advantages in (*gae(x, x, mask, lengths, 1.0, 0.95), whiten(x, mask, lambda x: x)):
        assert advantages.tolist() == []
    assert document_sums(x, mask, lengths).tolist() == []
    ours = Ranks(others=2.0)  # two documents with an action each, on another rank
    assert sequence_weights(mask, lengths, ours.sum).tolist() == []


def test_totals_sum_or_take_the_largest_over_microbatches_and_ranks():
    totals = Totals()
    totals.add({"loss": torch.tensor(2.0), "ratio_max": 1.5})
    totals.add({"loss": 4.0, "ratio_max": torch.tensor(1.2)})
    assert totals.reduce(Ranks(others=2.0), per=4) == {"loss": 2.0, "ratio_max": 2.0}
    assert totals.reduce(Ranks(), per=0) == {"loss": 6.0, "ratio_max": 1.5}


@pytest.mark.invariant
def test_sequence_normalization_is_the_mean_of_the_means() -> None:
    """Σ weight · loss over n_terms equals the mean over rollouts of their mean over tokens."""
    cfg = RLConfig(
        output_dir="", model_name_or_path="", train_file="", learning_rate=1.0,
        loss_normalization="sequence",
    )  # fmt: skip
    batch = batch_of([4, 9, 3])
    losses = torch.arange(16.0)
    weights = add_loss_weights(batch, cfg, Ranks()).loss_weights
    means = [x[2:].mean() for x in losses.split(batch.lengths)]
    found = (weights * losses).sum() / batch.n_terms
    assert found.item() == pytest.approx(torch.stack(means).mean().item())
    plain = RLConfig(output_dir="", model_name_or_path="", train_file="", learning_rate=1.0)
    assert add_loss_weights(batch, plain, Ranks()) is batch
