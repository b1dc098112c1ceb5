"""Checkpoints that survive kill −9, and resume bit for bit, on any number of ranks.

`<run_dir>/checkpoints/step_000040/{hf/, state/, extra.json, COMPLETE}` and a file `latest`.
Weights and optimizer state go through torch's distributed checkpoint in its safetensors format:
every rank writes its shards, a reader with another world size reads the slices it needs, and no
pickle is involved (DCP's default format keeps its metadata in one). Hyper-parameters of the
optimizer are not saved: they come from the config and the step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
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

from rftt.learn.distributed import World, full_weights

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
Modules = Mapping[str, nn.Module]
Optimizers = Mapping[str, Optimizer]
Generators = Mapping[str, torch.Generator]


def export_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    world: World,
    dtype: str = "float32",
) -> None:
    """Write a normal Hugging Face folder in `dtype`. Collective; rank 0 writes."""
    weights = {}
    for name, tensor in full_weights(model):
        if world.is_main:
            weights[name] = tensor.to("cpu", getattr(torch, dtype))
    if world.is_main:
        model.save_pretrained(path, state_dict=weights)
        tokenizer.save_pretrained(path)
    world.barrier()


def save(
    run_dir: Path,
    step: int,
    *,
    modules: Modules,
    optimizers: Optimizers,
    extra: dict[str, Any],
    world: World,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generators: Generators | None = None,
    keep: int = 0,
    dtype: str = "float32",
) -> Path:
    """Write the checkpoint of `step`, then drop all but the newest `keep` (0: none). Collective.

    An optimizer carries the name of the module it trains. With a tokenizer, modules["policy"] is
    exported to hf/ in `dtype`. `extra` is any JSON: data position, KL controller, counters.
    `generators` are this rank's.
    """
    final = run_dir / "checkpoints" / f"step_{step:06d}"
    temp = final.with_name(f".{final.name}.tmp")
    if world.is_main:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
    world.barrier()
    writer = HuggingFaceStorageWriter(str(temp / "state"), save_distributed=True)
    state_dict_saver.save(_tensors(modules, optimizers), storage_writer=writer)
    rng = {name: generator.get_state() for name, generator in (generators or {}).items()}
    if rng:
        save_file(rng, temp / f"rng_{world.rank}.safetensors")
    if tokenizer is not None:
        export_hf(cast(PreTrainedModel, modules["policy"]), tokenizer, temp / "hf", world, dtype)
    world.barrier()
    if world.is_main:
        (temp / "extra.json").write_text(json.dumps({"step": step, **extra}, indent=1))
        (temp / "COMPLETE").touch()
        shutil.rmtree(final, ignore_errors=True)
        temp.rename(final)
        _point(run_dir, "latest", final)
        _prune(run_dir, keep)
    world.barrier()
    return final


def restore(
    path: Path,
    modules: Modules,
    optimizers: Optimizers,
    world: World,
    generators: Generators | None = None,
) -> dict[str, Any]:
    """Load a checkpoint in place; returns its `extra` with "step". Collective.

    With another number of ranks the weights are the same; a rank without a saved generator state
    keeps the one it has.
    """
    tensors = _tensors(modules, optimizers)
    state_dict_loader.load(tensors, storage_reader=HuggingFaceStorageReader(str(path / "state")))
    for name, optimizer in optimizers.items():
        state: dict[str, Any] = get_optimizer_state_dict(modules[name], optimizer, options=FLAT)
        prefix = f"optimizer.{name}."
        state |= {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        set_optimizer_state_dict(modules[name], optimizer, state, options=FLAT)
    rng_file = path / f"rng_{world.rank}.safetensors"
    if generators and rng_file.exists():
        rng = load_file(rng_file)
        for name, generator in generators.items():
            generator.set_state(rng[name])
    return json.loads((path / "extra.json").read_text())


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = _complete(run_dir)
    return found[-1] if found else None


def mark_best(run_dir: Path, path: Path) -> None:
    """Name a checkpoint `best`: it is never pruned. Rank 0 only."""
    _point(run_dir, "best", path)


def _complete(run_dir: Path) -> list[Path]:
    return sorted(marker.parent for marker in run_dir.glob("checkpoints/step_*/COMPLETE"))


def _point(run_dir: Path, name: str, path: Path) -> None:
    pointer = run_dir / "checkpoints" / name
    temp = pointer.with_suffix(".tmp")
    temp.write_text(path.name)
    temp.replace(pointer)


def _prune(run_dir: Path, keep: int) -> None:
    best = run_dir / "checkpoints" / "best"
    spared = best.read_text() if best.exists() else ""
    for path in _complete(run_dir)[:-keep] if keep else []:
        if path.name != spared:
            shutil.rmtree(path)


def _tensors(modules: Modules, optimizers: Optimizers) -> dict[str, Tensor]:
    """Every tensor to save under one flat name, local shards and all; a tied head comes once."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        seen: set[int] = set()
        for key, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                tensors[f"module.{name}.{key}"] = tensor.detach()
            seen.add(id(tensor))
    for name, optimizer in optimizers.items():
        state = get_optimizer_state_dict(modules[name], optimizer, options=FLAT)
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
    return tensors
