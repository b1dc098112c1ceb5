"""Open a pretrained model and check that it is the one that was saved.

Three things change a model without an error. A missing weight starts at random. An adapter or a
quantisation that is not read gives another model. Logits that are recomputed from hidden states
miss what the model does behind its head. Every check raises a UserError that names the model, what
was found and what to do. `skip_model_check: true` turns all of them off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
)
from transformers.utils import logging
from transformers.utils.hub import cached_file

from rftt.run.files import one_line
from rftt.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BROKEN = (
    ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
    SafetensorError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip
"""What transformers raises on a folder that is not a model, or on a call that a model refuses."""


# ---- Files ----


def check_files(path: str, *, trust_remote_code: bool = False, quantized: bool = False) -> None:
    """Raise UserError if a model folder or hub id holds what no code here reads.

    Pickles are not read. Adapters beside weights are not applied. Quantised weights are refused
    unless `quantized`.
    """
    config = open_config(path, trust_remote_code=trust_remote_code)
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if _file(path, name):
            raise UserError(
                f"{path} holds an adapter ({name}) that is not applied; merge it into the weights "
                "(peft: merge_and_unload, save_pretrained) or move the adapter files away."
            )
    for file in sorted(Path(path).glob("[!.]*.safetensors")):
        _check_weight_file(file)
    pickles = sorted(Path(path).glob("[!.]*.bin"))
    if pickles and not any(Path(path).glob("[!.]*.safetensors")):
        raise UserError(
            f"{pickles[0]} is a pickle, which is never read, because it can run code; convert the "
            "weights to safetensors (transformers: save_pretrained)."
        )
    method = getattr(config, "quantization_config", None)
    if method and not quantized:
        kind = method.get("quant_method") if isinstance(method, dict) else type(method).__name__
        raise UserError(
            f"{path} is quantised (quantization_config: {kind}), which only engine=vllm can read; "
            "use the unquantised model, or dequantise it and save it again."
        )


def open_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model's configuration. Raises UserError if there is none that can be read."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except BROKEN as error:
        raise UserError(
            f"no model at {path!r}: {one_line(error)}; set model_name_or_path to a Hugging Face "
            "folder or hub name."
        ) from error


def _check_weight_file(file: Path) -> None:
    """Raise UserError if a safetensors file cannot be read, is a pointer, or is damaged."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(64)
            n_header = int.from_bytes(head[:8], "little")
            opened.seek(8)
            header = opened.read(n_header) if 8 + n_header <= size else b""
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error}); check the file and its permissions."
        ) from error
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{file} is a git-lfs pointer and not the weights; run `git lfs pull` there."
        )
    if _end_of_tensors(header) != size - 8 - n_header:
        raise UserError(f"{file} is cut off or damaged; copy or download it again.")


def _end_of_tensors(header: bytes) -> int | None:
    """Return where a header places the end of the last tensor, or None if it is not a header."""
    try:
        entries = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        return max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _file(path: str, name: str) -> str | None:
    """Return the path of a file in a model folder or hub repository, None without that file."""
    if Path(path).is_dir():
        return str(Path(path, name)) if Path(path, name).is_file() else None
    return cached_file(
        path,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def check_savable(path: str) -> None:
    """Raise UserError if transformers would refuse to save the model's generation settings.

    Without this check training would fail when it saves its first checkpoint.
    """
    settings = _generation_settings(path)
    try:
        if settings:
            with quiet():
                settings.validate(strict=True)
    except ValueError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.startswith("-")]
        raise UserError(
            f"transformers refuses to save {path}/generation_config.json "
            f"({(lines or [one_line(error)])[0]}); set do_sample: true in that file, or remove "
            "these settings."
        ) from error


def listed_ends(path: str) -> tuple[int, ...]:
    """Return the ids that the model's generation_config.json lists as ends of a reply."""
    settings = _generation_settings(path)
    listed = settings.eos_token_id if settings else None
    return tuple(listed) if isinstance(listed, list) else () if listed is None else (listed,)


def _generation_settings(path: str) -> GenerationConfig | None:
    """Return the model's generation settings, or None. Raises UserError for a damaged file."""
    if not _file(path, "generation_config.json"):
        return None
    try:
        with quiet():
            return GenerationConfig.from_pretrained(path)
    except BROKEN as error:
        raise UserError(
            f"{path}/generation_config.json cannot be used ({one_line(error)}); correct or remove "
            "that file."
        ) from error


RESCALED = ("longrope", "dynamic")
"""Kinds of positions that change for all sequences of a batch once the longest is too long."""


