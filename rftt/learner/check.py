"""Compare packed scores with those of transformers, when a model is opened.

Log-probs come from hidden states and the head's matrix, and documents are packed end to end. Both
go wrong without a word for a model whose head does more, or whose layers let documents leak into
each other. So two short sequences are scored in both ways before the first step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rftt.batch import Batch
from rftt.engines.opened import attending, check_same, own_logits, probes
from rftt.learner.logprobs import hidden_states, packed_inputs, token_logprobs
from rftt.learner.offline import collate_rows

FLAT = ("trainer", "use a model of docs/models.md that is right there")
TREE = ("trainer's tree packing", "set packing: flat, or use a model that docs/models.md lists")
"""What a message calls a kind of packing, and the cure."""


def check_policy(model: PreTrainedModel, n_tokens: int, *, tree: bool = False) -> None:
    """Raise UserError if a prepared model's packed log-probs are not the model's own.

    `n_tokens` ids are compared, those of functional tokens included; `tree` selects tree packing.
    """
    batch = _batch(n_tokens, tree=tree)

    @torch.no_grad()
    def compute() -> tuple[Tensor, Tensor]:
        own = [
            own_logits(model, ids, n_tokens).log_softmax(-1)[range(len(ids) - 1), ids[1:]]
            for ids in probes(n_tokens)
        ]
        ours, _ = token_logprobs(model, batch, 1.0, n_tokens)
        return ours[batch.action_mask], torch.cat(own)

    place, cure = TREE if tree else FLAT
    check_same(model, place, compute, cure=cure)


def check_backbone(backbone: PreTrainedModel) -> None:
    """Raise UserError if a critic's packed hidden states are not the backbone's own.

    They are compared in units of their standard deviation.
    """
    batch = _batch(backbone.config.get_text_config().vocab_size, tree=False)

    @torch.no_grad()
    def compute() -> tuple[Tensor, Tensor]:
        ours = hidden_states(backbone, packed_inputs(batch))
        with attending(backbone, "eager"):
            documents = batch.input_ids.split(list(batch.lengths))
            own = [backbone(ids[None], use_cache=False).last_hidden_state[0] for ids in documents]
        spread = torch.cat(own).float().std()
        return ours / spread, torch.cat(own) / spread

    check_same(backbone, "critic", compute, "hidden states")


def _batch(n_tokens: int, *, tree: bool) -> Batch:
    """Return the two sequences, of which every token but the first is an action."""
    rows = [(ids[:1], ids[1:], [True] * (len(ids) - 1)) for ids in probes(n_tokens)]
    return collate_rows(rows).replace(packs_prefixes=tree)
