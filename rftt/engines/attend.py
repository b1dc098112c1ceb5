"""Attention written out, for what no fused kernel computes: soft caps and attention sinks."""

from __future__ import annotations

import torch
from torch import Tensor

from rftt.engines.opened import capped


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute softmax(cap(q kᵀ · scale)) v; a sink takes part in the softmax and has no value.

    query (B, H, T, D), key and value (B, H_kv, W, D), mask bool (1 or B, 1, T, W), True where a
    query attends, sinks (H,) -> (B, H, T, D). Gemma 2 caps the scores; gpt-oss has sinks.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    # Not -inf: a row of padding may attend to nothing, and NaN would reach the gradients of others.
    scores = capped(scores, softcap).float().masked_fill(~mask, torch.finfo(torch.float32).min)
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1)[..., : key.shape[-2]]
    return weights.to(value.dtype) @ value
