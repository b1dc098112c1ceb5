"""Updates whose loss or gradient is not finite: who did it, what it looked like, when to give up.

The update itself is skipped in update.py, on all ranks. Here the sample is named, its minibatch is
written to debug/ as JSON, and the run is stopped when it happens again and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from rftt.batch import Batch, empty_like
from rftt.learner.fsdp import World, clip_gradients
from rftt.run.files import write_json
from rftt.types import UserError

LIMIT = 3
"""Skipped updates in a row that stop the run."""
INPUTS = (
    *("rewards", "sampling_logprobs", "old_logprobs", "ref_logprobs"),
    *("values", "returns", "advantages"),
)
"""Tensors of a batch in the order in which they come about."""
Loss = Callable[[Batch], Tensor]


@dataclass
class Guard:
    """Looks at every update of a run."""

    folder: Path
    modules: Mapping[str, nn.Module]
    world: World
    say: Callable[[str], None]
    skipped: int = 0
    """Updates skipped in this step; the caller reads it and sets it back."""
    in_a_row: int = 0

    def check(
        self,
        norms: Mapping[str, float],
        step: int,
        batch: Batch,
        names: Sequence[str],
        loss_of: Loss,
    ) -> None:
        """After an update of `batch` with gradient `norms`. Collective where one is not finite.

        `names` are the ids of this rank's documents; `loss_of` is called again on each alone.
        Raises UserError after LIMIT skipped updates in a row.
        """
        if all(map(math.isfinite, norms.values())):
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        sample, tensor = find(self.modules, batch, names, loss_of, self.world)
        dump(self.folder / f"step_{step:06d}_rank_{self.world.rank}.json", batch, names)
        what = "gradient" if tensor == "gradient" else "loss"
        message = (
            f"{what} is NaN or infinite at step {step} (first bad tensor: {tensor}, sample id "
            f"{sample}). Batch dumped to {self.folder}/."
        )
        if self.in_a_row == LIMIT:
            raise UserError(
                f"{message} It is update {LIMIT} in a row: look at the sample, or lower "
                "learning_rate."
            )
        self.say(f"{message} Update skipped.")


def find(
    modules: Mapping[str, nn.Module],
    batch: Batch,
    names: Sequence[str],
    loss_of: Loss,
    world: World,
) -> tuple[str, str]:
    """(sample, first bad tensor) over all ranks: an input, else "loss" or "gradient". Collective.

    Whitening spreads one bad reward over every advantage: the earliest tensor tells the source.
    """
    mine = [
        (stage, world.rank, document)
        for stage, name in enumerate(INPUTS)
        if (tensor := getattr(batch, name)) is not None
        for document, part in enumerate(tensor.split(batch.lengths))
        if not part.isfinite().all()
    ]
    everyone = world.gather((mine[:1], list(names)))
    if bad := [first for found, _ in everyone for first in found]:
        stage, rank, document = min(bad)
        return everyone[rank][1][document], INPUTS[stage]
    for rank, (_, others) in enumerate(everyone):  # a document of one rank at a time
        for document in range(0, len(others), batch.together):
            own = range(document, document + batch.together)
            loss = loss_of(batch.select(own) if rank == world.rank else empty_like(batch))
            loss.backward()
            norms = [clip_gradients(module, math.inf) for module in modules.values()]
            for module in modules.values():
                module.zero_grad()
            if not math.isfinite(world.sum(float(loss.detach()))):
                return others[document], "loss"
            if not all(map(math.isfinite, norms)):
                return others[document], "gradient"
    return "of no document alone", "gradient"


def dump(path: Path, batch: Batch, names: Sequence[str]) -> None:
    """Every document with its tensors; numbers that are not finite as text."""
    tensors = {name: getattr(batch, name) for name in ("input_ids", "action_mask", *INPUTS)}
    parts = {k: x.split(batch.lengths) for k, x in tensors.items() if isinstance(x, Tensor)}
    documents = [
        {"sample": sample}
        | {k: [x if math.isfinite(x) else str(x) for x in parts[k][i].tolist()] for k in parts}
        for i, sample in enumerate(names)
    ]
    write_json(path, documents)
