"""Handle updates whose loss or gradient is not finite: name the sample, dump it, stop the run.

The update itself is skipped in update.py, on all ranks. This module names the sample, writes its
minibatch to debug/ as JSON, and stops the run after several such updates in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from rftt.batch import Batch
from rftt.learner.fsdp import World, clip_gradients, empty_like
from rftt.rl import Metrics
from rftt.run.files import write_json
from rftt.types import UserError

LIMIT = 3
"""Number of consecutive skipped updates that stops the run."""
INPUTS = (
    *("rewards", "sampling_logprobs", "old_logprobs", "ref_logprobs"),
    *("values", "returns", "advantages"),
)
"""Tensors of a batch in the order in which they are computed."""
Loss = Callable[[Batch], tuple[Tensor, Metrics]]
"""The loss of a microbatch, summed over its terms, and sums of metrics."""


@dataclass
class Guard:
    """A check of every update of a run."""

    folder: Path
    modules: Mapping[str, nn.Module]
    world: World
    log: Callable[[str], None]
    in_a_row: int = 0
    """Number of consecutive skipped updates."""

    def check(self, finite: bool, step: int, batch: Batch, loss_of: Loss) -> None:
        """Report an update of `batch` that was not `finite`. Collective in that case.

        `loss_of` is called again on each document alone. Raises UserError after LIMIT consecutive
        skipped updates.
        """
        if finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        sample, tensor = find(self.modules, batch, loss_of, self.world)
        dump(self.folder / f"step_{step:06d}_rank_{self.world.rank}.json", batch)
        what = "gradient" if tensor == "gradient" else "loss"
        message = (
            f"{what} is NaN or infinite at step {step} (first bad tensor: {tensor}, sample id "
            f"{sample}). Batch dumped to {self.folder}/."
        )
        if self.in_a_row == LIMIT:
            raise UserError(
                f"{message} This is update {LIMIT} in a row; check the sample, or lower "
                "learning_rate."
            )
        self.log(f"{message} Update skipped.")


def find(
    modules: Mapping[str, nn.Module], batch: Batch, loss_of: Loss, world: World
) -> tuple[str, str]:
    """Return (sample, first bad tensor): an input, "loss" or "gradient". Collective.

    The earliest bad tensor is the source, because whitening spreads one bad reward over all
    advantages.
    """
    mine = [
        (stage, world.rank, document)
        for stage, name in enumerate(INPUTS)
        if (tensor := getattr(batch, name)) is not None
        for document, part in enumerate(tensor.split(batch.lengths))
        if not part.isfinite().all()
    ]
    everyone = world.gather((mine[:1], batch.names))
    if bad := [first for found, _ in everyone for first in found]:
        stage, rank, document = min(bad)
        return everyone[rank][1][document], INPUTS[stage]
    for rank, (_, names) in enumerate(everyone):  # one document of one rank at a time
        for document in range(0, len(names), batch.documents_per_term):
            own = range(document, document + batch.documents_per_term)
            loss, _ = loss_of(batch.select(own) if rank == world.rank else empty_like(batch))
            loss.backward()
            norms = [clip_gradients(module, math.inf) for module in modules.values()]
            for module in modules.values():
                module.zero_grad()
            if not math.isfinite(world.sum(float(loss.detach()))):
                return names[document], "loss"
            if not all(map(math.isfinite, norms)):
                return names[document], "gradient"
    return "of no document alone", "gradient"


def dump(path: Path, batch: Batch) -> None:
    """Write every document with its tensors. Numbers that are not finite are written as text."""
    tensors = {name: getattr(batch, name) for name in ("input_ids", "action_mask", *INPUTS)}
    parts = {k: x.split(batch.lengths) for k, x in tensors.items() if isinstance(x, Tensor)}
    documents = [
        {"sample": sample}
        | {k: [x if math.isfinite(x) else str(x) for x in parts[k][i].tolist()] for k in parts}
        for i, sample in enumerate(batch.names)
    ]
    write_json(path, documents)