def positions_of(config: Any, *, one_scale: bool = False) -> int | None:
    """Return the number of positions of a model, with scaled ones; None if it has no limit.

    A sequence must not depend on longer ones beside it, so RESCALED kinds end where the scale
    changes. With `one_scale` all sequences have that of the longest possible one, as in vLLM.
    """
    text = config.get_text_config()
    n_positions = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if n_positions and (before := rope.get("original_max_position_embeddings")):
        if rope.get("rope_type") in RESCALED and not one_scale:
            return min(n_positions, before)
        n_positions = max(n_positions, int(before * (rope.get("factor") or 1)))
    return n_positions


def check_context(path: str, config: Any, max_model_len: int, *, one_scale: bool = False) -> None:
    """Raise UserError if sequences may be longer than the positions that the model has."""
    n_positions = positions_of(config, one_scale=one_scale)
    if n_positions and max_model_len > n_positions:
        raise UserError(
            f"max_model_len={max_model_len} is beyond the {n_positions} positions of {path} "
            f"({_limit(config, n_positions)}); set max_model_len: {n_positions} or less."
        )


def _limit(config: Any, n_positions: int) -> str:
    """Return what limits the positions of a model."""
    if n_positions < (positions_of(config, one_scale=True) or 0):
        return "more would rescale those of shorter sequences"
    return "max_position_embeddings"


def check_rows(path: str, config: Any, lengths: Iterable[int]) -> None:
    """Raise UserError if a row to train on has more tokens than the model has positions."""
    n_positions, longest = positions_of(config), max(lengths, default=0)
    if n_positions and longest > n_positions:
        raise UserError(
            f"the longest row has {longest} tokens, {path} only {n_positions} positions "
            f"({_limit(config, n_positions)}); set max_length: {n_positions}, which leaves longer "
            "rows out."
        )


# ---- Weights ----

HEADS = ("lm_head.", "embed_out.", "score.", "v_head.", "classifier.")
"""Prefixes of heads, which a backbone leaves in the file."""
CURES = {
    "_orig_mod.": "it was saved from a torch.compile'd model: strip this prefix from the names",
    "module.": "it was saved from DistributedDataParallel: strip this prefix from the names",
    "base_model.model.": "it was saved from a PEFT model: merge the adapter and save the model",
}
"""Prefix of a weight's name -> why it is there, and what to do."""


def open_model(
    auto: Any,
    path: str,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    check: bool = True,
    extra: tuple[str, ...] = (),
) -> PreTrainedModel:
    """Load a model on the CPU, in evaluation mode: dropout would make every score another one.

    `auto` is one of transformers' Auto classes; `extra` are prefixes of weights that it leaves in
    the file. Raises UserError if no model can be loaded, or (with `check`) if any other weight is
    missing, unexpected or of another shape.
    """
    if check:
        check_files(path, trust_remote_code=trust_remote_code)
    model, info = _load(
        auto, path, dtype, trust_remote_code=trust_remote_code, ignore_mismatched_sizes=check
    )
    if check:
        _check_weights(path, info, extra)
    return model.eval()


def open_complete(
    path: str, config: Any, *, trust_remote_code: bool = False
) -> PreTrainedModel | None:
    """Open an unquantised model in the type of its files, for a comparison with vLLM.

    vLLM leaves a missing matrix at random values: UserError is raised if a weight is missing or has
    another shape. None is returned for models that transformers does not know.
    """
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known or getattr(config, "quantization_config", None):
        return None
    model, info = _load(
        AutoModelForCausalLM,
        path,
        "auto",  # the type of the files, so that nothing is converted
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,
    )
    _check_weights(path, info | {"unexpected_keys": set()}, ())  # vLLM ignores extra ones
    return model.eval()


def _load(
    auto: Any, path: str, dtype: Any, *, trust_remote_code: bool, ignore_mismatched_sizes: bool
) -> tuple[Any, dict[str, Any]]:
    """Return a model and the names of the weights that do not fit it."""
    try:
        with quiet():  # _check_weights names what transformers would warn of
            return auto.from_pretrained(
                path,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                use_safetensors=True,  # a .bin file is a pickle
                ignore_mismatched_sizes=ignore_mismatched_sizes,
            )
    except BROKEN as error:
        raise UserError(
            f"no model at {path!r}: {one_line(error)}; check model_name_or_path and the files "
            "there."
        ) from error


def _check_weights(path: str, info: dict[str, Any], extra: tuple[str, ...]) -> None:
    found = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(k for k in info["unexpected_keys"] if not k.startswith(extra or "\0")),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
    }
    if not any(found.values()):
        return
    told = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:2])}{', …' * (len(names) > 2)})"
        for kind, names in found.items()
        if names
    )
    prefixes = [p for p in CURES if any(k.startswith(p) for k in found["unexpected"])]
    cure = CURES[prefixes[0]] if prefixes else "copy or export the whole model again"
    raise UserError(f"the weights of {path} do not fit its config.json: {told}; {cure}.")


# ---- The head ----


