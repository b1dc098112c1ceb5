"""Compute log-probs, entropies and values of packed batches, in chunks of the vocabulary.

Only states before ACTION tokens are used. The backward pass is written by hand, so the matrix
(tokens, vocabulary) never exists as a whole. In the trainer, only this module divides by the
temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rftt.batch import Batch
from rftt.engines.opened import capped, logit_head
from rftt.learner.attention import Layout, layout_of
from rftt.learner.prefix_tree import forest_of
from rftt.learner.rows import trained_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rftt.learner.model import Critic

CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**26}
"""Number of float32 logits at one time: 8 MB on a CPU, which fit its caches, 256 MB on a GPU."""
KEPT_LOGITS = {"cpu": 2**24, "cuda": 2**28}
"""Number of logits kept for the backward pass instead of being computed again."""


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(cap(h Wᵀ + b) / temperature) at the targets, and its entropy, in chunks of ids.

    The forward pass is an online softmax over the chunks. The backward pass recomputes all logits
    except those of the first `n_kept` chunks: ∂logp = onehot − p and ∂H = −p (log p + H). A chunk
    is a slice of the vocabulary and not of the tokens. It fits the caches, and each row of the
    weight's gradient is a single sum. On a CPU this reduced the float32 head from 2.9 s to 2.4 s
    and the bfloat16 head from 1.3 s to 0.7 s.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        own: Tensor | None,
        own_ids: tuple[int, ...],
        cap: float | None,
        targets: Tensor,
        temperature: float,
        starts: range,
        n_kept: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        picked = peak = hidden.new_full((len(targets),), -torch.inf, dtype=wide)
        total, mean = torch.zeros_like(peak), torch.zeros_like(peak)
        kept: list[Tensor] = []
        for start in starts:
            rows = slice(start, min(start + starts.step, starts.stop))
            raw = _raw(hidden, _replaced(weight, own, own_ids, rows), bias, rows)
            kept += [raw] if len(kept) < n_kept else []
            logits = _divided(capped(raw.to(wide), cap), temperature)
            column, inside = _place(targets, start, logits.shape[1])
            picked = torch.where(inside, logits.gather(-1, column)[:, 0], picked)
            before, peak = peak, torch.maximum(peak, logits.amax(-1))
            mass, shrink = (logits - peak[:, None]).exp_(), (before - peak).exp_()
            total = total * shrink + mass.sum(-1)
            if with_entropy:
                mean = mean * shrink + mass.mul_(logits).sum(-1)
        normalizer = peak + total.log()
        entropy = normalizer - mean / total
        ctx.save_for_backward(hidden, weight, bias, own, targets, normalizer, entropy, *kept)
        ctx.set_materialize_grads(False)
        ctx.cap, ctx.temperature, ctx.starts, ctx.own_ids = cap, temperature, starts, own_ids
        return picked - normalizer, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, own, targets, normalizer, entropy, *kept = ctx.saved_tensors
        slopes, grad_entropy = grads  # None where the loss does not use it
        slopes = torch.zeros_like(normalizer) if slopes is None else slopes
        grad_hidden = torch.zeros_like(hidden, dtype=normalizer.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_weight is not None:
            grad_weight[ctx.starts.stop :] = 0  # rows of padding beyond the tokenizer
        grad_own = None if own is None else torch.zeros_like(own)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for number, start in enumerate(ctx.starts):
            rows = slice(start, min(start + ctx.starts.step, ctx.starts.stop))
            matrix = _replaced(weight, own, ctx.own_ids, rows)
            raw = kept[number] if number < len(kept) else _raw(hidden, matrix, bias, rows)
            logits = capped(raw.to(normalizer.dtype), ctx.cap)
            logp = _divided(logits, ctx.temperature) - normalizer[:, None]
            factor = -slopes[:, None]
            if grad_entropy is not None:
                factor = factor - grad_entropy[:, None] * (logp + entropy[:, None])
            grad = logp.exp_().mul_(factor)
            column, inside = _place(targets, start, grad.shape[1])
            grad.scatter_add_(-1, column, (slopes * inside)[:, None])
            grad = _divided(grad, ctx.temperature)
            if ctx.cap is not None:  # the derivative of cap · tanh(x / cap)
                grad = grad * (1 - (logits / ctx.cap).square())
            grad = grad.to(hidden.dtype)
            if grad_bias is not None:
                grad_bias[rows] = grad.sum(0)
            if grad_weight is not None:
                torch.mm(grad.T, hidden, out=grad_weight[rows])
            if grad_own is not None:
                which, columns = _inside(ctx.own_ids, rows)
                grad_own[which] = grad[:, columns].T @ hidden
            if grad.dtype == grad_hidden.dtype:
                grad_hidden.addmm_(grad, matrix)
            else:  # the sum over chunks stays in float32
                grad_hidden += grad @ matrix
        grads_of_head = (grad_weight, grad_bias, grad_own)
        return grad_hidden.to(hidden.dtype), *grads_of_head, *[None] * 7


def _inside(ids: tuple[int, ...], rows: slice) -> tuple[list[int], list[int]]:
    """Return which of `ids` are in `rows`, and their places there."""
    which = [i for i, token in enumerate(ids) if rows.start <= token < rows.stop]
    return which, [ids[i] - rows.start for i in which]


def _replaced(weight: Tensor, own: Tensor | None, own_ids: tuple[int, ...], rows: slice) -> Tensor:
    """Return `rows` of the head's weight, with the rows `own` in the place of `own_ids`."""
    which, places = _inside(own_ids, rows)
    if own is None or not which:
        return weight[rows]
    return weight[rows].index_copy(0, torch.tensor(places, device=own.device), own[which])


