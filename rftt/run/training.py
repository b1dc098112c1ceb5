"""Manage one training run: log, checkpoints, resume, SIGTERM, token budget, export.

A checkpoint contains the Learner's weights and moments and `Run.state`, the JSON that a script
needs to continue exactly where it stopped. 2N steps equal N steps, a resume and N more, bit for bit
on a CPU.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rftt.learner.attention import use_flash_kernels
from rftt.learner.checkpoint import Checkpoints, export_hf, latest, newest_whole, try_saving
from rftt.learner.fsdp import World, own_tensors, whole
from rftt.learner.lora import adapter, lora_config, save_adapter, trained_share, why_not_alone
from rftt.run.cli import check_same_run, stop_on_signals
from rftt.run.config import RLConfig, SFTConfig
from rftt.run.files import write_json, write_jsonl
from rftt.run.log import Clock, RunLog
from rftt.run.provenance import MadeFrom, made_from, trained_from
from rftt.run.stats import examples, tree_record
from rftt.types import Problem, Rollout, UserError

if TYPE_CHECKING:
    from rftt.mcts import Tree
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
        if world.device.type == "cuda":
            self.info(use_flash_kernels(torch.cuda.get_device_capability()))
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
            for name in ("adapter", "checkpoints", "samples", "trees"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self._checkpoints = Checkpoints(
            self.folder,
            self._world,
            self._tokenizer,
            keep=cfg.save_total_limit,
            dtype=cfg.dtype,
            best=best_score,
        )
        self._log.rewind(self.first_step)
        for name, module in learner.modules.items():
            self.info(f"{name}: {trained_share(module)}")
        self._world.gather_or_raise(self._try_saving)
        self._stop = stop_on_signals()

    @property
    def is_new(self) -> bool:
        """Return whether the run starts without a checkpoint."""
        return self._checkpoint is None

    def require_same_rows(self, rows: Sequence[object]) -> None:
        """Raise UserError if the run started with other rows, or from other weights."""
        assert isinstance(self._cfg, SFTConfig), "online training has problems"
        self._require_same("source", trained_from(self._cfg, rows))

    def require_same_source(
        self, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Raise UserError if the run started with other problems, prompts or initial weights."""
        assert isinstance(self._cfg, RLConfig), "offline training has no problems"
        self._require_same("source", made_from(self._cfg, tokenizer, problems))

    def _require_same(self, name: str, digests: MadeFrom) -> None:
        before = self.state.setdefault(name, digests)
        changed = [what for what, digest in digests.items() if before.get(what) != digest]
        if changed:
            raise UserError(
                f"{self.folder} was begun with other {' and '.join(changed)}; use a new output_dir "
                "for these, or overwrite_output_dir: true."
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

    def is_saved(self, n_steps: int) -> bool:
        """Return whether `save_steps` demanded a checkpoint after `n_steps` steps."""
        return n_steps > 0 and self.is_due(n_steps - 1)

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

    def rate_if_saved(self, n_steps: int, score: float) -> None:
        """Rate the weights after `n_steps` steps if they belong to a checkpoint."""
        if self.is_saved(n_steps):
            self.rate(n_steps, score)

    def save_if_due(self, step: int) -> None:
        """Write a checkpoint after `step` if one is due, at the end, and when asked to stop.

        After SIGTERM or Ctrl-C the process exits, and the run continues when it is started again.
        Collective.
        """
        stopped = int(self._world.max(float(self._stop.code)))
        if stopped or self.is_due(step) or self.is_last(step):
            learner = self._learner
            self._checkpoints.save(step + 1, learner.modules, learner.optimizers, self.state)
        if stopped:
            self._checkpoints.close()
            self.info("stopped with a checkpoint; start the same command again to continue")
            raise SystemExit(stopped)

    def write_examples_if_due(
        self, step: int, rollouts: list[Rollout], example: tuple[Tree, Problem] | None
    ) -> None:
        """Write one rollout of each of a few groups, and one tree, beside a due checkpoint."""
        if not self._world.is_main or not self.is_due(step):
            return
        name = f"step_{step:06d}"
        write_jsonl(self.folder / "samples" / f"{name}.jsonl", examples(rollouts, self._tokenizer))
        if example:
            record = tree_record(*example, self._tokenizer)
            write_json(self.folder / "trees" / name / "0.json", record)

    def finish(self) -> None:
        """Export the policy as a Hugging Face folder. Collective."""
        self._checkpoints.close()
        policy = cast(PreTrainedModel, self._learner.modules["policy"])
        export_hf(policy, self._tokenizer, self.folder / "hf", self._world, self._cfg.dtype)
        self.info(f"model written to {self.folder / 'hf'}")
        if lora_config(policy):
            self._write_adapter(policy)

    def _write_adapter(self, policy: PreTrainedModel) -> None:
        """Write the adapter alone, if peft and vLLM can add it to the model. Collective."""
        folder, base = self.folder / "adapter", self._cfg.model_name_or_path
        if reason := why_not_alone(policy):
            self.info(f"no adapter folder: {reason}; the merged model has everything")
            return
        tensors, settings = adapter(policy, own_tensors(policy), whole)
        if self._world.is_main:
            save_adapter(policy, tensors, settings, base, folder)
            self._tokenizer.save_pretrained(folder)
        self._world.barrier()
        self.info(f"adapter of {base} written to {folder}")

    def _try_saving(self) -> None:
        if self._world.is_main:
            policy = cast(PreTrainedModel, self._learner.modules["policy"])
            try_saving(policy, self._tokenizer, self.folder)

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