@dataclass(frozen=True)
class LogitHead:
    """What turns hidden states into logits: cap(scale · h Wᵀ + bias)."""

    weight: Tensor
    """(V, hidden)"""
    bias: Tensor | None
    """(V,)"""
    scale: float
    cap: float | None
    """Logits become cap · tanh(logits / cap)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Map (…, hidden) -> (…, V)."""
        bias = None if self.bias is None else self.bias / self.scale
        return capped(torch.nn.functional.linear(hidden, self.weight, bias) * self.scale, self.cap)

    def rows(self, ids: Sequence[int]) -> LogitHead:
        """Return the head of these ids alone, in float32."""
        bias = None if self.bias is None else self.bias[list(ids)].float()
        return LogitHead(self.weight[list(ids)].float(), bias, self.scale, self.cap)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Squash logits into (-cap, cap), as Gemma 2 does."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logit_head(model: PreTrainedModel) -> LogitHead:
    """Return the head of a causal language model.

    Granite divides its logits, Cohere and Falcon-H1 multiply them. A model that does anything else
    behind its head is found by the comparison with its own logits.
    """
    config, head = model.config.get_text_config(), cast(Any, model.get_output_embeddings())
    scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return LogitHead(head.weight, getattr(head, "bias", None), scale, cap)


# ---- A model against itself ----

LIMIT = 1e-3
"""Largest difference of a log-prob, in nats, in float32.

Half precision is compared in float32: in bfloat16 two attention kernels of transformers differ by
up to 5.8 nats on Qwen2.5-Coder 0.5B, so that no limit would tell a wrong model from a right one.
"""
WINDOW = 6
"""Tokens of a sliding window while a model is compared, so that short sequences reach past it."""
PROBES = (17, 11)
"""Lengths of the compared sequences; both are longer than WINDOW."""
SHARED = 4
"""Tokens with which both sequences begin: a shared prefix for tree packing and caches."""


def probes(n_tokens: int) -> list[list[int]]:
    """Return two sequences of ids below `n_tokens`, the last ones of the vocabulary among them."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(n_tokens, (n,), generator=generator).tolist() for n in PROBES)
    first[-3:-1] = [n_tokens - 1, max(n_tokens - 2, 0)]  # ids of functional tokens that were added
    return [first, first[:SHARED] + second[SHARED:]]


@torch.no_grad()
def own_logits(model: PreTrainedModel, ids: Sequence[int], n_tokens: int) -> Tensor:
    """Return the (len(ids), n_tokens) logits of transformers' own forward and attention."""
    with attending(model, "eager"):
        logits = model(torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]
    return logits[:, :n_tokens].float()


@contextmanager
def attending(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Let a model use another attention implementation for a while."""
    before = cast(str, model.config._attn_implementation)
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Make all windows of a model's attention WINDOW tokens for a while.

    A window is an attribute of the configuration, of the layers, or of both. Chunks, which other
    models attend in, are narrowed as well.
    """
    before: list[tuple[Any, str, int]] = []
    for owner in (model.config.get_text_config(), *model.modules()):
        for name in ("sliding_window", "attention_chunk_size"):
            width = vars(owner).get(name)
            if isinstance(width, int) and width > WINDOW:
                before.append((owner, name, width))
                setattr(owner, name, WINDOW)
    try:
        yield
    finally:
        for owner, name, width in before:
            setattr(owner, name, width)


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Let the weights of a model be float32 for a while. Half precision comes back bit for bit."""
    before = [
        (tensor, tensor.dtype)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.dtype in (torch.bfloat16, torch.float16)
    ]
    for tensor, _ in before:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in before:
            tensor.data = tensor.data.to(dtype)


def check_same(
    model: PreTrainedModel,
    place: str,
    compute: Callable[[], tuple[Tensor, Tensor]],
    what: str = "log-probs",
    cure: str = "use a model of docs/models.md that is right there",
) -> None:
    """Raise UserError if the two tensors that `compute` returns differ.

    `place` is where the first one comes from; the second one is the model's own. `what` they hold
    are log-probs in nats, or something else in units in which LIMIT makes sense. `cure` ends the
    message. `compute` runs in float32.
    """
    name = model.name_or_path
    try:
        with quiet(), narrow_windows(model), in_float32(model):
            ours, own = compute()
    except BROKEN as error:
        raise UserError(
            f"{name} ({model.config.model_type}) is not supported by the {place}: "
            f"{type(error).__name__}: {one_line(error)}; {cure}."
        ) from error
    difference = float((ours.float() - own.float()).abs().max())
    if not difference <= LIMIT:  # a NaN is a difference
        raise UserError(
            f"{name} ({model.config.model_type}) is not supported by the {place}: its {what} are "
            f"{difference:.2g} off transformers' own (at most {LIMIT:g}); {cure}."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers log errors alone for a while: what it warns of is checked here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
