"""Hugging Face causal language models on packed batches: loading, new rows, log-probs, values.

Attention never crosses documents. On a GPU in half precision it is torch's varlen flash attention;
elsewhere documents are padded inside the attention only, so every linear layer still sees nothing
but real tokens. Log-probs come from hidden states in chunks over ACTION positions with a
hand-written backward: [tokens, vocabulary] never exists whole. Temperature is divided here and
nowhere else in the trainer (DESIGN §4.5; PAPER §1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rftt.functions import CLOSERS, OPENERS, description_of
from rftt.learn.batch import Batch
from rftt.schema import UserError

ATTENTION = "rftt_packed"
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**28}
"""Float32 logits that exist at one time: 64 MB, or 1 GB: on a GPU a chunk of a large vocabulary
must hold 1,000 tokens, or adding up the head's gradient costs more than computing it."""


# ---- Attention inside documents ----


@dataclass(frozen=True)
class Layout:
    """Where the documents lie: packed, and in padded blocks of documents of like length."""

    cu_seqlens: Tensor
    """(D + 1,) int32"""
    longest: int
    blocks: tuple[tuple[int, int], ...]
    """(documents, width) of each block."""
    pad: Tensor
    """(slots,) packed index of every slot of all blocks; 0 in empty ones."""
    unpad: Tensor
    """(T,) slot of each packed token."""


def layout_of(batch: Batch) -> Layout:
    """The batch's layout on its device. A block's documents are at least ¾ as long as its first."""
    device, lengths = batch.input_ids.device, batch.lengths
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    blocks: list[list[int]] = []
    for document in order:
        if not blocks or lengths[document] < 0.75 * lengths[blocks[-1][0]]:
            blocks.append([])
        blocks[-1].append(document)
    pads, filled = [], []
    for block in blocks:
        column = torch.arange(lengths[block[0]])
        inside = column < torch.tensor([lengths[i] for i in block])[:, None]
        pads.append(torch.where(inside, batch.starts[block][:, None] + column, 0).flatten())
        filled.append(inside.flatten())
    pad, real = torch.cat(pads), torch.cat(filled).nonzero()[:, 0]
    return Layout(
        batch.starts.to(device, torch.int32),
        lengths[order[0]],
        tuple((len(block), lengths[block[0]]) for block in blocks),
        pad.to(device),
        torch.empty_like(real).index_copy_(0, pad[real], real).to(device),
    )


class _Gather(torch.autograd.Function):
    """x[:, index] whose backward is a gather as well, not a scatter-add.

    Right when `inverse` undoes `index` and no gradient reaches a slot that it does not name: causal
    attention sends none to the padding behind a document.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(1, ctx.saved_tensors[0]), None, None


def _padded_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float | None, window: int | None
) -> Tensor:
    """(H, T, d) -> (H, T, d), block by block as [documents, H, width, d]."""
    sizes = [rows * width for rows, width in layout.blocks]
    padded = [_Gather.apply(x, layout.pad, layout.unpad).split(sizes, 1) for x in (q, k, v)]
    outs = []
    for (rows, width), *qkv in zip(layout.blocks, *padded, strict=True):
        mask = None
        if window is not None and window < width:
            distance = torch.arange(width, device=q.device)[:, None] - torch.arange(
                width, device=q.device
            )
            mask = (distance >= 0) & (distance < window)
        out = scaled_dot_product_attention(
            *(x.unflatten(1, (rows, width)).transpose(0, 1) for x in qkv),
            attn_mask=mask, scale=scale, is_causal=mask is None, enable_gqa=True,
        )  # fmt: skip
        outs.append(out.transpose(0, 1).flatten(1, 2))
    return torch.cat(outs, 1).index_select(1, layout.unpad)


def _packed_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface: (1, H, T, d) -> (1, T, H, d)."""
    if not query.is_cuda or query.dtype == torch.float32:  # flash attention is for half precision
        out = _padded_attention(query[0], key[0], value[0], layout, scaling, sliding_window)
        return out.transpose(0, 1)[None], None
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, longest = layout.cu_seqlens, layout.longest
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
    )
    return cast(Tensor, out)[None], None


AttentionInterface.register(ATTENTION, _packed_attention)


# ---- Loading ----


def load_policy(
    path: str,
    dtype: torch.dtype,
    *,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model from a Hugging Face folder or hub id, on the CPU.

    Raises UserError when there is none, or when its attention cannot be packed.
    """
    model = _pretrained(AutoModelForCausalLM, path, dtype, trust_remote_code)
    return prepare(model, gradient_checkpointing=gradient_checkpointing)


def prepare(model: PreTrainedModel, *, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """Make a causal language model read packed batches (in place): see `token_logprobs`."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) or getattr(
        config, "final_logit_softcapping", None
    ):
        raise UserError(f"{config.model_type}: logit soft-capping (Gemma 2) is not supported.")
    model.set_attn_implementation(ATTENTION)
    model.config.use_cache = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # FSDP gathers the root's weights around `forward` or a method that distributed.shard registers.
    model.packed_forward = MethodType(_packed_logprobs, model)  # pyright: ignore[reportArgumentType]
    return model.train()


