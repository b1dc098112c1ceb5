"""Train low-rank adapters instead of all weights (LoRA, arXiv 2106.09685), through peft.

An adapted layer computes W x + s B A x with s = lora_alpha / lora_r. W is frozen and stored in the
compute type. A, B and the vocabulary rows of the functional tokens are trained in float32. With the
adapter switched off the model is the one that the run started from, so it is its own reference.

Engines and exports receive merged weights, W + s B A. W itself never changes, so merging does not
drift, however often it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rftt.learner.rows import ROWS, TrainedRows, matrices, trained_rows, weight_of
from rftt.run.config import Training
from rftt.run.files import make_folder, one_line
from rftt.types import UserError

NAME = "default"
"""peft's name of the one adapter."""
ADAPTED, BASE = (f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"), ".base_layer."
FILE = "adapter_model.safetensors"


def attach(
    cfg: Training,
    model: PreTrainedModel,
    ids: Sequence[int],
    seed: int,
    frozen: Sequence[Tensor] | None = None,
) -> None:
    """Freeze a model and add adapters and trained rows of `ids`, in place, before sharding.

    The model computes what it did before: B is 0, and the rows are those of its own matrices. If
    the model was given new rows after it was loaded, `frozen` are those that its folder has, or
    none. Raises UserError if peft is missing or cannot adapt the named modules.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            "use_peft needs peft; pip install -r requirements-lora.txt, or set use_peft: false."
        ) from error
    wanted = cfg.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules="all-linear" if wanted == ["all-linear"] else wanted,
    )
    with torch.random.fork_rng(devices=[]):  # all ranks draw the same A
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise UserError(f"lora_target_modules {wanted}: {one_line(error)}") from error
    head = model.get_output_embeddings()
    adapted = [
        name
        for name, module in model.named_modules()
        if getattr(module, "base_layer", None) is not None
    ]
    ends = {name.split(".", at)[-1] for name in adapted for at in range(name.count(".") + 1)}
    if missing := sorted({*wanted} - ends) if wanted != ["all-linear"] else []:
        raise UserError(
            f"lora_target_modules must name layers of the model, got {missing[0]!r}, which it does "
            "not have; correct or remove it."
        )
    for name in adapted:
        module = cast(Any, model.get_submodule(name))
        if type(module.base_layer) is not nn.Linear or module is head:
            raise UserError(
                f"lora_target_modules {wanted} names {name}, which is not a linear layer between "
                "embedding and head; name layers such as q_proj."
            )
    if ids:
        _train_rows(model, ids, in_base=frozen is None or len(frozen) > 0)
        for matrix, rows in zip(matrices(model), frozen or (), strict=False):
            matrix.data[list(ids)] = rows
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.lora_config = config  # pyright: ignore[reportArgumentType]


def _train_rows(model: PreTrainedModel, ids: Sequence[int], *, in_base: bool) -> None:
    rows = TrainedRows(model, ids, in_base=in_base)
    embedding = cast(nn.Module, model.get_input_embeddings())
    before = embedding(rows.index[None])
    if not torch.equal(rows.embed(embedding, (rows.index[None],), 0 * before), before):
        raise UserError(
            f"use_peft cannot train single rows of {type(embedding).__name__}, which does more "
            "than to look them up; set use_peft: false."
        )
    model.function_rows = rows
    embedding.register_forward_hook(rows.embed)


def lora_config(model: nn.Module) -> Any:
    """Return peft's configuration of an adapted model, or None."""
    return getattr(model, "lora_config", None)


# ---- The adapter switched off ----


class Reference:
    """The model that an adapted one was at the start, for `token_logprobs`. It has no weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def packed_forward(self, *args: Any) -> Any:
        """Call the model's `packed_forward` without its adapter."""
        with switched_off(self._model):
            return self._model.packed_forward(*args)  # pyright: ignore[reportCallIssue]


@contextmanager
def switched_off(model: PreTrainedModel) -> Iterator[None]:
    """Compute with the frozen weights alone: s is 0, and no row is replaced."""
    layers = [
        cast(Any, module)
        for module in model.modules()
        if getattr(module, "lora_A", None) is not None
    ]
    scales = [layer.scaling[NAME] for layer in layers]
    rows = trained_rows(model)
    try:
        for layer in layers:
            layer.scaling[NAME] = 0.0
        if rows:
            rows.active = False
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[NAME] = scale
        if rows:
            rows.active = True


# ---- Out: merged weights, and peft's folder ----

Named = Iterable[tuple[str, Tensor]]


def merged(
    model: PreTrainedModel, own: Named, whole: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) with the adapter merged, one whole matrix at a time.

    `own` are the tensors of this rank, and `whole` gathers one from all ranks. The sum is computed
    in float32 and has the type of the frozen weight. Collective.
    """
    tensors, config = dict(own), lora_config(model)
    scale = config.lora_alpha / config.r
    rows = trained_rows(model)
    replaced = {}
    if rows:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        both = zip(matrices(model), (rows.input, rows.output), strict=True)
        replaced = {names[id(matrix)]: own_rows.detach() for matrix, own_rows in both}
    for name, tensor in tensors.items():
        if name.endswith(ADAPTED) or name.startswith(f"{ROWS}."):
            continue
        full = whole(tensor)
        if name.endswith(BASE + "weight"):
            a, b = (whole(tensors[name.removesuffix(BASE + "weight") + end]) for end in ADAPTED)
            full = (full.float() + scale * (b @ a)).to(full.dtype)
        elif name in replaced and rows:
            new = whole(replaced[name]).to(full.dtype)  # on the host with fsdp_cpu_offload
            full = full.index_copy(0, rows.index.to(full.device), new)
        yield name.replace(BASE, "."), full


def adapter(
    model: PreTrainedModel, own: Named, whole: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of peft's folder, and its settings beyond r and lora_alpha. Collective.

    Trained rows are an adapter of embedding and head, of rank n: one factor contains their n
    changes, the other one selects their ids.
    """
    config, tensors = lora_config(model), dict(own)
    scale = config.lora_alpha / config.r
    found = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": whole(tensor)
        for name, tensor in tensors.items()
        if name.endswith(ADAPTED)
    }
    names, rows = set(config.target_modules), trained_rows(model)
    of_rows: dict[str, int] = {}
    if rows:
        n, paths = len(rows.ids), {id(module): name for name, module in model.named_modules()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for module, own_rows in ((embedding, rows.input), (head, rows.output)):
            matrix, path = whole(weight_of(module).detach()), paths[id(module)]
            before = matrix[list(rows.ids)].float()
            change = (whole(own_rows.detach()) - before) / scale  # (n, width)
            select = change.new_zeros(n, len(matrix))
            select[range(n), list(rows.ids)] = 1.0
            if module is embedding:
                pair = {"lora_embedding_A": select, "lora_embedding_B": change.T}
            else:
                pair = {"lora_A.weight": change, "lora_B.weight": select.T}
            found |= {f"base_model.model.{path}.{part}": pair[part] for part in pair}
            of_rows[path.rpartition(".")[2]] = n
    alphas = {name: n * scale for name, n in of_rows.items()}
    settings = {"target_modules": sorted(names | set(of_rows))}
    return found, settings | {"rank_pattern": of_rows, "alpha_pattern": alphas}


def why_not_alone(model: PreTrainedModel) -> str | None:
    """Return why the adapter cannot be added to the base model by others, or None."""
    rows, embedding = trained_rows(model), model.get_input_embeddings()
    if rows and not rows.in_base:
        return "the base model has no rows for the functional tokens"
    if rows and getattr(embedding, "embed_scale", None) is not None:
        return "the model scales its embeddings, which peft and vLLM do in different places"
    return None


def trained_share(model: nn.Module) -> str:
    """Return how many of a model's parameters are trained, as text."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
    return f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"


def save_adapter(
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    base: str,
    folder: Path,
) -> None:
    """Write the result of `adapter` as a folder that peft and vLLM load on top of `base`."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    config = lora_config(model)
    make_folder(folder)
    save_file({k: x.float().cpu().contiguous() for k, x in tensors.items()}, folder / FILE)
    LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        base_model_name_or_path=base,
        inference_mode=True,
        **settings,
    ).save_pretrained(str(folder))
