"""The offline objectives over packed rows: cross-entropy, and DPO over pairs (ms-swift's RFT).

In DPO documents 2i and 2i + 1 of a batch are the chosen and the rejected response of one pair, and
share a microbatch: memory is bounded by the microbatch, not the batch. The reference is the model
that training starts from. Its log-probs are computed once, before the first update, and kept on
disk: no second model stands in memory, and a run that is started again finds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rftt.batch import Batch, collate_rows
from rftt.learner.fsdp import World, full_weights, per_token
from rftt.rl import Metrics, document_sums
from rftt.run.config import SFTConfig
from rftt.run.data import Example
from rftt.run.files import Journal

Sums = tuple[float, ...]
"""log π_ref of each response of an example."""


def collate_examples(examples: Sequence[Example], reference: Sequence[Sums], each: int) -> Batch:
    """Pack examples of `each` documents; a response's last token holds its sum as ref_logprobs."""
    documents = [document for example in examples for document in example]
    batch = collate_rows(documents, together=each)
    ref_logprobs = torch.zeros_like(batch.rewards)
    ref_logprobs[batch.starts[1:] - 1] = torch.tensor([x for sums in reference for x in sums])
    return batch.replace(ref_logprobs=ref_logprobs)


def offline_loss(logprobs: Tensor, batch: Batch, cfg: SFTConfig) -> tuple[Tensor, Metrics]:
    """The loss summed over the batch's terms, and what else is worth a look.

    A masked pair (`empty_like`) has no part in it.
    """
    if cfg.loss == "sft":
        return sft_loss(logprobs, batch.action_mask), {}
    assert batch.ref_logprobs is not None, "pairs come from collate_examples"
    whole = sums_of_pairs(torch.ones_like(logprobs), batch)[:, 0] > 0
    policy = sums_of_pairs(logprobs, batch)[whole]
    reference = sums_of_pairs(batch.ref_logprobs, batch)[whole]
    return dpo_loss(
        *(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1]),
        beta=cfg.dpo_beta,
        label_smoothing=cfg.label_smoothing,
    )


def sft_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy summed over the action tokens."""
    return -torch.where(mask, logprobs, 0.0).sum()


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """DPO over (pairs,) sequence log-probs, summed over pairs (Rafailov 2023; smoothing: cDPO)."""
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    metrics = {
        "dpo_accuracy": (margin > 0).sum(),
        "dpo_margin": margin.detach().sum(),
        "dpo_chosen_reward": chosen.detach().sum(),
        "dpo_rejected_reward": rejected.detach().sum(),
    }
    return loss.sum(), metrics


def sums_of_pairs(x: Tensor, batch: Batch) -> Tensor:
    """(pairs, 2) sum of x over the actions of each chosen and each rejected response."""
    sums = document_sums(x, batch.action_mask, batch.lengths)
    return sums.view(len(sums) // 2, 2)


def reference_logprobs(
    path: Path,
    pairs: Sequence[Example],
    logprobs: Callable[[Batch], Tensor],
    cfg: SFTConfig,
    world: World,
    model: nn.Module,
) -> list[Sums]:
    """log π_ref of the chosen and the rejected response of every pair, under the model as it is.

    `train_batch_size` pairs at a time over all ranks, each lot on disk before the next is begun;
    pairs that the file holds for these weights are not computed again: a folder's name would stay
    the same when another training has written into it.
    """
    weights = sum(float(w.abs().sum(dtype=torch.float64)) for _, w in full_weights(model))
    keys = [hashlib.sha256(repr((weights, cfg.dtype, p)).encode()).hexdigest() for p in pairs]
    journal = Journal(path) if world.is_main else None
    rows = world.gather(journal.rows if journal else None)[0]
    known: dict[str, Sums] = {row["pair"]: tuple(row["logprobs"]) for row in rows}
    todo = [i for i, key in enumerate(keys) if key not in known]
    for first in range(0, len(todo), cfg.train_batch_size):
        lot = todo[first : first + cfg.train_batch_size]
        mine = [pairs[i] for i in lot[world.rank :: world.size]]
        batch = collate_examples(mine, [(0.0, 0.0)] * len(mine), 2).to(world.device)
        tokens = per_token(logprobs, batch, cfg.max_tokens_per_microbatch, world)
        for rank, found in enumerate(world.gather(sums_of_pairs(tokens, batch).tolist())):
            for i, sums in zip(lot[rank :: world.size], found, strict=True):
                known[keys[i]] = tuple(sums)
                if journal:
                    journal.append({"pair": keys[i], "logprobs": sums})
    if journal:
        journal.close()
    return [known[key] for key in keys]
