"""A packed batch: documents end to end, without padding, one alignment for every tensor.

T is the number of tokens of all documents. Entry t of every (T,) tensor belongs to *emitting token
t*: its log-prob given the tokens before it in its document, the value of the state before it, the
reward for it. The first token of a document is never an action. A batch is never edited: `replace`
returns a new one. All counts come from `action_mask` (arXiv 2502.13389, phase 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rftt.types import Rollout, UserError


@dataclass(frozen=True)
class Batch:
    """D documents of `lengths` tokens each, T in total."""

    input_ids: Tensor  # (T,) int64
    lengths: tuple[int, ...]  # (D,)
    action_mask: Tensor  # (T,) bool: tokens that the policy is trained on
    rewards: Tensor  # (T,) float32, on the last token of each step
    sampling_logprobs: Tensor  # (T,) float32, the engine's
    old_logprobs: Tensor | None = None  # (T,) float32, the trainer's before the update
    ref_logprobs: Tensor | None = None  # (T,) float32, the reference's
    values: Tensor | None = None  # (T,) float32, the critic's
    advantages: Tensor | None = None  # (T,) float32
    returns: Tensor | None = None  # (T,) float32, targets of the critic
    loss_weights: Tensor | None = None  # (T,) float32 of mean 1 over action tokens; None: all 1
    forced: Tensor | None = None  # (T,) bool: openers that the tree chose, not the policy
    branching: Tensor | None = None  # (T,) float32, see Rollout.branching
    group: Tensor | None = None  # (T,) int64: the problem; tree packing keeps it together
    names: tuple[str, ...] = ()  # (D,) ids of the problems or rows, for messages
    ref_sums: tuple[float, ...] = ()  # (D,) the reference's log-prob of each response (DPO)
    documents_per_term: int = 1  # consecutive documents of one term of the loss: 2 for a pair (DPO)
    packs_prefixes: bool = False
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
        starts = self.starts[:-1].to(self.input_ids.device)  # (D,)
        return torch.arange(len(self.input_ids), device=starts.device) - starts[self.document]

    @cached_property
    def n_actions(self) -> int:
        """Number of action tokens."""
        return int(self.action_mask.sum())

    @property
    def drawn(self) -> Tensor:
        """(T,) actions that the policy drew itself. An estimate of a KL holds for these only."""
        return self.action_mask if self.forced is None else self.action_mask & ~self.forced

    @property
    def n_terms(self) -> int:
        """Number of terms in a mean loss: action tokens, or pairs where documents are paired."""
        if self.documents_per_term > 1:
            return len(self.lengths) // self.documents_per_term
        return self.n_actions

    def spread(self, per_document: Sequence[float]) -> Tensor:
        """Return (T,) each document's number on all its tokens."""
        counts = torch.tensor(self.lengths, dtype=torch.int64)  # (D,)
        spread = torch.tensor(per_document).repeat_interleave(counts, output_size=int(counts.sum()))
        return spread.to(self.input_ids.device)

    def replace(self, **changes: Any) -> Batch:
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> Batch:
        return self.map(lambda tensor: tensor.to(device))

    def token_index(self, documents: Sequence[int]) -> Tensor:
        """Return the (T',) positions of these documents' tokens, in this order."""
        chosen = torch.tensor(documents, dtype=torch.int64)  # (D',)
        lengths = torch.tensor(self.lengths, dtype=torch.int64)[chosen]  # (D',)
        shift = self.starts[chosen] - (lengths.cumsum(0) - lengths)  # (D',) old minus new start
        index = torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)  # (T',)
        return index.to(self.input_ids.device)

    def select(self, documents: Sequence[int]) -> Batch:
        """Return the batch of these documents, in this order."""
        index = self.token_index(documents)  # (T',)
        per_document = {}
        for name in ("lengths", "names", "ref_sums"):
            entries = getattr(self, name)  # (D,), or () where a batch has none
            per_document[name] = tuple(entries[d] for d in documents if entries)
        return self.map(lambda tensor: tensor[index]).replace(**per_document)

    def split(self, counts: Iterable[int]) -> Iterator[Batch]:
        """Yield a batch of the first documents, one of the next, and so on: `counts` of each."""
        place = 0
        for count in counts:
            yield self.select(range(place, place + count))
            place += count

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with every tensor changed and all else as it is."""
        changed = {}
        for field in dataclasses.fields(self):  # vars() would include cached properties
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
        return self.replace(**changed)


def collate(
    rollouts: Sequence[Rollout], *, mask_truncated: bool = False, packs_prefixes: bool = False
) -> Batch:
    """Pack rollouts. A step's reward goes on the last token of the step.

    `mask_truncated` excludes truncated responses from the loss: their outcome is unknown.
    """
    ids: list[int] = []  # all of these become (T,)
    mask: list[bool] = []
    rewards: list[float] = []
    logprobs: list[float] = []
    forced: list[bool] = []
    branching: list[float] = []
    lengths: list[int] = []  # (D,)
    for rollout in rollouts:
        n_prompt, n_response = len(rollout.prompt_ids), len(rollout.response_ids)
        check_document(n_prompt, n_response, len(rollout.action_mask), rollout.problem.id)
        if len(rollout.step_rewards) != len(rollout.step_ends):
            raise UserError(
                f"rollout of problem {rollout.problem.id}: {len(rollout.step_rewards)} rewards for "
                f"{len(rollout.step_ends)} steps; score rollouts before collating them."
            )
        actions = rollout.action_mask  # (R,)
        if mask_truncated and rollout.finish == "length":
            actions = (False,) * n_response
        n_prefix = actions.index(True) if True in actions else n_response
        reward = [0.0] * n_response  # (R,)
        for end, value in zip(rollout.step_ends, rollout.step_rewards, strict=True):
            if end >= n_prefix:  # a fork's prefix has earned this in the rollout that trains it
                reward[end] += value  # on the token that ends the step
        # Everything that belongs to the prompt is 0: the policy did not emit it.
        ids += [*rollout.prompt_ids, *rollout.response_ids]
        mask += [False] * n_prompt + [*actions]
        rewards += [0.0] * n_prompt + reward
        logprobs += [0.0] * n_prompt + [*rollout.sampling_logprobs]
        forced += [False] * n_prompt + [*(rollout.forced or (False,) * n_response)]
        branching += [0.0] * n_prompt + [*(rollout.branching or (0.0,) * n_response)]
        lengths.append(n_prompt + n_response)
    batch = Batch(
        torch.tensor(ids, dtype=torch.int64),
        tuple(lengths),
        torch.tensor(mask, dtype=torch.bool),
        torch.tensor(rewards, dtype=torch.float32),
        torch.tensor(logprobs, dtype=torch.float32),
        forced=torch.tensor(forced, dtype=torch.bool),
        branching=torch.tensor(branching, dtype=torch.float32),
        names=tuple(rollout.problem.id for rollout in rollouts),
        packs_prefixes=packs_prefixes,
    )
    return batch.replace(group=batch.spread([rollout.group for rollout in rollouts]).long())


def spread_steps(rollouts: Sequence[Rollout], numbers: Sequence[Sequence[float]]) -> Tensor:
    """Return (T,) each step's number on all its tokens, 0 on prompts, aligned as by `collate`."""
    spread: list[float] = []
    for rollout, of_steps in zip(rollouts, numbers, strict=True):
        spread += [0.0] * len(rollout.prompt_ids)
        for ids, number in zip(rollout.step_ids(), of_steps, strict=True):
            spread += [number] * len(ids)
    return torch.tensor(spread, dtype=torch.float32)


def check_document(n_prompt: int, n_response: int, n_mask: int, name: str) -> None:
    """Raise UserError where a document has no prompt, or a mask that does not fit its response."""
    if n_prompt == 0 or n_mask != n_response:
        raise UserError(
            f"{name}: {n_prompt} prompt ids, {n_response} response ids, {n_mask} mask entries; a "
            "prompt must not be empty and a mask must cover its response."
        )
