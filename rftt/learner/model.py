"""Hugging Face causal language models on packed batches: loading, new rows, log-probs, values.

Attention never crosses documents (attention.py), and no other layer sees a padding token. Log-probs
come from hidden states in chunks over ACTION positions with a hand-written backward: [tokens,
vocabulary] never exists whole. Temperature is divided here and nowhere else in the trainer
(PAPER §1).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import getsource
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rftt.batch import Batch
from rftt.learner.attention import ATTENTION, Layout, layout_of
from rftt.learner.prefix_tree import forest_of
from rftt.tokens import CLOSERS, OPENERS, description_of
from rftt.types import UserError

CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**26}
"""Float32 logits at one time: on a CPU 8 MB, which stay in its caches; on a GPU 256 MB."""
KEPT_LOGITS = {"cpu": 2**24, "cuda": 2**28}
"""Logits kept for the backward rather than computed again."""


# ---- Arithmetic ----

ISAS_WITHOUT_BFLOAT16 = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
)
"""Values of ONEDNN_MAX_CPU_ISA that forbid every bfloat16 instruction for matrix products."""


def computes_in_bfloat16(device: torch.device | str) -> bool:
    """Return whether `device` multiplies bfloat16 matrices in hardware.

    A CPU without such instructions still accepts bfloat16. It emulates each product and is about
    100 times slower than in float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # PyTorch leaves these products to oneDNN, which is the only library whose limit matters:
    # ATEN_CPU_CAPABILITY and MKL_ENABLE_INSTRUCTIONS do not change their speed.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    if limit.upper() in ISAS_WITHOUT_BFLOAT16:
        return False
    found = torch.cpu.get_capabilities()
    instructions = ("amx_bf16", "avx512_bf16", "bf16")  # the last one is the name on ARM
    return any(found.get(name, False) for name in instructions)


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
    _spare_memory(model, gradient_checkpointing)
    # FSDP gathers the root's weights around `forward` or a method that distributed.shard registers.
    model.packed_forward = MethodType(_packed_logprobs, model)  # pyright: ignore[reportArgumentType]
    return model.train()


GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"


def _spare_memory(model: PreTrainedModel, gradient_checkpointing: bool) -> None:
    """Keep less for the backward: each layer's input, or all but what gated MLPs multiply.

    The latter is a quarter of a layer's activations at the price of one elementwise pass. An MLP is
    known by its formula: any other is left alone.
    """
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return
    kinds = {type(module) for module in model.modules()}
    gated = tuple(kind for kind in kinds if GATED in getsource(kind.forward))
    for module in model.modules():
        if isinstance(module, gated):
            module.forward = MethodType(_gated, module)


def _gated(mlp: Any, x: Tensor) -> Tensor:
    # Recomputation stops at the input of down_proj, which is the last thing that was saved.
    return checkpoint(
        lambda gate, up: mlp.down_proj(mlp.act_fn(gate) * up),
        mlp.gate_proj(x),
        mlp.up_proj(x),
        use_reentrant=False,
        preserve_rng_state=False,
    )


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
    _spare_memory(backbone, gradient_checkpointing)
    return Critic(backbone).train()


