"""A packed batch: documents laid end to end, no padding, one alignment for every tensor.

T is the number of tokens of all documents. Entry t of every (T,) tensor speaks of *emitting token
t*: its log-prob given the tokens before it in its document, the value of the state before it, the
reward for it. The first token of a document is never an action. A batch is never edited: `replace`
gives a new one, and all counts come from `action_mask` (arXiv 2502.13389, phase 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rftt.types import Rollout, UserError


@dataclass(frozen=True)
class Batch:
    """D documents of `lengths` tokens each, T in all."""

    input_ids: Tensor
    """(T,) int64"""
    lengths: tuple[int, ...]
    action_mask: Tensor
    """(T,) bool: tokens that the policy is trained on."""
    rewards: Tensor
    """(T,) float32, on the last token of each step."""
    sampling_logprobs: Tensor
    """(T,) float32, the engine's."""
    old_logprobs: Tensor | None = None
    """(T,) float32, the trainer's before the update."""
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    loss_weights: Tensor | None = None
    """(T,) float32, averaging 1 over the action tokens; None: every token counts the same."""
    forced: Tensor | None = None
    """(T,) bool: openers that the tree chose, not the policy."""
    group: Tensor | None = None
    """(T,) int64: the problem. Tree packing keeps a problem's documents in one microbatch."""
    together: int = 1
    """So many documents in a row stay together: 2 for the chosen and the rejected of a pair."""
    tree: bool = False
    """Shared prefixes go through the model once (prefix_tree.py); results are the same."""

    @cached_property
    def starts(self) -> Tensor:
        """(D + 1,) index of each document's first token, and T; on the CPU."""
        return torch.tensor([0, *accumulate(self.lengths)])

    @cached_property
    def document(self) -> Tensor:
        """(T,) index of the document that each token belongs to."""
        return self.spread(range(len(self.lengths))).long()

    @cached_property
    def position_ids(self) -> Tensor:
        """(T,) position of each token inside its document."""
        starts = self.starts[:-1].to(self.input_ids.device)
        return torch.arange(len(self.input_ids), device=starts.device) - starts[self.document]

    @cached_property
    def n_actions(self) -> int:
        return int(self.action_mask.sum())

    @property
    def n_terms(self) -> int:
        """What a loss is a mean over: action tokens, or pairs where documents come in pairs."""
        return self.n_actions if self.together == 1 else len(self.lengths) // self.together

    def spread(self, per_document: Sequence[float]) -> Tensor:
        """(T,) each document's number on all its tokens."""
        counts = torch.tensor(self.lengths, dtype=torch.int64)
        spread = torch.tensor(per_document).repeat_interleave(counts, output_size=int(counts.sum()))
        return spread.to(self.input_ids.device)

    def replace(self, **changes: Any) -> Batch:
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda tensor: tensor.to(device))

    def token_index(self, documents: Sequence[int]) -> Tensor:
        """Positions in this batch of the tokens of these documents, in this order."""
        chosen = torch.tensor(documents, dtype=torch.int64)
        lengths = torch.tensor(self.lengths, dtype=torch.int64)[chosen]
        shift = self.starts[chosen] - (lengths.cumsum(0) - lengths)
        index = torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)
        return index.to(self.input_ids.device)

    def select(self, documents: Sequence[int]) -> Batch:
        """The batch of these documents, in this order."""
        index = self.token_index(documents)
        lengths = tuple(self.lengths[document] for document in documents)
        return self._map(lambda tensor: tensor[index]).replace(lengths=lengths)

    def microbatches(self, max_tokens: int) -> list[list[int]]:
        """Documents in groups of at most `max_tokens`, filled one after the other, longest first.

        Like lengths land together, so that padding inside the CPU's attention stays small; a
        document, or a pair, longer than the budget is a group of its own. Tree packing has its own
        way (learner/prefix_tree.py).
        """
        groups: list[list[int]] = []
        room = 0
        firsts = range(0, len(self.lengths), self.together)
        sizes = {first: sum(self.lengths[first : first + self.together]) for first in firsts}
        for first in sorted(firsts, key=lambda i: (-sizes[i], i)):
            if not groups or sizes[first] > room:
                groups.append([])
                room = max_tokens
            groups[-1] += range(first, first + self.together)
            room -= sizes[first]
        return groups

    def _map(self, function: Any) -> Batch:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(
            **{name: function(x) if isinstance(x, Tensor) else x for name, x in fields.items()}
        )


