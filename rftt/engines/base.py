"""The interface of a sampling engine: token ids in, token ids out, awaited.

Text, problems and trees are unknown to an engine. Thousands of coroutines may await `generate` at
once. Batching happens inside the engine and nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from rftt.types import Completion, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from rftt.run.config import EvalConfig, RLConfig, SearchConfig

    EngineConfig = SearchConfig | RLConfig | EvalConfig

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled. RL keeps top_p = 1: its log-probs must be the policy's own."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy; log-probs are then those of temperature 1."""
    top_p: float = 1.0
    seed: int = 0
    """Makes the request's tokens independent of the batch it happens to share (`seed_for`)."""
    stop_ids: tuple[int, ...] = ()
    """Generation ends with the first of these; it stays in `token_ids`."""
    banned_ids: tuple[int, ...] = ()
    """Never sampled; log-probs are normalised over the other ids."""
    watch_ids: tuple[int, ...] = ()
    """Ids (the openers) whose log-probs are returned wherever a segment may begin."""
    watch_after: tuple[int, ...] = ()
    """A segment may begin at position 0 and after each of these ids (the closers)."""


@dataclass(frozen=True)
class Reply:
    """A reply of the instruct model in phase 1: text, from an engine or from an API."""

    text: str
    whole: bool
    """False if cut off by max_tokens."""
    n_prompt: int = 0
    n_generated: int = 0
    cost: float = 0.0
    """Cost in the currency of the API's prices."""
    logprob: float | None = None
    """log π of the whole text as it was sampled; None from an API."""

    @property
    def tokens(self) -> int:
        return self.n_prompt + self.n_generated


@dataclass
class Counters:
    """Running totals of one engine; take the difference of two `snapshot`s to measure a stretch."""

    requests: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache saved."""
    steps: int = 0
    """Forward passes that generated tokens: generated_tokens / steps is the mean batch."""


class Engine(Protocol):
    counters: Counters
    max_model_len: int

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Sample one continuation. Cancelling the awaiting task frees its place in the batch.

        Raise UserError if prompt and max_tokens do not fit `max_model_len`: shortening a budget is
        the caller's decision.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> float:
        """Replace every weight by the learner's, streamed as (Hugging Face name, full tensor).

        Drop cached prefixes, verify a checksum of all weights and return it. Must not be called
        while requests run.
        """
        ...

    def sleep(self) -> None:
        """Give the device's memory back to the learner, if the platform supports it."""
        ...

    def wake(self) -> None:
        """Take the memory again, before `load_weights`."""
        ...

    def close(self) -> None: ...


def check_request(
    prompt_ids: Sequence[int], sampling: Sampling, max_model_len: int, n_tokens: int
) -> None:
    """Raise UserError for a request that no engine can run."""
    ids = (*prompt_ids, *sampling.stop_ids, *sampling.watch_ids, *sampling.watch_after)
    ids += sampling.banned_ids
    if not prompt_ids or sampling.max_tokens < 1:
        raise UserError("an engine needs at least one prompt token and max_tokens of at least 1.")
    if len(prompt_ids) + sampling.max_tokens > max_model_len:
        raise UserError(
            f"prompt of {len(prompt_ids)} tokens + max_tokens={sampling.max_tokens} exceeds "
            f"max_model_len={max_model_len}; shorten one or raise the other."
        )
    if min(ids) < 0 or max(ids) >= n_tokens:
        raise UserError(f"token id outside the tokenizer: {min(ids)} … {max(ids)} of {n_tokens}.")


def checksum(tensor: Tensor) -> float:
    """Return the sum of magnitudes in float64: cheap, deterministic, changed by a lost block."""
    import torch  # the interface itself does not need it

    return torch.linalg.vector_norm(tensor.detach(), 1, dtype=torch.float64).item()


async def for_each(
    items: Sequence[T], work: Callable[[T], Awaitable[R]], *, in_flight: int
) -> list[R]:
    """Await `work` on every item, at most `in_flight` at once; results keep the order of the items.

    The first failure cancels the other tasks and is raised unchanged: a failed call never becomes
    a value.
    """
    gate = asyncio.Semaphore(in_flight)

    async def guarded(item: T) -> R:
        async with gate:
            return await work(item)

    tasks = [asyncio.create_task(guarded(item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
