"""Manage one training run: log, checkpoints, resume, SIGTERM, token budget, export.

A checkpoint contains the Learner's weights and moments and `Run.state`, the JSON that a script
needs to continue exactly where it stopped. 2N steps equal N steps, a resume and N more, bit for bit
on a CPU.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rftt.learner.checkpoint import Checkpoints, export_hf, latest, newest_whole
from rftt.learner.fsdp import World
from rftt.run.cli import STOPPED, check_same_run, stop_on_sigterm
from rftt.run.config import RLConfig, SFTConfig
from rftt.run.log import Clock, RunLog
from rftt.types import UserError

if TYPE_CHECKING:
    from rftt.update import Learner


class Run:
    """A run of a training script that starts at its first step or at its newest checkpoint."""

    def __init__(
        self,
        cfg: SFTConfig | RLConfig,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        line: Sequence[str],
    ) -> None:
        """Open the log. `line` lists the metrics to print. Collective.

        Raises UserError if the run directory cannot be continued with this configuration.
        """
        self.folder = Path(cfg.output_dir)
        self._cfg, self._world, self._tokenizer, self._line = cfg, world, tokenizer, line
        self._checkpoint = _checkpoint_to_resume(cfg, world)
        self._log = RunLog(self.folder, asdict(cfg), enabled=world.is_main, report_to=cfg.report_to)
        self.info = self._log.info
        self.clock = Clock()
        self.state: dict[str, Any] = {}
        """JSON values that every checkpoint stores beside weights and moments."""

    def resume(self, learner: Learner) -> None:
        """Load the newest checkpoint, if one exists, and prepare to write others. Collective."""
        self._learner, cfg = learner, self._cfg
        self.state = learner.load(self._checkpoint) if self._checkpoint else {}
        self.first_step: int = self.state.pop("step", 0)
        best_score: float = self.state.pop("best_score", -math.inf)
        if cfg.overwrite_output_dir and self._world.is_main:  # the log's lock makes it safe by now
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self._checkpoints = Checkpoints(
            self.folder,
            self._world,
            self._tokenizer,
            keep=cfg.save_total_limit,
            dtype=cfg.dtype,
            best=best_score,
        )
        self._log.rewind(self.first_step)
        self._asked_to_stop = stop_on_sigterm()

    @property
    def is_new(self) -> bool:
        """Return whether the run starts without a checkpoint."""
        return self._checkpoint is None

    def require_same_rows(self, rows: Sequence[object]) -> None:
        """Raise UserError where the run was begun with other rows than these."""
        digest = hashlib.sha256(repr(rows).encode()).hexdigest()
        if self.state.setdefault("data", digest) != digest:
            raise UserError(
                f"{self.folder} was begun with other rows; use a new output_dir for these."
            )

    def steps(self, total: int, max_tokens: int | None = None) -> Iterator[int]:
        """Yield the remaining steps of `total` until `max_tokens` tokens have been generated."""
        self._total, self._max_tokens = total, max_tokens or math.inf
        for step in range(self.first_step, total):
            if self._is_spent():
                return
            self.clock = Clock()
            yield step

    def is_due(self, step: int) -> bool:
        """Return whether `save_steps` demands a checkpoint after `step`."""
        return bool(self._cfg.save_steps) and (step + 1) % self._cfg.save_steps == 0

    def is_last(self, step: int) -> bool:
        """Return whether `step` ends the run. It must have been logged before."""
        return step + 1 == self._total or self._is_spent()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step. Generated tokens count towards the budget."""
        if "tokens_generated" in metrics:
            before = self.state.get("tokens_generated", 0.0)
            self.state["tokens_generated"] = before + metrics["tokens_generated"]
        self._log.step(step, metrics, self._line, total=self._total)

    def rate(self, n_steps: int, score: float) -> None:
        """Mark the checkpoint after `n_steps` steps as `best` if its score is the highest."""
        self._checkpoints.rate(n_steps, score)

    def save_if_due(self, step: int) -> None:
        """Write a checkpoint after `step` if one is due, at the end, and on SIGTERM. Collective.

        After SIGTERM the process exits, and the run continues when it is started again.
        """
        stopped = self._world.max(float(self._asked_to_stop.is_set())) > 0
        if stopped or self.is_due(step) or self.is_last(step):
            learner = self._learner
            self._checkpoints.save(step + 1, learner.modules, learner.optimizers, self.state)
        if stopped:
            self._checkpoints.close()
            raise SystemExit(STOPPED)

    def finish(self) -> None:
        """Export the policy as a Hugging Face folder. Collective."""
        self._checkpoints.close()
        policy = cast(PreTrainedModel, self._learner.modules["policy"])
        export_hf(policy, self._tokenizer, self.folder / "hf", self._world, self._cfg.dtype)
        self.info(f"model written to {self.folder / 'hf'}")

    def _is_spent(self) -> bool:
        return self.state.get("tokens_generated", 0.0) >= self._max_tokens


def _checkpoint_to_resume(cfg: SFTConfig | RLConfig, world: World) -> Path | None:
    """Return the newest undamaged checkpoint of this run, or None for a new run. Collective.

    Raises UserError if the run cannot be continued with this configuration.
    """
    out = Path(cfg.output_dir)
    if cfg.train_batch_size < world.size:
        raise UserError(
            f"train_batch_size must be at least the number of ranks, {world.size}, got "
            f"{cfg.train_batch_size}; raise it or use fewer ranks."
        )
    begun = latest(out) is not None
    world.barrier()  # all ranks have looked
    if cfg.overwrite_output_dir:
        return None
    if begun and isinstance(cfg, RLConfig) and cfg.resume_from_checkpoint == "never":
        raise UserError(
            f"{out} has checkpoints, but resume_from_checkpoint is never; set "
            "resume_from_checkpoint: auto or overwrite_output_dir: true, or use a new output_dir."
        )
    if begun:
        check_same_run(out / "config.yaml", asdict(cfg))
    return newest_whole(out, world)
