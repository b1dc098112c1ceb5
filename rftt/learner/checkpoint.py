"""Write checkpoints that survive kill −9 and resume bit for bit, on any number of ranks.

`<run_dir>/checkpoints/step_000040/{hf/, state/, extra.json, COMPLETE}`, files `latest` and `best`.
Weights and optimizer state use torch's distributed checkpoint (DCP) in its safetensors format.
Every rank writes its shards, and a reader with another world size reads the slices it needs. DCP's
default format is not used because its metadata is a pickle. Hyper-parameters of the optimizer are
not saved, because they follow from the config and the step.

Training waits only for the copy to host memory. A thread writes the copy, with its own collectives.
COMPLETE is written last and contains a checksum of every file. All files are forced to the disk
before it. The ranks must share one file system.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rftt.engines.opened import BROKEN
from rftt.learner.fsdp import TIMEOUT, World, full_weights, own_tensors
from rftt.learner.optim import parts_of, put_parts
from rftt.run.files import one_line, write_json
from rftt.types import UserError

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FILE_BYTES = 1 << 29
"""Bytes after which the tensors of a checkpoint go on in another file."""
MISFIT = ("Missing key", "Size mismatch")
"""Beginnings of torch's errors about a checkpoint of another model or optimizer."""
Modules = Mapping[str, nn.Module]
Optimizers = Mapping[str, Optimizer]


def export_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    world: World,
    dtype: str = "float32",
) -> None:
    """Write a Hugging Face folder in `dtype`. Collective, but only rank 0 writes."""
    weights = _whole_weights(model, world, dtype)
    if world.is_main:
        _save_model(model, weights, dtype, path)
        tokenizer.save_pretrained(path)
    world.barrier()


def _save_model(model: PreTrainedModel, weights: dict[str, Tensor], dtype: str, path: Path) -> None:
    """Write the weights and a config.json that names their type: the model's own is float32."""
    model.save_pretrained(path, state_dict=weights)
    config = deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(path)


def try_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> None:
    """Write a model's folder without its weights and delete it again.

    What the last step would fail at is found before the first one. Raises UserError for it.
    """
    for name in ("adapter", "checkpoints", "hf", "samples", "trees"):
        if (run_dir / name).exists() and not (run_dir / name).is_dir():
            raise UserError(f"{run_dir / name} must be a folder, but is a file; remove it.")
    try:
        with TemporaryDirectory(dir=run_dir, prefix=".try-") as folder:
            _save_model(model, {}, "float32", Path(folder))
            tokenizer.save_pretrained(folder)
    except BROKEN as error:
        raise UserError(
            f"the model cannot be saved ({one_line(error)}); correct its configuration files, such "
            "as generation_config.json."
        ) from error


