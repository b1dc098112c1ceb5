"""Pack documents as a prefix tree, so that the model computes shared prefixes only once.

In lexicographic order a document shares its longest prefix with its predecessor. Each document
therefore adds only a suffix of new tokens, which are the nodes of a prefix tree. The log-prob of a
token depends on its path only, so the loss still counts every document.

Rollouts of one search share their prompt and the beginnings of their paths. Minibatches are those
of flat packing, because packing must not change the update. Flat packing is the default, because
minibatches with few rollouts per problem share little (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from rftt.batch import Batch


@dataclass(frozen=True)
class Forest:
    """A prefix tree with N nodes for the T tokens of a batch."""

    node: Tensor
    """(T,) node of each packed token."""
    token: Tensor
    """(N,) the first packed token of each node."""
    new: list[int]
    """Number of nodes that each document adds. Documents that add none are omitted."""
    shared: list[int]
    """Number of earlier nodes with which each of these documents starts."""
    path: Tensor
    """Nodes of these documents, concatenated."""


def prefix_order(input_ids: Tensor, lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the lexicographic order of documents and their prefix lengths.

    A prefix length is the number of tokens that a document shares with its predecessor.
    """
    documents = [ids.numpy() for ids in input_ids.cpu().split(list(lengths))]
    keys = [ids.astype(">u4").tobytes() for ids in documents]
    order = sorted(range(len(documents)), key=keys.__getitem__)
    shared = [0][: len(order)]
    for before, here in pairwise(order):
        n = min(lengths[before], lengths[here])
        differs = documents[before][:n] != documents[here][:n]
        shared.append(int(differs.argmax()) if differs.any() else n)
    return order, shared


def forest_of(input_ids: Tensor, lengths: Sequence[int], starts: Tensor) -> Forest:
    """Return the prefix tree of D documents that begin at `starts` (D + 1,)."""
    order, prefixes = prefix_order(input_ids, lengths)
    node = torch.empty(len(input_ids), dtype=torch.int64)
    tokens: list[Tensor] = []
    new: list[int] = []
    shared: list[int] = []
    paths: list[Tensor] = []
    n_nodes, previous = 0, node[:0]
    for document, prefix in zip(order, prefixes, strict=True):
        start, added = int(starts[document]), lengths[document] - prefix
        here = node[start : start + lengths[document]]
        here[:prefix] = previous[:prefix]
        here[prefix:] = torch.arange(n_nodes, n_nodes + added)
        previous = here
        if added:
            tokens.append(torch.arange(start + prefix, start + lengths[document]))
            paths.append(here)
            new.append(added)
            shared.append(prefix)
            n_nodes += added
    device = input_ids.device
    return Forest(
        node.to(device), torch.cat(tokens).to(device), new, shared, torch.cat(paths).to(device)
    )


# ---- Batches whose shared prefixes go through the model once ----


def tree_microbatches(batch: Batch, max_tokens: int) -> list[list[int]]:
    """Return microbatches of documents in prefix order, with shared tokens counted once.

    The documents of a problem are split only if they do not fit one microbatch.
    """
    groups: list[list[int]] = []
    room = 0
    problem = batch.document if batch.group is None else batch.group
    problems = problem[batch.starts[:-1].to(problem.device)].tolist()
    in_order = zip(*prefix_order(batch.input_ids, batch.lengths), strict=True)
    for _, run in groupby(in_order, key=lambda item: problems[item[0]]):
        paths = [(document, batch.lengths[document] - shared) for document, shared in run]
        fits = sum(new for _, new in paths) <= room
        for document, new in paths:
            if not fits or new > room:
                groups.append([])
                room, new, fits = max_tokens, batch.lengths[document], True
            groups[-1].append(document)
            room -= new
    return groups


def n_saved(batch: Batch) -> int:
    """Return the number of tokens that tree packing does not compute again."""
    return sum(prefix_order(batch.input_ids, batch.lengths)[1]) if batch.packs_prefixes else 0
