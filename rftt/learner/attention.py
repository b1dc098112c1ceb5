"""Compute attention within documents of a packed batch, for flat packing and tree packing.

Each document consists of `shared` tokens, with which an earlier document also starts, and `new`
tokens. With flat packing `shared` is 0. Queries are the new tokens, keys are all tokens.

On a GPU in half precision this is torch's varlen flash attention, whose causal mask is aligned at
the end of queries and keys. Its kernels are FlashAttention-2, or what `use_flash_kernels` finds.
Otherwise documents are padded, but only inside the attention, in
blocks of similar length. One call per document would save about 1 %, but would be slower for small
models with many short documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rftt.engines.attend import attend
from rftt.run.files import one_line

ATTENTION = "rftt_packed"


@dataclass(frozen=True)
class Block:
    """Documents of similar length, padded to the same width."""

    rows: int
    n_queries: int
    n_keys: int
    shared: Tensor | None
    """(rows,) tokens before each document's first query. None if all are 0."""


@dataclass(frozen=True)
class Layout:
    """Positions of the documents' N queries and K keys. Indices refer to the N packed tokens."""

    cu_queries: Tensor
    """(D + 1,) int32, cumulative number of queries."""
    cu_keys: Tensor
    """(D + 1,) int32, cumulative number of keys."""
    longest: tuple[int, int]
    """Largest number of queries and of keys of a document."""
    path: Tensor | None
    """(K,) packed index of each key. None if the keys are the packed tokens."""
    blocks: tuple[Block, ...]
    pad_queries: Tensor
    """(slots,) packed index for every slot of all blocks. Empty slots have any index."""
    pad_keys: Tensor
    """(key slots,) the same for keys."""
    unpad: Tensor
    """(N,) slot of each packed token among the queries."""


def layout_of(
    new: Sequence[int], shared: Sequence[int], path: Tensor | None, device: torch.device
) -> Layout:
    """Return the layout of D documents, with documents of similar length in one block.

    Each document of a block has at least ¾ as many queries as the block's longest one.
    """
    keys = [a + b for a, b in zip(new, shared, strict=True)]
    cu_queries, cu_keys = (torch.tensor([0, *accumulate(n)]) for n in (new, keys))
    members: list[list[int]] = []
    for document in sorted(range(len(new)), key=lambda i: -new[i]):
        if not members or new[document] < 0.75 * new[members[-1][0]]:
            members.append([])
        members[-1].append(document)
    blocks, pad_queries, pad_keys, filled = [], [], [], []
    for block in members:
        n_queries, n_keys = new[block[0]], max(keys[i] for i in block)
        before = torch.tensor([shared[i] for i in block])
        queries, real = _slots(cu_queries[block], [new[i] for i in block], n_queries)
        pad_queries.append(queries)
        filled.append(real)
        pad_keys.append(_slots(cu_keys[block], [keys[i] for i in block], n_keys)[0])
        prefix = before.to(device) if before.any() else None
        blocks.append(Block(len(block), n_queries, n_keys, prefix))
    slots, slot_keys = torch.cat(pad_queries).to(device), torch.cat(pad_keys).to(device)
    real = torch.cat(filled).nonzero()[:, 0].to(device)
    return Layout(
        cu_queries.to(device, torch.int32),
        cu_keys.to(device, torch.int32),
        (max(new), max(keys)),
        path,
        tuple(blocks),
        slots,
        slot_keys if path is None else path[slot_keys],
        torch.empty_like(real).index_copy_(0, slots[real], real),
    )


