"""Any OpenAI-compatible URL as the instruct model of a prompted search: messages in, text out.

Not an Engine: such servers speak text and hide token ids, so only phase 1 (distilling from a bigger
model) can use one. Every reply is on disk before it is used: a run that is started again pays for
nothing twice. The budget is hard: a request is refused when its worst case no longer fits.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, TextIO

import httpx2

from rftt.functions import Messages
from rftt.schema import Sampling, UserError

MESSAGE_OVERHEAD = 64
"""Tokens that a chat template may add to one message; generous, for the worst case."""


RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that mean "later"; every other one is an error of ours."""
LONGEST_WAIT_S = 120.0
"""However long a server asks to wait."""


@dataclass(frozen=True)
class ApiConfig:
    base_url: str
    """Up to and including /v1."""
    model: str
    ledger: Path
    """JSONL of every reply with its tokens and cost; read back when a run continues."""
    budget: float
    """Most that the ledger may ever come to, in the currency of the prices."""
    prompt_price: float
    """Per million tokens. With both prices at 1, the budget counts millions of tokens."""
    completion_price: float
    key_variable: str | None = None
    """Environment variable that holds the key; None for a server without one."""
    max_concurrent: int = 64
    timeout_s: float = 600.0
    """Of one attempt."""
    attempts: int = 8
    """Before a request that keeps failing stops the run."""
    first_delay_s: float = 1.0
    """Before the second attempt; doubles with each, unless the server says how long to wait."""


@dataclass(frozen=True)
class Reply:
    text: str
    whole: bool
    """False: cut off by max_tokens."""
    n_prompt: int
    n_generated: int
    cost: float


@dataclass
class Spending:
    """Of this ledger, over all runs."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cost: float = 0.0
    reserved: float = 0.0
    """Worst case of what is under way, and of attempts without an answer: they may be billed."""


@asynccontextmanager
async def open_chat(cfg: ApiConfig) -> AsyncIterator[ChatAPI]:
    """The replies of earlier runs and a connection for new ones, inside one event loop."""
    headers: dict[str, str] = {}
    if cfg.key_variable:
        if cfg.key_variable not in os.environ:
            raise UserError(f"environment variable {cfg.key_variable} with the API key is not set.")
        headers["Authorization"] = f"Bearer {os.environ[cfg.key_variable]}"
    cfg.ledger.parent.mkdir(parents=True, exist_ok=True)
    known = _read_ledger(cfg.ledger)
    async with httpx2.AsyncClient(
        base_url=cfg.base_url.rstrip("/") + "/",
        headers=headers,
        timeout=httpx2.Timeout(cfg.timeout_s, pool=None),
        limits=httpx2.Limits(max_connections=cfg.max_concurrent),
    ) as client:
        with cfg.ledger.open("a", encoding="utf-8") as file:
            yield ChatAPI(cfg, client, file, known)


class ChatAPI:
    """`chat`, its ledger and its budget."""

    def __init__(
        self, cfg: ApiConfig, client: httpx2.AsyncClient, file: TextIO, known: dict[str, Reply]
    ) -> None:
        self.cfg, self.spending = cfg, Spending()
        self._client, self._file, self._known = client, file, known
        for reply in known.values():
            self._count(reply)

    async def chat(self, messages: Messages, sampling: Sampling) -> Reply:
        """One reply. Raises UserError when refused, out of budget, or after `attempts` failures."""
        body = {
            "model": self.cfg.model,
            "messages": messages,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if key in self._known:
            return self._known[key]
        bound = sum(len(m["content"].encode()) + MESSAGE_OVERHEAD for m in messages)
        random, failure = Random(key), _Retry("never tried")
        for attempt in range(self.cfg.attempts):
            try:
                reply = await self._attempt(body, bound, sampling.max_tokens)
            except _Retry as retry:
                failure = retry
                backoff = self.cfg.first_delay_s * 2**attempt * random.uniform(0.5, 1.0)
                await asyncio.sleep(backoff if retry.after is None else retry.after)
                continue
            self._known[key] = reply
            self._file.write(json.dumps({"key": key, **asdict(reply)}) + "\n")
            self._file.flush()
            return reply
        raise UserError(
            f"{self.cfg.base_url} failed {self.cfg.attempts} times, the last time: {failure}."
        )

    async def _attempt(self, body: dict[str, Any], n_prompt: int, n_generated: int) -> Reply:
        """One request, paid from the budget. `n_prompt` and `n_generated` are its worst case."""
        worst, spent = self._cost(n_prompt, n_generated), self.spending
        if spent.cost + spent.reserved + worst > self.cfg.budget:
            raise UserError(
                f"the API budget of {self.cfg.budget} is used up: {spent.cost:.4f} spent, "
                f"{spent.reserved:.4f} under way or unanswered, {worst:.4f} for the next request."
            )
        spent.reserved += worst
        try:
            response = await self._client.post("chat/completions", json=body)
        except httpx2.TransportError as error:
            # It may have been served and billed, so its share of the budget stays reserved.
            raise _Retry(repr(error)) from error
        if response.status_code != httpx2.codes.OK:
            spent.reserved -= worst
            if response.status_code not in RETRIED:
                raise UserError(
                    f"{self.cfg.base_url}: HTTP {response.status_code}: {response.text[:200]!r}"
                )
            raise _Retry(f"HTTP {response.status_code}", response.headers.get("retry-after"))
        try:
            data = response.json()
            choice, usage = data["choices"][0], data.get("usage") or {}
            text, whole = choice["message"]["content"] or "", choice["finish_reason"] == "stop"
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _Retry(f"not a chat completion: {response.text[:80]!r}") from error
        n_prompt = usage.get("prompt_tokens", n_prompt)  # a server that does not say: its worst
        n_generated = usage.get("completion_tokens", n_generated)
        reply = Reply(text, whole, n_prompt, n_generated, self._cost(n_prompt, n_generated))
        spent.reserved -= worst
        self._count(reply)
        return reply

    def _cost(self, n_prompt: int, n_generated: int) -> float:
        cfg = self.cfg
        return (n_prompt * cfg.prompt_price + n_generated * cfg.completion_price) / 1e6

    def _count(self, reply: Reply) -> None:
        self.spending.requests += 1
        self.spending.prompt_tokens += reply.n_prompt
        self.spending.generated_tokens += reply.n_generated
        self.spending.cost += reply.cost


class _Retry(Exception):
    """An attempt that may succeed later; `after` is the server's own wish in seconds."""

    def __init__(self, what: str, retry_after: str | None = None) -> None:
        super().__init__(what)
        numeric = (retry_after or "").isdecimal()  # it may also be a date
        self.after = min(float(retry_after or ""), LONGEST_WAIT_S) if numeric else None


def _read_ledger(path: Path) -> dict[str, Reply]:
    """Replies by key. A last line that a killed run left half-written is cut off."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    rows = [json.loads(line) for line in whole.splitlines()]
    return {row.pop("key"): Reply(**row) for row in rows}