def _raw(hidden: Tensor, matrix: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
    """Return (A, width) logits of the ids `rows`, before any soft cap."""
    logits = hidden @ matrix.T
    return logits if bias is None else logits + bias[rows]


def _divided(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1.0 else x / temperature


def _place(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the (A, 1) columns of the targets in a chunk, and whether each is in that chunk."""
    column = targets - start
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


def token_logprobs(
    model: PreTrainedModel,
    batch: Batch,
    temperature: float,
    n_tokens: int,
    *,
    chunk: int | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return (T,) log π of each action token and the policy's entropy there, 0 at other tokens.

    `n_tokens` is vocabulary_size(tokenizer). Later rows of the vocabulary are padding, which
    engines never sample, so the normalisation excludes them. `chunk` is the number of ids whose
    logits exist at one time (default: CHUNK_LOGITS over the number of wanted tokens).
    """
    view = _view(batch)
    picked, entropy = model.packed_forward(  # pyright: ignore[reportCallIssue]
        view.inputs, view.states, view.targets, temperature, n_tokens, chunk, with_entropy
    )
    return view.place(picked), view.place(entropy) if with_entropy else None


def token_values(critic: Critic, batch: Batch) -> Tensor:
    """Return the (T,) value of the state before each action token, 0 at other tokens."""
    view = _view(batch)
    return view.place(critic.packed_forward(view.inputs, view.states)[:, 0])


def packed_logprobs(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    states: Tensor,
    targets: Tensor,
    temperature: float,
    n_tokens: int,
    chunk: int | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Return (A,) log-probs of `targets` and (A,) entropies at the A `states`.

    This is the `packed_forward` of a policy. FSDP gathers its weights around this call.
    """
    head = logit_head(model)
    hidden = hidden_states(model.get_decoder(), inputs)[states]
    if head.scale != 1.0:  # on the hidden states: they are smaller than the logits
        hidden = hidden * head.scale
    kind, n = hidden.device.type, len(targets) or 1
    starts = range(0, n_tokens, chunk or chunk_width(kind, n))
    n_kept = KEPT_LOGITS[kind] // (starts.step * n)
    rows = trained_rows(model)
    own, ids = (rows.output, rows.ids) if rows and rows.active else (None, ())
    weights = (head.weight, head.bias, own, ids)
    return _ChunkedLogprobs.apply(
        hidden, *weights, head.cap, targets, temperature, starts, n_kept, with_entropy
    )


def chunk_width(kind: str, n_wanted: int) -> int:
    """Return how many ids have their logits at one time, a multiple of 128 from 256.

    In bfloat16 a matrix product on a GPU is 2 to 27 times slower where rows are not aligned.
    """
    return max(CHUNK_LOGITS[kind] // n_wanted // 128 * 128, 256)


def hidden_states(backbone: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the (T, width) last hidden states."""
    return backbone(**inputs, use_cache=False).last_hidden_state[0]


@dataclass(frozen=True)
class _View:
    """Input of the model for a batch: N packed tokens, of which A states are wanted."""

    inputs: dict[str, Any]
    states: Tensor
    """(A,) packed index of the token before each wanted one."""
    targets: Tensor
    """(A,) ids of the wanted tokens."""
    n_tokens: int
    actions: Tensor
    """(≤ T,) index of the action tokens in the batch."""
    which: Tensor | None
    """Index of each action token among the A wanted tokens. None if they are the same."""

    def place(self, x: Tensor) -> Tensor:
        """Map (A,) -> (T,), with 0 at tokens that are not actions."""
        x = x if self.which is None else x.index_select(0, self.which)
        return x.new_zeros(self.n_tokens).index_put((self.actions,), x)


def _view(batch: Batch) -> _View:
    ids, device, n = batch.input_ids, batch.input_ids.device, len(batch.input_ids)
    actions = batch.action_mask.nonzero()[:, 0]
    if not batch.packs_prefixes:
        layout = layout_of(batch.lengths, [0] * len(batch.lengths), None, device)
        inputs = _inputs(ids, batch.position_ids, layout)
        return _View(inputs, actions - 1, ids[actions], n, actions, None)
    forest = forest_of(ids, batch.lengths, batch.starts)
    layout = layout_of(forest.new, forest.shared, forest.path, device)
    inputs = _inputs(ids[forest.token], batch.position_ids[forest.token], layout)
    nodes, which = forest.node[actions].unique(return_inverse=True)
    wanted = forest.token[nodes]
    return _View(inputs, forest.node[wanted - 1], ids[wanted], n, actions, which)


def packed_inputs(batch: Batch) -> dict[str, Any]:
    """Return what a backbone takes for a batch."""
    return _view(batch).inputs


def _inputs(input_ids: Tensor, position_ids: Tensor, layout: Layout) -> dict[str, Any]:
    return {"input_ids": input_ids[None], "position_ids": position_ids[None], "layout": layout}
