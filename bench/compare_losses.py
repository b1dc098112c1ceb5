"""Compare our GRPO and DPO losses with TRL's on the same log-probs: value and gradient.

    PYTHONPATH=. .venv-bench/bin/python bench/compare_losses.py    (after make bench-env)

TRL's trainers are not built. Their `_compute_loss` is called on a stand-in object, which has the
needed attributes and returns our log-probs. The output is one JSON object of largest differences.
Each of them is printed on stderr as soon as it is computed. The exit code is 1 if one exceeds 1e-5.
TRL 1.16 has no PPO, so GAE and the value loss are not compared here.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer

from rftt import rl
from rftt.learner import offline

ROWS, TOKENS, LIMIT = 8, 24, 1e-5


def noise(*shape: int, seed: int) -> Tensor:
    """Return standard normal numbers that depend on the seed only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lengths_mask(seed: int) -> Tensor:
    """Return the (ROWS, TOKENS) mask of responses with 3 … TOKENS tokens."""
    lengths = torch.randint(3, TOKENS + 1, (ROWS, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(TOKENS) < lengths


def difference(ours: Tensor, theirs: Tensor, leaf: Tensor) -> float:
    """Return the larger of the losses' and the gradients' largest difference."""
    (mine,) = torch.autograd.grad(ours, leaf, retain_graph=True)
    (other,) = torch.autograd.grad(theirs, leaf)
    return max(abs(float(ours.detach() - theirs.detach())), float((mine - other).abs().max()))


def stand_in(**values: object) -> MagicMock:
    """Return a stand-in for a trainer with the attributes `values`. Its logging is discarded."""
    fake = MagicMock()
    for name, value in values.items():
        setattr(fake, name, value)
    fake.model.training = True
    fake.accelerator.num_processes = 1
    fake.accelerator.device = torch.device("cpu")
    fake.accelerator.gather = fake.accelerator.gather_for_metrics = lambda x: x
    fake._metrics = {"train": defaultdict(list)}
    return fake


def grpo(seed: int, loss_type: str, high: float, beta: float) -> float:
    """Return the largest difference of the GRPO losses.

    TRL's `grpo` is our sequence normalisation, and its `bnpo` is our token mean.
    """
    mask = lengths_mask(seed)
    new = (noise(ROWS, TOKENS, seed=seed) * 0.4 - 2).requires_grad_()
    old, ref = (new.detach() + noise(ROWS, TOKENS, seed=seed + k) * 0.3 for k in (1, 2))
    outcomes, groups = noise(ROWS, seed=seed + 3).tolist(), [0] * (ROWS // 2) + [1] * (ROWS // 2)
    advantages = torch.tensor(rl.group_advantages(outcomes, groups, scale=True))
    trainer = stand_in(
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=beta, loss_type=loss_type, epsilon_low=0.2,
        epsilon_high=high, use_vllm=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
    )  # fmt: skip
    ids = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "advantages": advantages,
        "completion_mask": mask.long(), "old_per_token_logps": old, "ref_per_token_logps": ref,
    }  # fmt: skip
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    flat, lengths = mask.flatten(), [TOKENS] * ROWS
    weights = flat.float()
    if loss_type == "grpo":
        weights = rl.sequence_weights(flat, lengths, lambda x: x)
    ours, _ = rl.policy_loss(
        new.flatten(), old.flatten(), advantages.repeat_interleave(TOKENS), flat,
        epsilon=0.2, epsilon_high=high, weights=weights,
    )  # fmt: skip
    kl = rl.kl_estimate(new.flatten(), ref.flatten(), "k3") * weights
    return difference((ours + beta * kl.sum()) / flat.sum(), theirs, new)


def dpo(seed: int, beta: float) -> float:
    """Return the largest difference of the DPO losses."""
    mask = lengths_mask(seed)
    mask[:, 0] = False  # the prompt
    new = (noise(ROWS, TOKENS - 1, seed=seed) - 2).requires_grad_()
    kept = new * mask[:, 1:]
    ref = noise(ROWS, seed=seed + 1) + kept.detach().sum(1)
    trainer = stand_in(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, beta=beta,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        use_weighting=False, _tp_size=1, _total_train_tokens=0,
    )  # fmt: skip
    chosen_ref, rejected_ref = ref.chunk(2)
    inputs = {
        "input_ids": torch.ones(ROWS, TOKENS, dtype=torch.int64), "completion_mask": mask.long(),
        "ref_chosen_logps": chosen_ref, "ref_rejected_logps": rejected_ref,
    }  # fmt: skip
    inputs["attention_mask"] = inputs["input_ids"]
    unused = torch.zeros(ROWS, TOKENS - 1)
    outputs = SimpleNamespace(
        log_probs=kept, entropy=unused, mean_logits=unused, is_top1=unused.bool()
    )
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    chosen, rejected = kept.sum(1).chunk(2)
    ours, _ = offline.dpo_loss(chosen, rejected, chosen_ref, rejected_ref, beta)
    return difference(ours / (ROWS // 2), theirs, new)


def main() -> None:
    """Compare all losses on 20 seeds each."""
    found = {}
    for name, loss_type in (("token mean", "bnpo"), ("sequence mean", "grpo")):
        for high, beta in ((0.2, 0.0), (0.28, 0.04)):
            key = f"grpo, {name}, clip 0.2/{high}, KL {beta}"
            found[key] = max(grpo(10 * s, loss_type, high, beta) for s in range(20))
            print(f"{key}: {found[key]:.3g}", file=sys.stderr)
    for beta in (0.1, 0.5):
        key = f"dpo, beta {beta}"
        found[key] = max(dpo(10 * s, beta) for s in range(20))
        print(f"{key}: {found[key]:.3g}", file=sys.stderr)
    print(json.dumps(found, indent=1))
    sys.exit(any(value > LIMIT for value in found.values()))


if __name__ == "__main__":
    main()
