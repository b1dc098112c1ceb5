"""Load Hugging Face causal language models for packed batches, and critics.

Attention never crosses documents (attention.py), and other layers process no padding tokens.
"""

from __future__ import annotations

from inspect import getsource
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from rftt.engines.opened import HEADS, open_model, quiet
from rftt.learner.attention import ATTENTION
from rftt.learner.logprobs import hidden_states, packed_logprobs
from rftt.rl import WorldSum, kl_estimate

if TYPE_CHECKING:
    from rftt.batch import Batch
    from rftt.learner.fsdp import World

# ---- Loading ----


def load_policy(
    path: str,
    dtype: torch.dtype,
    *,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
) -> PreTrainedModel:
    """Load a causal language model from a Hugging Face folder or hub id, on the CPU.

    Raises UserError if no model is found, or (with `check`) if its files are not those of one.
    Whether its packed log-probs are right is for check.py:check_policy.
    """
    model = open_model(
        AutoModelForCausalLM, path, dtype, trust_remote_code=trust_remote_code, check=check
    )
    return prepare(model, gradient_checkpointing=gradient_checkpointing)


def prepare(model: PreTrainedModel, *, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """Make a causal language model accept packed batches, in place (see `token_logprobs`)."""
    with quiet():  # check.py finds a model that takes no other attention
        model.set_attn_implementation(ATTENTION)
    _spare_memory(model.eval(), gradient_checkpointing)
    # FSDP gathers the root's weights around `forward` or a method that fsdp.shard registers.
    model.packed_forward = MethodType(packed_logprobs, model)  # pyright: ignore[reportArgumentType]
    return model


GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"


def _spare_memory(model: PreTrainedModel, gradient_checkpointing: bool) -> None:
    """Reduce the activations that are kept for the backward pass.

    With gradient checkpointing each layer keeps only its input. Otherwise gated MLPs do not keep
    their product, which saves a quarter of a layer's activations and costs one elementwise pass. A
    gated MLP is recognised by its formula. Other MLPs stay unchanged.
    """
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # of the layer alone: it checkpoints only in this mode
        return
    kinds = {type(module) for module in model.modules()}
    gated = tuple(kind for kind in kinds if GATED in getsource(kind.forward))
    for module in model.modules():
        if isinstance(module, gated):
            module.forward = MethodType(_gated, module)


def _gated(mlp: Any, x: Tensor) -> Tensor:
    # Recomputation stops at the input of down_proj, the last tensor that the backward pass needs.
    return checkpoint(
        lambda gate, up: mlp.down_proj(mlp.act_fn(gate) * up),
        mlp.gate_proj(x),
        mlp.up_proj(x),
        use_reentrant=False,
        preserve_rng_state=False,
    )


class Critic(nn.Module):
    """A value model, V(state before emitting token t): a backbone with a scalar head."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, dtype=backbone.dtype)
        # A zero head: the first values are 0 instead of noise, so rewards alone decide at first.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def packed_forward(self, inputs: dict[str, Any], states: Tensor) -> Tensor:
        """Return (A, 1) values at the A positions `states`."""
        return self.head(hidden_states(self.backbone, inputs)[states]).float()


def load_critic(
    path: str,
    dtype: torch.dtype,
    *,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
) -> Critic:
    """Load a critic whose backbone starts from that of a causal language model.

    Raises UserError as load_policy does.
    """
    backbone = open_model(
        AutoModel, path, dtype, trust_remote_code=trust_remote_code, check=check, extra=HEADS
    )
    with quiet():
        backbone.set_attn_implementation(ATTENTION)
    _spare_memory(backbone, gradient_checkpointing)
    return Critic(backbone)


def critic_metrics(
    values: Tensor | None, returns: Tensor | None, mask: Tensor, world_sum: WorldSum
) -> dict[str, float]:
    """Return the explained variance 1 − Var(R − V) / Var(R) over all ranks.

    It is 0 for constant returns. Without a critic the result is {}.
    """
    if values is None or returns is None:
        return {}
    target, error = returns[mask].double(), (returns - values)[mask].double()
    moments = [target.new_tensor(len(target)), target.sum(), error.sum()]
    moments += [target.square().sum(), error.square().sum()]
    n, target_sum, error_sum, target_square, error_square = world_sum(torch.stack(moments)).tolist()
    variance = target_square - target_sum**2 / max(n, 1)
    unexplained = error_square - error_sum**2 / max(n, 1)
    return {"explained_variance": 1.0 - unexplained / variance if variance > 1e-12 else 0.0}


def score_metrics(batch: Batch, world: World) -> dict[str, float]:
    """Return the KL per token before the update, and how well the critic explains the returns."""
    old, reference, drawn = batch.old_logprobs, batch.ref_logprobs, batch.drawn
    metrics = critic_metrics(batch.values, batch.returns, batch.action_mask, world.sum)
    if old is not None and reference is not None:
        kl = kl_estimate(old, reference, "k3")[drawn].sum()  # ()
        n_drawn = world.sum(float(drawn.sum()))  # of all ranks
        metrics["kl"] = world.sum(float(kl)) / max(n_drawn, 1.0)
    return metrics
