"""Sample with plain transformers forward passes: continuous batching on any device.

Each step (loop.py) admits waiting requests, decodes one token for every running row (slots.py) and
retires the finished rows. No package beyond transformers is needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rftt.engines.base import Counters, Sampling, check_request, checksum
from rftt.engines.loop import StepLoop
from rftt.engines.slots import Slots, load_model
from rftt.types import Completion, UserError

if TYPE_CHECKING:
    from rftt.engines.base import EngineConfig

PREFILL_TOKENS = 16_384
"""Padded prompt tokens of one prefill pass. This bounds its memory."""
ADMIT_SHARE = 8
"""Prefill once the waiting requests are 1/8 of the running ones, because it costs about a step."""


FEW_SHOT = 64
"""Prompts that share this many first tokens have worked examples in common. One of them is
prefilled before the others, which then find the examples in its slot."""


@dataclass(eq=False)
class _Request:
    prompt: tuple[int, ...]
    sampling: Sampling
    done: asyncio.Future[Completion]
    watched: dict[int, tuple[float, ...]] = field(default_factory=dict)
    n_cached: int = 0


class HFEngine:
    """Implementation of base.Engine with one transformers causal LM."""

    def __init__(self, cfg: EngineConfig, model_path: str, n_tokens: int) -> None:
        self.model = load_model(cfg, model_path, n_tokens)
        self.n_tokens, self.max_num_seqs = n_tokens, cfg.max_num_seqs
        self.max_model_len = cfg.max_model_len
        self.counters = Counters()
        self._slots = Slots(self.model, n_tokens, cfg.max_num_seqs, cfg.max_model_len)
        self._waiting: list[_Request] = []
        self._running: list[_Request] = []
        self._cancelled = False
        self._loop = StepLoop(self._step, self._reset)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """See base.Engine."""
        check_request(prompt_ids, sampling, self.max_model_len, self.n_tokens)
        request = _Request(tuple(prompt_ids), sampling, self._loop.submit())
        self._waiting.append(request)
        try:
            return await request.done
        except asyncio.CancelledError:
            self._cancelled = True
            raise

    def _reset(self) -> None:
        self._waiting, self._running = [], []
        self._slots.forget()

    @torch.inference_mode()
    def _step(self) -> None:
        if self._cancelled:
            self._cancelled = False
            self._waiting = [request for request in self._waiting if not request.done.done()]
            self._retire([i for i, request in enumerate(self._running) if request.done.done()])
        free = self.max_num_seqs - len(self._running)
        n = min(free, len(self._waiting))
        if n and (n == free or n * ADMIT_SHARE >= len(self._running)):
            self._admit(n)
        if self._running:
            self.counters.steps += 1
            self.counters.generated_tokens += len(self._running)
            finished, watched = self._slots.decode()
            for slot, position, logprobs in watched:
                self._running[slot].watched[position] = logprobs
            for request in self._running:
                if meter := request.sampling.meter:
                    meter.see(meter.running + 1)
            self._retire(finished)

    def _admit(self, n: int) -> None:
        """Prefill the first `n` waiting requests and let them run."""
        new, self._waiting = self._waiting[:n], self._waiting[n:]
        begun: set[tuple[int, ...]] = set()
        first: list[_Request] = []
        followers: list[_Request] = []
        for request in new:
            beginning = request.prompt[:FEW_SHOT]
            shares = len(request.prompt) > FEW_SHOT and beginning in begun
            (followers if shares else first).append(request)
            begun.add(beginning)
        self._prefill(first)
        self._prefill(followers)

    def _prefill(self, new: list[_Request]) -> None:
        """Prefill requests, longest prompts together."""
        new = sorted(new, key=lambda request: -len(request.prompt))
        while new:
            size = max(1, PREFILL_TOKENS // len(new[0].prompt))
            chunk, new = new[:size], new[size:]
            shared = self._slots.admit([r.prompt for r in chunk], [r.sampling for r in chunk])
            for request, request.n_cached in zip(chunk, shared, strict=True):
                self.counters.requests += 1
                self.counters.prompt_tokens += len(request.prompt)
                self.counters.cached_tokens += request.n_cached
            self._running += chunk

    def _retire(self, slots: list[int]) -> None:
        """Return results for the requests in `slots` that are not cancelled, and free the slots."""
        if not slots:
            return
        for slot, (ids, logprobs) in zip(slots, self._slots.outputs(slots), strict=True):
            request = self._running[slot]
            if not request.done.done():
                stopped = ids[-1] in request.sampling.stop_ids
                request.done.set_result(
                    Completion(
                        token_ids=tuple(ids),
                        logprobs=tuple(logprobs),
                        finish="stop" if stopped else "length",
                        watched=request.watched,
                        n_prompt=len(request.prompt),
                        n_cached=request.n_cached,
                    )
                )
        self._running = [self._running[origin] for origin in self._slots.retire(slots)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> float:
        """See base.Engine. A tied parameter may come under either name or both."""
        if self._loop.pending:
            raise UserError("load_weights must not be called while requests run; await them first.")
        self._slots.forget()
        own = dict(self.model.named_parameters(remove_duplicate=False))
        missing = {id(parameter): name for name, parameter in own.items()}
        for name, tensor in weights:
            parameter = own.get(name)
            if parameter is None:
                raise UserError(
                    f"load_weights: the engine's model has no parameter {name}; use one "
                    "model_name_or_path for engine and learner."
                )
            if parameter.shape != tensor.shape:
                raise UserError(
                    f"load_weights: {name} is {tuple(tensor.shape)} in the learner but "
                    f"{tuple(parameter.shape)} in the engine; use one model_name_or_path for both."
                )
            parameter.data.copy_(tensor)
            if checksum(parameter.data) != checksum(tensor.to(parameter.data)):
                raise UserError(
                    f"load_weights: {name} differs from the learner's after the copy; test the "
                    "memory of this machine, then start the command again."
                )
            missing.pop(id(parameter), None)
        if missing:
            raise UserError(
                f"load_weights: the learner did not send {', '.join(sorted(missing.values()))}, "
                "so the engine keeps old weights; use one model_name_or_path for both."
            )
        return sum(map(checksum, self.model.parameters()))

    def sleep(self) -> None:
        """Free the key/value slots. The next request allocates them again."""
        self._slots.drop()

    def wake(self) -> None:
        """Do nothing, because `sleep` keeps the weights."""

    def close(self) -> None:
        """See base.Engine."""
        self._slots.drop()