def collate(
    rollouts: Sequence[Rollout], *, mask_truncated: bool = False, tree: bool = False
) -> Batch:
    """Pack rollouts; step rewards land on the last token of their step.

    `mask_truncated` leaves out responses that ran into their budget: nobody knows their worth.
    """
    ids: list[int] = []
    mask: list[bool] = []
    rewards: list[float] = []
    logprobs: list[float] = []
    forced: list[bool] = []
    for rollout in rollouts:
        n_prompt, n_response = len(rollout.prompt_ids), len(rollout.response_ids)
        _check(n_prompt, n_response, len(rollout.action_mask), rollout.problem.id)
        if len(rollout.step_rewards) != len(rollout.step_ends):
            raise UserError(
                f"rollout of problem {rollout.problem.id}: {len(rollout.step_rewards)} rewards for "
                f"{len(rollout.step_ends)} steps; score rollouts before collating them."
            )
        reward = [0.0] * n_response
        for end, value in zip(rollout.step_ends, rollout.step_rewards, strict=True):
            reward[end] += value
        dropped = mask_truncated and rollout.finish == "length"
        ids += [*rollout.prompt_ids, *rollout.response_ids]
        mask += [False] * n_prompt + [m and not dropped for m in rollout.action_mask]
        rewards += [0.0] * n_prompt + reward
        logprobs += [0.0] * n_prompt + [*rollout.sampling_logprobs]
        forced += [False] * n_prompt + [*(rollout.forced or (False,) * n_response)]
    lengths = tuple(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts)
    batch = Batch(
        torch.tensor(ids, dtype=torch.int64),
        lengths,
        torch.tensor(mask, dtype=torch.bool),
        torch.tensor(rewards, dtype=torch.float32),
        torch.tensor(logprobs, dtype=torch.float32),
        forced=torch.tensor(forced, dtype=torch.bool),
        tree=tree,
    )
    return batch.replace(group=batch.spread([rollout.group for rollout in rollouts]).long())


MaskedRow = tuple[Sequence[int], Sequence[int], Sequence[bool]]
"""prompt_ids, response_ids, loss_mask over the response"""


def collate_rows(rows: Sequence[MaskedRow], together: int = 1) -> Batch:
    """Pack SFT or DPO rows: the tokens of the response that the mask keeps are the actions."""
    ids: list[int] = []
    mask: list[bool] = []
    for number, (prompt_ids, response_ids, loss_mask) in enumerate(rows):
        _check(len(prompt_ids), len(response_ids), len(loss_mask), f"row {number}")
        ids += [*prompt_ids, *response_ids]
        mask += [False] * len(prompt_ids) + [bool(keep) for keep in loss_mask]
    zeros = torch.zeros(len(ids), dtype=torch.float32)
    return Batch(
        torch.tensor(ids, dtype=torch.int64),
        tuple(len(prompt) + len(response) for prompt, response, _ in rows),
        torch.tensor(mask, dtype=torch.bool),
        zeros,
        zeros,
        together=together,
    )


def empty_like(batch: Batch) -> Batch:
    """Masked documents of two tokens: a rank with less work, or none, still runs its forwards."""
    n = batch.together
    return batch._map(lambda tensor: tensor.new_zeros(2 * n)).replace(lengths=(2,) * n)


def _check(n_prompt: int, n_response: int, n_mask: int, name: str) -> None:
    if n_prompt == 0 or n_mask != n_response:
        raise UserError(
            f"{name}: {n_prompt} prompt ids, {n_response} response ids, {n_mask} mask entries; a "
            "prompt may not be empty and the mask covers the response."
        )