def _slots(starts: Tensor, lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Return the (rows · width,) index of every slot (0 if empty), and which slots are filled."""
    column = torch.arange(width)
    filled = column < torch.tensor(lengths)[:, None]
    return torch.where(filled, starts[:, None] + column, 0).flatten(), filled.flatten()


class _Gather(torch.autograd.Function):
    """x[:, index] with a gather as its backward pass, instead of a slower scatter-add.

    This requires that `inverse` inverts `index` and that other slots receive no gradient. Causal
    attention sends no gradient to the padding after a document.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(1, ctx.saved_tensors[0]), None, None


def _padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return attention (H, N, d) of q, k, v (H, N, d), in blocks of (documents, H, width, d)."""
    queries = _Gather.apply(q, layout.pad_queries, layout.unpad)
    if layout.path is None:
        keys, values = (_Gather.apply(x, layout.pad_keys, layout.unpad) for x in (k, v))
    else:  # a shared token is the key of several documents
        keys, values = (x.index_select(1, layout.pad_keys) for x in (k, v))
    n_queries = [block.rows * block.n_queries for block in layout.blocks]
    n_keys = [block.rows * block.n_keys for block in layout.blocks]
    outs = []
    for block, *qkv in zip(
        layout.blocks, queries.split(n_queries, 1), keys.split(n_keys, 1),
        values.split(n_keys, 1), strict=True,
    ):  # fmt: skip
        mask = _mask(block, window, q.device)
        query, key, value = (x.unflatten(1, (block.rows, -1)).transpose(0, 1) for x in qkv)
        if softcap is None and sinks is None:
            out = scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                scale=scale,
                is_causal=mask is None,
                enable_gqa=True,
            )
        else:
            if mask is None:
                size = (1, 1, block.n_queries, block.n_keys)
                mask = torch.ones(size, dtype=torch.bool, device=q.device).tril()
            out = attend(query, key, value, mask, scale, softcap, sinks)
        outs.append(out.transpose(0, 1).flatten(1, 2))
    return torch.cat(outs, 1).index_select(1, layout.unpad)


def _mask(block: Block, window: int | None, device: torch.device) -> Tensor | None:
    """Return (rows or 1, 1, queries, keys), True where a query attends. None is plain causal."""
    if block.shared is None and (window is None or window >= block.n_keys):
        return None
    position = torch.arange(block.n_queries, device=device)[None, :, None]
    if block.shared is not None:
        position = position + block.shared[:, None, None]
    distance = position - torch.arange(block.n_keys, device=device)
    allowed = distance >= 0
    return (allowed if window is None else allowed & (distance < window))[:, None]


def _packed_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - some models pass it by this name
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Implement transformers' attention function: (1, H, N, d) -> (1, N, H, d).

    `s_aux` are attention sinks, one logit per head.
    """
    # Flash attention is for half precision. It has neither soft caps nor sinks.
    plain = softcap is None and s_aux is None
    if not query.is_cuda or query.dtype == torch.float32 or not plain:
        out = _padded_attention(
            query[0], key[0], value[0], layout, scaling, sliding_window, softcap, s_aux
        )
        return out.transpose(0, 1).contiguous()[None], None  # some models call view()
    return _flash_attention(query[0], key[0], value[0], layout, scaling, sliding_window)[None], None


def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float | None, window: int | None
) -> Tensor:
    """Return attention (N, H, d) of q, k, v (H, N, d), by torch's flash kernels."""
    from torch.nn.attention import varlen

    if layout.path is not None:
        k, v = k.index_select(1, layout.path), v.index_select(1, layout.path)
    out = varlen.varlen_attn(
        q.transpose(0, 1),
        k.transpose(0, 1),
        v.transpose(0, 1),
        layout.cu_queries,
        layout.cu_keys,
        layout.longest[0],
        layout.longest[1],
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    return cast(Tensor, out)


def use_flash_kernels(capability: tuple[int, int]) -> str:
    """Give torch the flash kernels for a GPU of this compute capability. Return a line for the log.

    torch contains those of FlashAttention-2, so the package flash-attn would add nothing. Those of
    FlashAttention-3 are for Hopper alone and belong to a package that few have.
    """
    own = "attention: torch's FlashAttention-2"
    if capability[0] != 9 or find_spec("flash_attn_interface") is None:
        return own
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:
        return f"{own}; FlashAttention-3 is installed but does not load: {one_line(error, 200)}"
    return "attention: FlashAttention-3 (flash_attn_interface)"


AttentionInterface.register(ATTENTION, _packed_attention)
