"""Define the interface of a sampling engine: token ids in, token ids out, asynchronously.

An engine does not depend on text, problems or trees. Thousands of coroutines may await `generate`
at once. Only the engine forms batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from rftt.engines.lanes import Meter
from rftt.types import Completion, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from rftt.run.config import EvalConfig, RLConfig, SearchConfig

    EngineConfig = SearchConfig | RLConfig | EvalConfig

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Sampling:
    """Settings of one request. RL requires top_p = 1, so that log-probs are the policy's own."""

    max_tokens: int
    temperature: float = 1.0
    """0 means greedy decoding, with the log-probs of temperature 1."""
    top_p: float = 1.0
    seed: int = 0
    """Seed of this request (`seed_for`): its tokens do not depend on others in its batch."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end the generation. The first one found remains in `token_ids`."""
    banned_ids: tuple[int, ...] = ()
    """Ids that are never sampled. Log-probs are normalised over the other ids."""
    watch_ids: tuple[int, ...] = ()
    """Ids (the openers) whose log-probs are returned wherever a segment may begin."""
    watch_after: tuple[int, ...] = ()
    """A segment may begin at position 0 and after each of these ids (the closers)."""
    meter: Meter | None = field(default=None, compare=False)
    """Counts the tokens while they are sampled."""


@dataclass(frozen=True)
class Reply:
    """A text reply of the instruct model in phase 1, from an engine or an API."""

    text: str
    whole: bool
    """False if the reply was cut off by max_tokens."""
    n_prompt: int = 0
    """Number of prompt tokens."""
    n_generated: int = 0
    """Number of generated tokens."""
    cost: float = 0.0
    """Cost in the currency of the API's prices."""
    logprob: float | None = None
    """log π of the whole text as it was sampled. None if the reply came from an API."""

    @property
    def tokens(self) -> int:
        """Number of prompt and generated tokens."""
        return self.n_prompt + self.n_generated


@dataclass
class Counters:
    """Running totals of one engine. A difference of two copies measures the time between them."""

    requests: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache made unnecessary to compute."""
    steps: int = 0
    """Forward passes that generated tokens. generated_tokens / steps is the mean batch size."""


class Engine(Protocol):
    """A model that continues token ids, with weights that can be replaced."""

    counters: Counters
    max_model_len: int
    n_tokens: int
    """Bound of the ids that are sampled."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Sample one continuation. Cancelling the awaiting task frees its place in the batch.

        Raises UserError if prompt and max_tokens do not fit `max_model_len`. An engine never
        shortens a request by itself.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> float:
        """Replace every weight by the learner's, streamed as (Hugging Face name, full tensor).

        Cached prefixes are dropped, because they belong to the old weights. Returns the verified
        checksum of all weights. Raises UserError while requests run or if the weights do not fit.
        """
        ...

    def sleep(self) -> None:
        """Release the device's memory for the learner, if the platform supports it."""
        ...

    def wake(self) -> None:
        """Allocate the memory again, before `load_weights`."""
        ...

    def close(self) -> None:
        """Release all resources. The engine cannot be used afterwards."""
        ...


def check_request(
    prompt_ids: Sequence[int], sampling: Sampling, max_model_len: int, n_tokens: int
) -> None:
    """Raise UserError for a request that no engine can run."""
    ids = (*prompt_ids, *sampling.stop_ids, *sampling.watch_ids, *sampling.watch_after)
    ids += sampling.banned_ids
    if not prompt_ids or sampling.max_tokens < 1:
        raise UserError(
            f"a request needs at least one prompt token and max_tokens of at least 1, got "
            f"{len(prompt_ids)} and {sampling.max_tokens}."
        )
    if len(prompt_ids) + sampling.max_tokens > max_model_len:
        raise UserError(
            f"prompt of {len(prompt_ids)} tokens + max_tokens={sampling.max_tokens} exceeds "
            f"max_model_len={max_model_len}; shorten one or raise the other."
        )
    if min(ids) < 0 or max(ids) >= n_tokens:
        raise UserError(
            f"token ids must be from 0 to {n_tokens - 1}, got {min(ids)} … {max(ids)}; encode the "
            "prompt with the tokenizer of this model."
        )


def checksum(tensor: Tensor) -> float:
    """Return the sum of magnitudes in float64. It is deterministic, and a lost block changes it."""
    import torch  # the interface itself does not need it

    return torch.linalg.vector_norm(tensor.detach(), 1, dtype=torch.float64).item()


async def for_each(
    items: Sequence[T], work: Callable[[T], Awaitable[R]], *, in_flight: int
) -> list[R]:
    """Await `work` on every item, at most `in_flight` at once. Results are in order of the items.

    The first failure cancels the other tasks and is raised unchanged, so that a failed call never
    becomes a value.
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
