"""The rows of the functional tokens in embedding and head: new ones, and ones trained alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rftt.engines import vocabulary_size
from rftt.tokens import CLOSERS, OPENERS, description_of
from rftt.types import UserError

ROWS = "function_rows"
"""Attribute of a model that holds its TrainedRows."""


@torch.no_grad()
def add_function_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new: Sequence[str] = OPENERS + CLOSERS,
) -> None:
    """Initialise the embedding of each `new` delimiter with the mean of its description's rows.

    An untied head is initialised in the same way. `new` is the result of
    tokens.add_function_tokens, so rows that are already trained stay unchanged. Call this before
    sharding. Raises UserError if the model lacks rows for other tokens.
    """
    n_rows = len(weight_of(model.get_input_embeddings()))
    n_tokens = vocabulary_size(tokenizer)
    n_earlier = 1 + max(i for token, i in tokenizer.get_vocab().items() if token not in set(new))
    if n_rows < n_earlier:
        raise UserError(
            f"the model must have a vocabulary row for each of the tokenizer's "
            f"{n_earlier} earlier ids, got {n_rows} rows: they do not belong "
            "together; use the tokenizer of this model."
        )
    if n_rows < n_tokens:
        model.resize_token_embeddings(n_tokens, mean_resizing=False)
    if not new:
        return
    embedding = weight_of(model.get_input_embeddings())
    head = weight_of(model.get_output_embeddings())
    ids = tokenizer.convert_tokens_to_ids(list(new))
    described = [tokenizer.encode(description_of(t), add_special_tokens=False) for t in new]
    for weight in [embedding] if head is embedding else [embedding, head]:
        means = [weight[description].mean(0) for description in described]
        weight[ids] = torch.stack(means)


class TrainedRows(nn.Module):
    """Rows of the embedding and of an untied head that are trained although the matrix is frozen.

    They replace those of the matrix wherever the model reads them: in the embedding by a forward
    hook, in the head by logprobs.py.
    """

    index: Tensor
    """(n,) ids of the rows."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], *, in_base: bool = True) -> None:
        super().__init__()
        self.ids = tuple(ids)
        self.active = True
        """False while the model computes with the frozen rows."""
        self.in_base = in_base
        """Whether the model's folder has rows of these ids."""
        embedding, head = matrices(model)
        index = torch.tensor(ids, device=embedding.device)
        self.register_buffer("index", index, persistent=False)
        self.input = nn.Parameter(embedding[index].detach().float())  # (n, width)
        tied = head is embedding
        self.head = None if tied else nn.Parameter(head[index].detach().float())  # (n, width)

    @property
    def output(self) -> Tensor:
        """The rows of the head: those of the embedding if they are tied."""
        return self.input if self.head is None else self.head

    def embed(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """Replace the embeddings of the trained ids: a forward hook of the embedding."""
        if not self.active:
            return output
        match = args[0][..., None] == self.index  # (…, n), at most one per token
        rows = match.to(output.dtype) @ self.input.to(output.dtype)  # exact: the others are 0
        scale = getattr(module, "embed_scale", 1.0)  # Gemma's
        return torch.where(match.any(-1, keepdim=True), rows * scale, output)


def matrices(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return the (vocabulary, width) weights of the embedding and of the head."""
    return weight_of(model.get_input_embeddings()), weight_of(model.get_output_embeddings())


def trained_rows(model: nn.Module) -> TrainedRows | None:
    """Return the rows that are trained in a frozen matrix, or None."""
    return getattr(model, ROWS, None)


def weight_of(module: nn.Module | None) -> Tensor:
    """Return the (vocabulary, width) weight of an embedding or head."""
    return cast(nn.Linear, module).weight