class Critic(nn.Module):
    """A backbone with a scalar head: V(state before emitting token t)."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, dtype=backbone.dtype)
        # Zero: the first values are 0 rather than noise, and the first advantages the rewards.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def packed_forward(self, inputs: dict[str, Any], states: Tensor) -> Tensor:
        """(A, 1) values at the A positions `states`."""
        return self.head(_hidden(self.backbone, inputs)[states]).float()


def load_critic(
    path: str,
    dtype: torch.dtype,
    *,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> Critic:
    """A critic whose backbone starts from a causal language model's."""
    backbone = _pretrained(AutoModel, path, dtype, trust_remote_code)
    backbone.set_attn_implementation(ATTENTION)
    backbone.config.use_cache = False
    if gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return Critic(backbone).train()


def _pretrained(
    auto: type, path: str, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    try:
        return auto.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise UserError(f"no model at {path!r}: {str(error).splitlines()[0]}") from error


# ---- New vocabulary rows ----


@torch.no_grad()
def add_function_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new: Sequence[str] = OPENERS + CLOSERS,
) -> None:
    """Give each delimiter of `new` an input row (and untied output row): its description's mean.

    `new` is what functions.add_function_tokens returned: rows already learnt are left alone. Must
    run before sharding. Raises UserError when the model lacks rows for other tokens.
    """
    n_rows = len(_weight(model.get_input_embeddings()))
    if n_rows < len(tokenizer) - len(new):
        raise UserError(
            f"the model has {n_rows} vocabulary rows, its tokenizer {len(tokenizer)} ids of which "
            f"{len(new)} are new: they do not belong together."
        )
    if n_rows < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embedding = _weight(model.get_input_embeddings())
    head = _weight(model.get_output_embeddings())
    ids = tokenizer.convert_tokens_to_ids(list(new))
    described = [tokenizer.encode(description_of(t), add_special_tokens=False) for t in new]
    for weight in [embedding] if head is embedding else [embedding, head]:
        means = [weight[description].mean(0) for description in described]
        weight[ids] = torch.stack(means)


def _weight(module: nn.Module | None) -> Tensor:
    return cast(nn.Linear, module).weight


# ---- Log-probs and values ----


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(h Wᵀ / temperature) at the targets, and its entropy, a chunk of rows at a time.

    The backward recomputes the logits unless one chunk holds them all: ∂logp = onehot − p and
    ∂H = −p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(targets), device=hidden.device)
        entropy, normalizer = torch.zeros_like(logprobs), torch.empty_like(logprobs)
        logp = logprobs[:0, None]
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            logits = _logits(hidden[rows], weight, temperature)
            normalizer[rows] = logits.logsumexp(-1)
            logp = logits.sub_(normalizer[rows, None])
            logprobs[rows] = logp.gather(-1, targets[rows, None])[:, 0]
            if with_entropy:
                entropy[rows] = -(logp.exp() * logp).sum(-1)
        kept = logp if len(targets) <= chunk else None
        ctx.save_for_backward(hidden, weight, targets, normalizer, entropy, kept)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer, entropy, kept = ctx.saved_tensors
        slopes, grad_entropy = grads  # None where the loss does not use it
        slopes = torch.zeros_like(normalizer) if slopes is None else slopes
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(targets), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            if kept is None:
                logp = _logits(hidden[rows], weight, ctx.temperature).sub_(normalizer[rows, None])
            else:
                logp = kept.clone()
            factor = -slopes[rows, None]
            if grad_entropy is not None:
                factor = factor - grad_entropy[rows, None] * (logp + entropy[rows, None])
            grad = logp.exp_().mul_(factor)
            grad.scatter_add_(-1, targets[rows, None], slopes[rows, None])
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            if grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[rows])
            else:  # the sum over chunks stays in float32
                grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def token_logprobs(
    model: PreTrainedModel,
    batch: Batch,
    temperature: float,
    n_tokens: int,
    *,
    chunk: int | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(T,) log π of each action token, and the policy's entropy there; 0 at other tokens.

    `n_tokens` is len(tokenizer): rows beyond it are padding that nobody may sample. `chunk` is how
    many tokens have logits at one time (default: CHUNK_LOGITS over the vocabulary).
    """
    chunk = chunk or max(1, CHUNK_LOGITS[batch.input_ids.device.type] // n_tokens)
    actions = batch.action_mask.nonzero()[:, 0]
    picked, entropy = model.packed_forward(  # pyright: ignore[reportCallIssue]
        _inputs(batch), actions - 1, batch.input_ids[actions], temperature, n_tokens, chunk,
        with_entropy,
    )  # fmt: skip
    zeros = picked.new_zeros(len(batch.input_ids))
    logprobs = zeros.index_put((actions,), picked)
    return logprobs, zeros.index_put((actions,), entropy) if with_entropy else None


def token_values(critic: Critic, batch: Batch) -> Tensor:
    """(T,) value of the state before each action token; 0 at other tokens."""
    actions = batch.action_mask.nonzero()[:, 0]
    values = critic.packed_forward(_inputs(batch), actions - 1)[:, 0]
    return values.new_zeros(len(batch.input_ids)).index_put((actions,), values)


def _packed_logprobs(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    states: Tensor,
    targets: Tensor,
    temperature: float,
    n_tokens: int,
    chunk: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    hidden = _hidden(model.get_decoder(), inputs)[states]
    weight = _weight(model.get_output_embeddings())[:n_tokens]
    return _ChunkedLogprobs.apply(hidden, weight, targets, temperature, chunk, with_entropy)


def _hidden(backbone: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """(T, width) last hidden states."""
    return backbone(**inputs, use_cache=False).last_hidden_state[0]


def _inputs(batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "layout": layout_of(batch),
    }