def _pretrained(
    auto: type, path: str, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    try:
        return auto.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:  # nothing there, or nothing that is a model
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
    if not new:
        return
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
    """log softmax(h Wᵀ / temperature) at the targets, and its entropy, `chunk` ids at a time.

    The forward is an online softmax over the chunks. The backward recomputes all logits but the
    `n_kept` first chunks: ∂logp = onehot − p and ∂H = −p (log p + H). A chunk is a slice of the
    vocabulary, not of the tokens, so that each row of the weight's gradient is one sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
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
            raw = hidden @ weight[start : min(start + starts.step, starts.stop)].T
            kept += [raw] if len(kept) < n_kept else []
            logits = _divided(raw.to(wide), temperature)
            column, inside = _place(targets, start, logits.shape[1])
            picked = torch.where(inside, logits.gather(-1, column)[:, 0], picked)
            before, peak = peak, torch.maximum(peak, logits.amax(-1))
            mass, shrink = (logits - peak[:, None]).exp_(), (before - peak).exp_()
            total = total * shrink + mass.sum(-1)
            if with_entropy:
                mean = mean * shrink + mass.mul_(logits).sum(-1)
        normalizer = peak + total.log()
        entropy = normalizer - mean / total
        ctx.save_for_backward(hidden, weight, targets, normalizer, entropy, *kept)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.starts = temperature, starts
        return picked - normalizer, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer, entropy, *kept = ctx.saved_tensors
        slopes, grad_entropy = grads  # None where the loss does not use it
        slopes = torch.zeros_like(normalizer) if slopes is None else slopes
        grad_hidden = torch.zeros_like(hidden, dtype=normalizer.dtype)
        grad_weight = torch.empty_like(weight)
        grad_weight[ctx.starts.stop :] = 0
        for number, start in enumerate(ctx.starts):
            rows = slice(start, min(start + ctx.starts.step, ctx.starts.stop))
            raw = kept[number] if number < len(kept) else hidden @ weight[rows].T
            logp = _divided(raw.to(normalizer.dtype), ctx.temperature) - normalizer[:, None]
            factor = -slopes[:, None]
            if grad_entropy is not None:
                factor = factor - grad_entropy[:, None] * (logp + entropy[:, None])
            grad = logp.exp_().mul_(factor)
            column, inside = _place(targets, start, grad.shape[1])
            grad.scatter_add_(-1, column, (slopes * inside)[:, None])
            grad = _divided(grad, ctx.temperature).to(hidden.dtype)
            torch.mm(grad.T, hidden, out=grad_weight[rows])
            if grad.dtype == grad_hidden.dtype:
                grad_hidden.addmm_(grad, weight[rows])
            else:  # the sum over chunks stays in float32
                grad_hidden += grad @ weight[rows]
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None


def _divided(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1.0 else x / temperature


def _place(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """(A, 1) column of each target in the chunk of `width` ids from `start`; which are there."""
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
    """(T,) log π of each action token, and the policy's entropy there; 0 at other tokens.

    `n_tokens` is len(tokenizer): rows beyond it are padding that nobody may sample. `chunk` is for
    how many ids there are logits at one time (default: CHUNK_LOGITS over the wanted tokens).
    """
    view = _view(batch)
    picked, entropy = model.packed_forward(  # pyright: ignore[reportCallIssue]
        view.inputs, view.states, view.targets, temperature, n_tokens, chunk, with_entropy
    )
    return view.place(picked), view.place(entropy) if with_entropy else None


def token_values(critic: Critic, batch: Batch) -> Tensor:
    """(T,) value of the state before each action token; 0 at other tokens."""
    view = _view(batch)
    return view.place(critic.packed_forward(view.inputs, view.states)[:, 0])


def _packed_logprobs(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    states: Tensor,
    targets: Tensor,
    temperature: float,
    n_tokens: int,
    chunk: int | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    hidden = _hidden(model.get_decoder(), inputs)[states]
    weight, kind, n = _weight(model.get_output_embeddings()), hidden.device.type, len(targets) or 1
    starts = range(0, n_tokens, chunk or max(CHUNK_LOGITS[kind] // n, 256))
    n_kept = KEPT_LOGITS[kind] // (starts.step * n)
    return _ChunkedLogprobs.apply(
        hidden, weight, targets, temperature, starts, n_kept, with_entropy
    )


def _hidden(backbone: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """(T, width) last hidden states."""
    return backbone(**inputs, use_cache=False).last_hidden_state[0]


@dataclass(frozen=True)
class _View:
    """What the model computes for a batch: N packed tokens, A wanted states."""

    inputs: dict[str, Any]
    states: Tensor
    """(A,) packed index of the token before each wanted one."""
    targets: Tensor
    """(A,) ids of the wanted tokens."""
    n_tokens: int
    actions: Tensor
    """Action tokens of the batch, and"""
    which: Tensor | None
    """which of the A speaks for each; None: each its own."""

    def place(self, x: Tensor) -> Tensor:
        """(A,) -> (T,), 0 at tokens that are no actions."""
        x = x if self.which is None else x.index_select(0, self.which)
        return x.new_zeros(self.n_tokens).index_put((self.actions,), x)


def _view(batch: Batch) -> _View:
    ids, device, n = batch.input_ids, batch.input_ids.device, len(batch.input_ids)
    actions = batch.action_mask.nonzero()[:, 0]
    if not batch.tree:
        layout = layout_of(batch.lengths, [0] * len(batch.lengths), None, device)
        inputs = _inputs(ids, batch.position_ids, layout)
        return _View(inputs, actions - 1, ids[actions], n, actions, None)
    forest = forest_of(ids, batch.lengths, batch.starts)
    layout = layout_of(forest.new, forest.shared, forest.path, device)
    inputs = _inputs(ids[forest.token], batch.position_ids[forest.token], layout)
    nodes, which = forest.node[actions].unique(return_inverse=True)
    wanted = forest.token[nodes]
    return _View(inputs, forest.node[wanted - 1], ids[wanted], n, actions, which)


def _inputs(input_ids: Tensor, position_ids: Tensor, layout: Layout) -> dict[str, Any]:
    return {"input_ids": input_ids[None], "position_ids": position_ids[None], "layout": layout}