class Checkpoints:
    """Writer of a run's checkpoints, one at a time, while training continues.

    modules["policy"] is exported to hf/ in `dtype`. The newest `keep` checkpoints (0: all) and the
    one with the best score are kept. `best` is that score, "best_score" in a resumed `extra`.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        *,
        keep: int = 0,
        dtype: str = "float32",
        best: float = -math.inf,
    ) -> None:
        self._folder, self._world, self._best = run_dir / "checkpoints", world, best
        self._tokenizer, self._keep, self._dtype = tokenizer, keep, dtype
        self._thread = ThreadPoolExecutor(1)
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._group = cast(dist.ProcessGroup, group)  # for the thread alone
        self._pending: list[Future[None]] = []

    def save(
        self,
        step: int,
        modules: Modules,
        optimizers: Optimizers,
        extra: dict[str, Any],
    ) -> None:
        """Copy the state and start writing it. Waits for the previous checkpoint. Collective.

        An optimizer has the name of the module that it trains. `extra` is JSON, such as the data
        position, the KL controller and counters.
        """
        self.wait()
        state = _tensors(modules, optimizers)
        state = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        policy = cast(PreTrainedModel, modules["policy"])
        weights = _whole_weights(policy, self._world, self._dtype)
        export = partial(_save_model, policy, weights, self._dtype)
        score = {"best_score": self._best} if math.isfinite(self._best) else {}
        extra = {"step": step, **score, **extra}
        self._pending.append(self._thread.submit(self._write, step, state, export, extra))

    def rate(self, step: int, score: float) -> None:
        """Mark the checkpoint of `step` as `best` if its score is the highest.

        This may precede `save`. A run that is killed in between writes the checkpoint later.
        """
        if score > self._best:
            self._best = score
            if self._world.is_main:
                name = f"step_{step:06d}"
                self._pending.append(self._thread.submit(_point, self._folder, "best", name))

    def wait(self) -> None:
        """Wait until all writing has finished. Raises the error of a failed write."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def close(self) -> None:
        """Wait until all writing has finished and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _write(
        self,
        step: int,
        state: dict[str, Tensor],
        export: Callable[[Path], None],
        extra: dict[str, Any],
    ) -> None:
        final = self._folder / f"step_{step:06d}"
        temp = final.with_name(f".{final.name}.tmp")
        if self._world.is_main:
            shutil.rmtree(temp, ignore_errors=True)
            write_json(temp / "extra.json", extra)
        dist.barrier(self._group)
        files = files_of(state)
        writer = HuggingFaceStorageWriter(str(temp / "state"), files, save_distributed=True)
        state_dict_saver.save(state, storage_writer=writer, process_group=self._group)
        if self._world.is_main:
            export(temp / "hf")
            self._tokenizer.save_pretrained(temp / "hf")
        dist.barrier(self._group)
        shares: list[Any] = [None] * self._world.size
        dist.all_gather_object(shares, _checksums(temp, _files(temp), self._world), self._group)
        if self._world.is_main:
            write_json(temp / "COMPLETE", dict(chain(*(share.items() for share in shares))))
            for path in (*temp.rglob("*"), temp):
                _sync(path)
            shutil.rmtree(final, ignore_errors=True)
            temp.rename(final)
            _sync(self._folder)
            _point(self._folder, "latest", final.name)
            _prune(self._folder, self._keep)


def files_of(state: dict[str, Tensor]) -> dict[str, int]:
    """Return the number of the file that each tensor is written to, from 1.

    The writer holds the bytes of a whole file twice, so that files are small.
    """
    numbers: dict[str, int] = {}
    total = 0
    for name, tensor in state.items():
        numbers[name] = 1 + total // FILE_BYTES
        total += tensor.numel() * tensor.element_size()
    return numbers


def restore(
    path: Path,
    modules: Modules,
    optimizers: Optimizers,
) -> dict[str, Any]:
    """Load a checkpoint of any number of ranks in place. Return `extra`. Collective.

    Raises UserError if it has not the tensors of these modules and optimizers.
    """
    tensors = _tensors(modules, optimizers)
    try:
        state_dict_loader.load(tensors, storage_reader=_reader(path / "state"))
    except CheckpointException as error:
        reasons = [str(failure) for failure, _stack in error.failures.values()]  # one per rank
        if not reasons or not reasons[0].startswith(MISFIT):
            raise
        raise UserError(
            f"the checkpoint {path} must have the tensors of this model and of its optimizer "
            f"({one_line(reasons[0])}); use a checkpoint of the same model, with the same optim."
        ) from error
    for name, optimizer in optimizers.items():
        state: dict[str, Any] = get_optimizer_state_dict(modules[name], optimizer, options=FLAT)
        for key, moment in _moments(state):
            parts = {end: tensors[f"optimizer.{name}.{key}{end}"] for end in parts_of(moment)}
            state[key] = put_parts(moment, parts)
        set_optimizer_state_dict(modules[name], optimizer, state, options=FLAT)
    return json.loads((path / "extra.json").read_text())


def _reader(folder: Path) -> HuggingFaceStorageReader:
    """Return torch's reader, which would also open hidden files such as ._1.safetensors."""
    reader = HuggingFaceStorageReader(str(folder))
    every = reader.fs.ls
    reader.fs.ls = lambda path: [name for name in every(path) if Path(name).name[0] != "."]
    return reader


def whole_checkpoint(folder: str, world: World) -> Path:
    """Return the path of another run's checkpoint. Collective.

    Raises UserError if the folder is not a complete and undamaged checkpoint.
    """
    path = Path(folder)
    if not world.gather((path / "COMPLETE").is_file())[0]:
        raise UserError(
            f"initial_state {folder} must be a checkpoint, which contains a file COMPLETE; name a "
            "folder checkpoints/step_… of a training."
        )
    if not _is_whole(path, world):
        raise UserError(f"initial_state {folder} is damaged; use another checkpoint.")
    return path


