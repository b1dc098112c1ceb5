"""Compare what vLLM computes with transformers' own forward, when a model is opened.

vLLM has its own code for every model. Code that drops a scale, a bias or a window is wrong without
a word, in trees, rows and accuracies alike. So a few sequences are scored twice: on the CPU by
transformers before vLLM takes its memory, and by vLLM as soon as it is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from rftt.engines.opened import (
    BROKEN,
    in_float32,
    open_complete,
    own_logits,
    positions_of,
    probes,
    quiet,
)
from rftt.run.files import one_line
from rftt.types import UserError

LIMIT = 1e-3
"""Largest difference of a log-prob, in nats, of an engine in float32."""
HALF_LIMIT = 0.5
"""Largest mean difference, in nats, of an engine in half precision, beside the cost of rounding.

bfloat16 moves log-probs of Qwen2.5-Coder 0.5B by 0.4 to 0.7 on average for random ids, and by 0.2
for its own text, so that a closer limit would refuse right models. A text of the model is scored as
well, and each prompt is computed again with rounded activations: that tells the cost of rounding.
"""
ROUNDINGS = 2.0
"""How many times that cost an engine may have: it rounds in other places."""
N_WRITTEN = 14
"""Ids that the model writes itself, as a prompt for an engine in half precision."""
N_DECODED = 6
"""Ids that are decoded greedily after each prompt."""
MARGIN = 8
"""Tokens by which a prompt is longer than the sliding window."""
MAX_COST = 1e12
"""Multiplications that the prompt past the window may cost: some ten seconds on two cores."""
CURE = "set engine: hf, or use a model that docs/models.md lists as right with vLLM"


@dataclass(frozen=True)
class Scores:
    """What one of the two says of a prompt and of its greedy continuation."""

    prompt_ids: list[int]
    prompt: list[float]
    """Log-probs of prompt_ids[1:]."""
    decoded_ids: list[int]
    decoded: list[float]
    """Log-probs of decoded_ids. A tie may choose another id, but has the same log-prob."""
    rounding: float = 0.0
    """Mean difference that rounding to half precision makes."""


Score = Callable[[Sequence[list[int]], int], list[Scores]]
"""Scores prompts, and decodes a given number of further ids after each."""


def own_scores(
    path: str,
    config: Any,
    n_tokens: int,
    max_model_len: int,
    dtype: str,
    *,
    trust_remote_code: bool = False,
) -> list[Scores]:
    """Return transformers' own scores of a model, in float32 on the CPU, and free it again.

    `dtype` is the engine's.

    The list is empty if transformers cannot open the model (quantised weights, unknown code), or
    if vLLM scales all positions for longer sequences. Raises UserError if weights are missing or
    have another shape.
    """
    model = open_complete(path, config, trust_remote_code=trust_remote_code)
    n_positions = positions_of(config)
    if model is None or (n_positions and max_model_len > n_positions):
        return []
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    prompts = [ids[: max(2, max_model_len - N_DECODED)] for ids in probes(n_tokens)]
    n_long = _past_window(config, n_weights)
    if n_long and n_long + N_DECODED <= max_model_len:
        generator = torch.Generator().manual_seed(1)
        prompts.append(torch.randint(n_tokens, (n_long,), generator=generator).tolist())
    try:
        with quiet(), in_float32(model):
            if dtype != "float32" and max_model_len >= N_WRITTEN + 2 + N_DECODED:
                prompts.append(_written(model, prompts[-1][:2], n_tokens))
            scores = [_scores(model, ids, n_tokens) for ids in prompts]
            if dtype == "float32":
                return scores
            with _rounded(model, getattr(torch, dtype)):
                return [replace(one, rounding=_rounding(model, one, n_tokens)) for one in scores]
    except BROKEN as error:
        raise UserError(
            f"{path} ({config.model_type}) cannot be compared with vLLM: transformers' own forward "
            f"fails ({type(error).__name__}: {one_line(error)}); set skip_model_check: true to go "
            "on without a comparison."
        ) from error


def _past_window(config: Any, n_weights: int) -> int | None:
    """Return the length of a prompt past the sliding window; None without one, or if too dear."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    if not isinstance(window, int) or getattr(text, "use_sliding_window", True) is False:
        return None
    length = window + MARGIN
    return length if n_weights * length * (1 + N_DECODED) <= MAX_COST else None


def _written(model: Any, begin: list[int], n_tokens: int) -> list[int]:
    """Return a text that the model has sampled, with fixed seed."""
    ids, generator = list(begin), torch.Generator().manual_seed(2)
    for _ in range(N_WRITTEN):
        probs = own_logits(model, ids, n_tokens)[-1].softmax(-1)
        ids.append(int(torch.multinomial(probs.cpu(), 1, generator=generator)))
    return ids


def _scores(model: Any, ids: list[int], n_tokens: int) -> Scores:
    """Score a prompt and continue it greedily, without a cache."""
    whole = list(ids)
    for _ in range(N_DECODED):
        whole.append(int(own_logits(model, whole, n_tokens)[-1].argmax()))
    logprobs, n = _logprobs(model, whole, n_tokens), len(ids)
    return Scores(list(ids), logprobs[: n - 1], whole[n:], logprobs[n - 1 :])


def _logprobs(model: Any, ids: list[int], n_tokens: int) -> list[float]:
    """Return the log-probs of ids[1:]."""
    table = own_logits(model, ids, n_tokens).log_softmax(-1)
    return table[range(len(ids) - 1), ids[1:]].tolist()


def _rounding(model: Any, exact: Scores, n_tokens: int) -> float:
    """Return how far, on average, a model with rounded activations is off its exact scores."""
    rounded = _logprobs(model, exact.prompt_ids + exact.decoded_ids, n_tokens)
    pairs = zip(rounded, exact.prompt + exact.decoded, strict=True)
    return fmean(abs(a - b) for a, b in pairs)


@contextmanager
def _rounded(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let every module of a float32 model round its output for a while.

    This costs what float32 costs, also on a CPU that has to emulate half precision.
    """

    def rounded(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor) and output.dtype == torch.float32:
            return output.to(dtype).float()
        return output

    hooks = [module.register_forward_hook(rounded) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_scores(path: str, own: list[Scores], score: Score, dtype: str) -> None:
    """Raise UserError if an engine's scores of the same prompts are not transformers' own."""
    if not own:
        return
    half = dtype != "float32"
    for one, other in zip(own, score([one.prompt_ids for one in own], N_DECODED), strict=True):
        differences = [abs(a - b) for a, b in _pairs(one, other)]
        difference = fmean(differences) if half else max(differences)
        limit = HALF_LIMIT + ROUNDINGS * one.rounding if half else LIMIT
        if not difference <= limit:  # a NaN is a difference
            raise UserError(
                f"{path} is not supported by vLLM (engine=vllm): its log-probs are "
                f"{difference:.2g} off transformers' own ({'on average' if half else 'at most'} "
                f"{limit:.3g} is allowed); {CURE}."
            )


def _pairs(one: Scores, other: Scores) -> list[tuple[float, float]]:
    """Return the log-probs to compare: the prompt's, and those of ids decoded after equal ones."""
    pairs = list(zip(one.prompt, other.prompt, strict=True))
    for at, (a, b) in enumerate(zip(one.decoded, other.decoded, strict=True)):
        pairs.append((a, b))  # even of other ids: both are the largest log-prob
        if one.decoded_ids[at] != other.decoded_ids[at]:
            break
    return pairs
