"""Add log-probs, values and weights to a batch, then update: the Learner steps the optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from rftt.batch import Batch
from rftt.learner.checkpoint import restore
from rftt.learner.fsdp import Totals, World, clip_gradients, empty_like, equal_count, per_token
from rftt.learner.guard import Guard, Loss
from rftt.learner.logprobs import token_logprobs, token_values
from rftt.learner.optim import build_optimizer, lr_at, set_lr
from rftt.learner.setup import Models
from rftt.rl import sequence_weights
from rftt.run.config import RLConfig, Training


def add_logprobs(cfg: RLConfig, models: Models, batch: Batch, world: World) -> Batch:
    """Add old_logprobs, ref_logprobs and values, each (T,), without gradients. Collective."""

    def each(score: Callable[[Batch], Tensor]) -> Tensor:
        return per_token(score, batch, cfg.max_tokens_per_microbatch, world)

    def logprobs(model: Any) -> Tensor:
        return each(lambda b: token_logprobs(model, b, cfg.temperature, models.vocabulary)[0])

    scored = batch.replace(old_logprobs=logprobs(models.policy))
    if models.reference:  # only a KL term needs it
        scored = scored.replace(ref_logprobs=logprobs(models.reference))
    if models.critic:  # only PPO has one
        scored = scored.replace(values=each(partial(token_values, models.critic)))
    return scored


def add_loss_weights(batch: Batch, cfg: RLConfig, world: World) -> Batch:
    """Add the weights of the tokens where they are not all 1. Collective."""
    if cfg.loss_normalization == "token":
        return batch
    weights = sequence_weights(batch.action_mask, batch.lengths, world.sum)  # (T,)
    return batch.replace(loss_weights=weights)


class Learner:
    """Owns the modules that are trained: optimizers, learning rates, clipping, skipped updates.

    A step of the run is `begin`, some updates (`step`), and `metrics` of all of them.
    """

    def __init__(
        self,
        cfg: Training,
        modules: Mapping[str, nn.Module],
        total_steps: int,
        world: World,
        debug: Path,
        log: Callable[[str], None],
    ) -> None:
        """`modules` has a policy and maybe a critic; `debug` is the folder for bad minibatches."""
        self._cfg, self._world, self._total_steps = cfg, world, total_steps
        self.modules = modules
        self._peak_rates = {"policy": cfg.learning_rate}
        if isinstance(cfg, RLConfig):
            self._peak_rates["critic"] = cfg.critic_learning_rate
        self.optimizers = {}
        for name, module in modules.items():
            self.optimizers[name] = build_optimizer(cfg, module, self._peak_rates[name])
        self._guard = Guard(debug, modules, world, log)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Load weights and moments in place; return what else the checkpoint holds. Collective."""
        return restore(checkpoint, self.modules, self.optimizers)

    def begin(self, step: int) -> None:
        """Set the learning rates of `step` and forget the metrics of the step before."""
        self._step = step
        self._totals, self._norms, self._n_terms = Totals(), list[float](), 0.0
        for name, optimizer in self.optimizers.items():
            set_lr(optimizer, lr_at(self._cfg, self._peak_rates[name], step, self._total_steps))

    def step(self, minibatch: Batch, loss_of: Loss) -> None:
        """Take one optimizer step of every module. Collective.

        `loss_of` sums over terms, which are tokens or pairs. The number of terms on all ranks is
        the one denominator, however they are divided into microbatches. An update whose loss or
        gradient is not finite is skipped on all ranks.
        """
        n_terms = self._world.sum(float(minibatch.n_terms))
        total = 0.0
        # Every microbatch reduces its gradients: whole ones would not fit beside the model.
        for group in equal_count(minibatch, self._cfg.max_tokens_per_microbatch, self._world):
            loss, metrics = loss_of(minibatch.select(group) if group else empty_like(minibatch))
            (loss / max(n_terms, 1.0)).backward()  # one denominator: see rl.py
            total = total + loss.detach()  # ()
            self._totals.add(metrics)
        norms = {}
        for name, module in self.modules.items():
            norms[name] = clip_gradients(module, self._cfg.max_grad_norm)
        if not math.isfinite(self._world.sum(float(total))):  # gradients may still be finite
            norms = dict.fromkeys(norms, math.nan)
        finite = all(map(math.isfinite, norms.values()))  # norms are global: all ranks agree
        for optimizer in self.optimizers.values():
            if finite:
                optimizer.step()
            optimizer.zero_grad()  # also after a skipped update
        self._norms.append(norms["policy"] if finite else math.nan)  # NaN marks a skipped update
        self._n_terms += n_terms
        self._guard.check(finite, self._step, minibatch, loss_of)

    def metrics(self) -> dict[str, float]:
        """Return means over the terms of all updates since `begin`. Collective."""
        metrics = self._totals.reduce(self._world, per=self._n_terms)
        rate = lr_at(self._cfg, self._peak_rates["policy"], self._step, self._total_steps)
        n_skipped = sum(map(math.isnan, self._norms))  # then the means are NaN as well
        metrics |= {
            "grad_norm": fmean(self._norms),
            "grad_norm_max": math.nan if n_skipped else max(self._norms),
            "updates_skipped": float(n_skipped),
            "learning_rate": rate,
        }
        return metrics