def latest(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    found = _complete(run_dir / "checkpoints")
    return found[-1] if found else None


def newest_whole(run_dir: Path, world: World) -> Path | None:
    """Return the newest checkpoint whose recorded files are undamaged, or None. Collective.

    Files from other programs (.DS_Store) are ignored. Newer damaged checkpoints are renamed with a
    warning. Raises UserError if all checkpoints are damaged.
    """
    damaged: list[Path] = []
    for path in reversed(world.gather(_complete(run_dir / "checkpoints"))[0]):
        if _is_whole(path, world):
            if world.is_main:
                for other in damaged:
                    warnings.warn(f"{other} is damaged; going on from {path.name}", stacklevel=2)
                    (other / "COMPLETE").rename(other / "DAMAGED")
            world.barrier()
            return path
        damaged.append(path)
    if damaged:
        raise UserError(
            f"{damaged[0]} is damaged, and there is no older checkpoint; use a new output_dir."
        )
    return None


def _is_whole(path: Path, world: World) -> bool:
    """Return whether the recorded files of a checkpoint are undamaged. Collective."""
    recorded = world.gather(_recorded(path))[0]
    parts = world.gather(_checksums(path, sorted(recorded), world))
    return bool(recorded) and dict(chain(*(found.items() for found in parts))) == recorded


def _files(folder: Path) -> list[str]:
    """Return the names of a checkpoint's files, without its marker and hidden files."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "COMPLETE")
    return sorted(str(p.relative_to(folder)) for p in files if not p.name.startswith("."))


def _checksums(folder: Path, names: Sequence[str], world: World) -> dict[str, int]:
    """Return the CRC-32 of each file in this rank's share of `names`. Missing files are skipped."""
    found = {}
    for name in [name for name in names[world.rank :: world.size] if (folder / name).is_file()]:
        checksum = 0
        with open(folder / name, "rb") as file:
            while block := file.read(2**24):
                checksum = zlib.crc32(block, checksum)
        found[name] = checksum
    return found


def _recorded(path: Path) -> dict[str, int]:
    """Return the checksums recorded in COMPLETE, or {} if that file is damaged."""
    try:
        recorded = json.loads((path / "COMPLETE").read_bytes())
    except (ValueError, RecursionError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _complete(folder: Path) -> list[Path]:
    return sorted(marker.parent for marker in folder.glob("step_*/COMPLETE"))


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _point(folder: Path, name: str, target: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temp = folder / f"{name}.tmp"
    temp.write_text(target)
    temp.replace(folder / name)


def _prune(folder: Path, keep: int) -> None:
    best = folder / "best"
    spared = best.read_text() if best.exists() else ""
    for path in _complete(folder)[:-keep] if keep else []:
        if path.name != spared:
            (path / "COMPLETE").unlink()  # first: half a checkpoint must not look like one
            shutil.rmtree(path)


def _whole_weights(model: nn.Module, world: World, dtype: str) -> dict[str, Tensor]:
    """Return all unsharded tensors in host memory on rank 0, {} on other ranks. Collective."""
    weights = {}
    for name, tensor in full_weights(model):
        if world.is_main:
            weights[name] = tensor.to("cpu", getattr(torch, dtype), copy=True)
    return weights


def _tensors(modules: Modules, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return every tensor to save under a flat name. Shards stay local. A tied head comes once.

    Frozen weights are those of the model that the run started from, and are not saved.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        frozen = {key for key, p in module.named_parameters() if not p.requires_grad}
        own = ((key, tensor) for key, tensor in own_tensors(module) if key not in frozen)
        tensors |= {f"module.{name}.{key}": tensor for key, tensor in own}
    for name, optimizer in optimizers.items():
        state = get_optimizer_state_dict(modules[name], optimizer, options=FLAT)
        for key, moment in _moments(state):
            for end, part in parts_of(moment).items():
                tensors[f"optimizer.{name}.{key}{end}"] = part
    return tensors


def _moments(state: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the tensors of an optimizer's flat state, without hyper-parameters (torchao's lr)."""
    named = [(key, value) for key, value in state.items() if key.startswith("state.")]
    return [(key, value) for key, value in named if isinstance(value, Tensor)]
