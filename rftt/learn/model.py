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
CHUNK = 2048
"""Action tokens whose logits exist at one time: 1.2 GB in float32 for a vocabulary of 152k."""


# ---- Attention inside documents ----


@dataclass(frozen=True)
class Layout:
    """Where the documents lie in the packed sequence."""

    cu_seqlens: Tensor
    """(D + 1,) int32"""
    longest: int
    pad: Tensor
    """(D · longest,) packed index of each slot of the padded matrix; 0 in empty slots."""
    unpad: Tensor
    """(T,) slot of each packed token."""


def layout_of(batch: Batch) -> Layout:
    """The batch's layout on its device."""
    device, longest = batch.input_ids.device, max(batch.lengths)
    lengths, starts = torch.tensor(batch.lengths)[:, None], batch.starts
    column = torch.arange(longest)[None]
    filled = column < lengths
    pad = torch.where(filled, starts[:-1, None] + column, 0).flatten()
    unpad = filled.flatten().nonzero()[:, 0]
    return Layout(starts.to(device, torch.int32), longest, pad.to(device), unpad.to(device))


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
    """(H, T, d) -> (H, T, d) through a padded [D, H, longest, d]."""
    rows, width = len(layout.pad) // layout.longest, layout.longest

    def pad(x: Tensor) -> Tensor:
        packed = _Gather.apply(x, layout.pad, layout.unpad)
        return packed.unflatten(1, (rows, width)).transpose(0, 1)

    mask = None
    if window is not None and window < width:
        position = torch.arange(width, device=q.device)
        distance = position[:, None] - position[None]
        mask = (distance >= 0) & (distance < window)
    out = scaled_dot_product_attention(
        pad(q), pad(k), pad(v), mask, scale=scale, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(0, 1).flatten(1, 2).index_select(1, layout.unpad)


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

    The backward recomputes each chunk's logits: ∂logp = onehot − p and ∂H = −p (log p + H).
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
        entropy = torch.zeros(len(targets), device=hidden.device)
        normalizer = torch.empty(len(targets), device=hidden.device)
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ weight.T).float().div_(temperature)
            normalizer[rows] = logits.logsumexp(-1)
            picked = logits.gather(-1, targets[rows, None])[:, 0]
            logprobs[rows] = picked - normalizer[rows]
            if with_entropy:
                p = (logits - normalizer[rows, None]).exp_()
                entropy[rows] = normalizer[rows] - (p * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, normalizer, entropy)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer, entropy = ctx.saved_tensors
        slopes, grad_entropy = grads  # None where the loss does not use it
        slopes = torch.zeros_like(normalizer) if slopes is None else slopes
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(targets), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logp = (hidden[rows] @ weight.T).float().div_(ctx.temperature)
            logp.sub_(normalizer[rows, None])
            p = logp.exp()
            slope = slopes[rows, None]
            if grad_entropy is None:
                grad = p.mul_(-slope)
            else:
                logp.add_(entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(slope)
                grad = p.mul_(logp).neg_()
            grad.scatter_add_(-1, targets[rows, None], slope)
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def token_logprobs(
    model: PreTrainedModel,
    batch: Batch,
    temperature: float,
    n_tokens: int,
    *,
    chunk: int = CHUNK,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(T,) log π of each action token, and the policy's entropy there; 0 at other tokens.

    `n_tokens` is len(tokenizer): rows beyond it are padding that nobody may sample.
    """
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
