"""Compute the offline losses over packed rows: cross-entropy, and DPO over pairs (ms-swift's RFT).

In DPO, documents 2i and 2i + 1 of a batch are the chosen and the rejected response of one pair.
They share a microbatch, so the microbatch and not the batch bounds the memory. The reference is the
model before training. Its log-probs are computed once, before the first update, and stored on disk.
No second model is in memory, and a resumed run reads them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rftt.batch import Batch, check_document
from rftt.learner.fsdp import Totals, World, full_weights, per_token
from rftt.rl import Metrics, document_sums
from rftt.run.config import SFTConfig
from rftt.run.data import Example
from rftt.run.files import Journal

Sums = tuple[float, ...]
"""log π_ref of each response of an example."""


MaskedRow = tuple[Sequence[int], Sequence[int], Sequence[bool]]
"""(prompt_ids, response_ids, loss mask over the response)"""


def collate_rows(rows: Sequence[MaskedRow], documents_per_term: int = 1) -> Batch:
    """Pack SFT or DPO rows. The response tokens selected by the mask are the actions."""
    ids: list[int] = []
    mask: list[bool] = []
    for number, (prompt_ids, response_ids, loss_mask) in enumerate(rows):
        check_document(len(prompt_ids), len(response_ids), len(loss_mask), f"row {number}")
        ids += [*prompt_ids, *response_ids]
        mask += [False] * len(prompt_ids) + [bool(keep) for keep in loss_mask]
    zeros = torch.zeros(len(ids), dtype=torch.float32)
    return Batch(
        torch.tensor(ids, dtype=torch.int64),
        tuple(len(prompt) + len(response) for prompt, response, _ in rows),
        torch.tensor(mask, dtype=torch.bool),
        zeros,
        zeros,
        documents_per_term=documents_per_term,
    )


def collate_examples(
    examples: Sequence[Example], reference: Sequence[Sums], names: Sequence[str], each: int
) -> Batch:
    """Pack examples of `each` documents, with the reference's log-prob of each response."""
    documents = [document for example in examples for document in example]
    return collate_rows(documents, documents_per_term=each).replace(
        names=tuple(name for name in names for _ in range(each)),
        ref_sums=tuple(x for sums in reference for x in sums),
    )


def offline_loss(logprobs: Tensor, batch: Batch, cfg: SFTConfig) -> tuple[Tensor, Metrics]:
    """Return the loss summed over the batch's terms, and sums of metrics.

    A pair without actions (`empty_like`) does not count.
    """
    if cfg.loss == "sft":
        loss = sft_loss(logprobs, batch.action_mask)
        return loss, {"loss": loss.detach()}
    counts = sums_of_pairs(torch.ones_like(logprobs), batch)[:, 0] > 0  # (pairs,)
    policy = sums_of_pairs(logprobs, batch)[counts]  # (pairs, 2)
    reference = torch.tensor(batch.ref_sums, dtype=policy.dtype, device=policy.device)
    reference = reference.view(-1, 2)[counts]
    loss, metrics = dpo_loss(
        *(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1]),
        beta=cfg.dpo_beta,
        label_smoothing=cfg.label_smoothing,
    )
    return loss, metrics | {"loss": loss.detach()}


def eval_metrics(logprobs: Tensor, batch: Batch, cfg: SFTConfig, world: World) -> dict[str, float]:
    """Return the means of the metrics over the held-out rows of all ranks. Collective."""
    totals = Totals()
    loss, metrics = offline_loss(logprobs, batch, cfg)
    totals.add({f"eval_{key}": metrics[key] for key in metrics} | {"eval_loss": loss})
    return totals.reduce(world, per=world.sum(float(batch.n_terms)))


def sft_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the cross-entropy summed over the action tokens."""
    return -torch.where(mask, logprobs, 0.0).sum()


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Return the DPO loss of (pairs,) sequence log-probs, summed over pairs (Rafailov 2023).

    Label smoothing is that of cDPO.
    """
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
    """Return the (pairs, 2) sums of x over the actions of chosen and rejected responses."""
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
    """Return log π_ref of both responses of every pair, under the current weights. Collective.

    The ranks compute `train_batch_size` pairs at a time and write them to disk before the next
    ones. Pairs that the file already has for the same weights are not computed again. The key
    contains a sum of the weights, because another training may write into the same folder.
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
        batch = collate_rows([row for pair in mine for row in pair], 2).to(world.device)
        tokens = per_token(logprobs, batch, cfg.max_tokens_per_microbatch, world)
        for rank, found in enumerate(world.gather(sums_of_pairs(tokens, batch).tolist())):
            for i, sums in zip(lot[rank :: world.size], found, strict=True):
                known[keys[i]] = tuple(sums)
                if journal:
                    journal.append({"pair": keys[i], "logprobs": sums})
    if journal:
        journal.close()
    return [known[key] for key in keys]
