"""Pack this rank's share of a step's rollouts or rows into one batch.

Long and short documents are distributed evenly. The update does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from rftt.batch import Batch, collate
from rftt.learner.fsdp import World, deal
from rftt.learner.offline import Sums, collate_examples
from rftt.run.config import RLConfig
from rftt.run.data import Example
from rftt.types import Rollout, seed_for


def pack_own_rollouts(
    cfg: RLConfig, step: int, rollouts: list[Rollout], world: World
) -> tuple[Batch, list[int], list[int]]:
    """Pack this rank's share of the rollouts, minibatch by minibatch.

    Returns the batch, the indices of its rollouts, and their number in each minibatch.
    """
    n_minibatches = max(1, round(len(rollouts) / cfg.train_batch_size))
    lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
    groups = None
    if cfg.packing == "tree":  # rollouts of a problem share a prefix, so they stay on one rank
        groups = [rollout.group for rollout in rollouts]
    seed = seed_for(cfg.seed, "deal", step)
    minibatches = deal(lengths, n_minibatches, seed, world, groups)
    own = list(chain(*minibatches))
    batch = collate(
        [rollouts[i] for i in own],
        mask_truncated=cfg.mask_truncated_completions,
        packs_prefixes=cfg.packing == "tree",
    )
    return batch.to(world.device), own, [len(minibatch) for minibatch in minibatches]


def pack_own_rows(
    rows: Sequence[Example], reference: Sequence[Sums], picked: Sequence[int], world: World
) -> Batch:
    """Pack this rank's share of the picked rows, with the reference's log-prob of each response."""
    size = {i: sum(len(prompt) + len(response) for prompt, response, _ in rows[i]) for i in picked}
    own = sorted(picked, key=lambda i: -size[i])[world.rank :: world.size]
    names = [f"example {i}" for i in own]
    examples, sums = [rows[i] for i in own], [reference[i] for i in own]
    return collate_examples(examples, sums, names, each=len(rows[0])).to(world.device)
