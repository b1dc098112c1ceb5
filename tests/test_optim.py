"""Test optim.py: schedules computed by hand, decay on matrices only."""

import importlib.util

import pytest
import torch
from torch import nn

from rftt.learner.optim import build_optimizer, lr_at, set_lr
from rftt.run.config import Training
from rftt.types import UserError


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.5, 1.0, 1.0, 0.868198, 0.55, 0.231802]),
    ],
)
def test_schedules_match_their_oracle(kind: str, expected: list[float]) -> None:
    cfg = Training(learning_rate=0.9, lr_scheduler_type=kind, warmup_ratio=0.25, min_lr_ratio=0.1)
    assert [lr_at(cfg, 1.0, s, 6) for s in range(6)] == pytest.approx(expected, abs=1e-6)
    assert lr_at(cfg, 1.0, 99, 6) == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_only_matrices_decay_and_the_rate_follows_set_lr() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = build_optimizer(Training(learning_rate=0.9, weight_decay=0.5), model, 0.0)
    set_lr(optimizer, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="installed")
def test_a_missing_bitsandbytes_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="bitsandbytes"):
        build_optimizer(Training(learning_rate=0.9, optim="adamw_8bit"), nn.Linear(2, 2), 1e-3)
