"""Any OpenAI-compatible URL as the instruct model of a prompted search: messages in, text out.

Not an Engine: such servers speak text and hide token ids, so only phase 1 (distilling from a bigger
model) can use one. Every reply is on disk before it is used, and requests under way are awaited
when a run stops: started again, it pays for nothing twice. The budget is hard: a request waits, or
is refused, while its worst case does not fit; one without an answer counts as its worst case.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from asyncio import Task
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import httpx2

from rftt.engines.base import Reply, Sampling
from rftt.prompts import Messages
from rftt.run.files import Journal
from rftt.types import UserError

if TYPE_CHECKING:
    from rftt.run.config import Api

MESSAGE_OVERHEAD = 64
"""Tokens that a chat template may add to one message; generous, for the worst case."""
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that mean "later", unbilled; every other one is an error of ours."""
FIRST_DELAY_S = 1.0
"""Before the second attempt; doubles with each, unless the server says how long to wait."""
LONGEST_WAIT_S = 120.0
"""However long a server asks to wait."""


@dataclass
class Spending:
    """Of one ledger, over all runs."""

    requests: int = 0
    unanswered: int = 0
    """Of them; they may have been served and billed, and count with their worst case."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.generated_tokens

    def __str__(self) -> str:
        return (
            f"{self.requests} requests ({self.unanswered} unanswered), {self.prompt_tokens} prompt "
            f"+ {self.generated_tokens} generated tokens, cost {self.cost:.4f}"
        )


@asynccontextmanager
async def open_api(cfg: Api, ledger: Path) -> AsyncIterator[ChatAPI]:
    """The replies of earlier runs and a connection for new ones, inside one event loop.

    `ledger` is JSONL of every reply with its tokens and cost; its key is null for an attempt
    without an answer.
    """
    headers: dict[str, str] = {}
    if cfg.api_key_env:
        if cfg.api_key_env not in os.environ:
            raise UserError(f"environment variable {cfg.api_key_env} with the API key is not set.")
        headers["Authorization"] = f"Bearer {os.environ[cfg.api_key_env]}"
    async with httpx2.AsyncClient(
        base_url=str(cfg.api_url).rstrip("/") + "/",
        headers=headers,
        timeout=cfg.api_timeout_s,
        limits=httpx2.Limits(max_connections=cfg.api_max_concurrent),
    ) as client:
        api = ChatAPI(cfg, client, Journal(ledger))
        try:
            yield api
        finally:
            await asyncio.gather(*api.tasks, return_exceptions=True)
            api.ledger.close()


class ChatAPI:
    """`chat`, its ledger and its budget."""

    def __init__(self, cfg: Api, client: httpx2.AsyncClient, ledger: Journal) -> None:
        self.cfg, self.ledger, self.spending = cfg, ledger, Spending()
        self.tasks: set[Task[Reply]] = set()
        """Requests under way."""
        self._flying: list[Reply] = []
        """What each of them would be at worst."""
        self._client, self._room = client, asyncio.Condition()
        self._known: dict[str, Reply] = {}
        for row in ledger.rows:
            self._count(row["key"], Reply(**{k: v for k, v in row.items() if k != "key"}))

    async def chat(self, messages: Messages, sampling: Sampling) -> Reply:
        """One reply. Raises UserError when refused, out of budget, or after too many failures."""
        body = {
            "model": self.cfg.api_model,
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
        worst = self._priced("", False, bound, sampling.max_tokens)
        random, failure = Random(key), _Retry("never tried")
        for attempt in range(self.cfg.api_attempts):
            try:
                return await self._attempt(key, body, worst)
            except _Retry as retry:
                failure = retry
                backoff = FIRST_DELAY_S * 2**attempt * random.uniform(0.5, 1.0)
                await asyncio.sleep(backoff if retry.after is None else retry.after)
        raise UserError(
            f"{self.cfg.api_url} failed {self.cfg.api_attempts} times, the last time: {failure}."
        )

    async def _attempt(self, key: str, body: dict[str, Any], worst: Reply) -> Reply:
        """One request, as soon as there is room. Once sent, it outlives whoever waits for it."""
        async with self._room:
            await self._room.wait_for(partial(self._fits, worst))
            self._flying.append(worst)
            task = asyncio.create_task(self._send(key, body, worst))
            self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return await asyncio.shield(task)

    def _fits(self, new: Reply) -> bool:
        """Whether a request may start now. Raises UserError if it never can."""
        cfg, spent, flying = self.cfg, self.spending, [*self._flying, new]
        for name, limit, so_far, worst in (
            ("api_max_tokens", cfg.api_max_tokens, spent.tokens, [r.tokens for r in flying]),
            ("api_max_cost", cfg.api_max_cost, spent.cost, [r.cost for r in flying]),
        ):
            if limit is not None and so_far + worst[-1] > limit:
                raise UserError(
                    f"{name}={limit} is used up: {spent}; the next request may need {worst[-1]:g}. "
                    "What is done is kept; raise it and start again to go on."
                )
            if limit is not None and so_far + sum(worst) > limit:
                return False
        return len(flying) <= cfg.api_max_concurrent

    async def _send(self, key: str, body: dict[str, Any], worst: Reply) -> Reply:
        """Post it, and book what it cost before anyone learns of it."""
        try:
            reply = await self._post(body, worst)
            self._book(key, reply)
        except _Retry as retry:
            if retry.billed:
                self._book(None, worst)
            raise
        finally:
            self._flying.remove(worst)
            async with self._room:
                self._room.notify_all()
        return reply

    async def _post(self, body: dict[str, Any], worst: Reply) -> Reply:
        try:
            response = await self._client.post("chat/completions", json=body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _Retry(repr(error)) from error
        except httpx2.TransportError as error:
            raise _Retry(repr(error), billed=True) from error
        if response.status_code in RETRIED:
            raise _Retry(f"HTTP {response.status_code}", response.headers.get("retry-after"))
        if response.status_code != httpx2.codes.OK:
            raise UserError(
                f"{self.cfg.api_url}: HTTP {response.status_code}: {response.text[:200]!r}"
            )
        try:
            data = response.json()
            choice, usage = data["choices"][0], data.get("usage") or {}
            text, whole = choice["message"]["content"] or "", choice["finish_reason"] == "stop"
        except (ValueError, KeyError, IndexError, TypeError) as error:
            what = f"not a chat completion: {response.text[:80]!r}"
            raise _Retry(what, billed=True) from error
        # A server that does not say what it took: the worst.
        n_prompt = usage.get("prompt_tokens", worst.n_prompt)
        n_generated = usage.get("completion_tokens", worst.n_generated)
        return self._priced(text, whole, n_prompt, n_generated)

    def _priced(self, text: str, whole: bool, n_prompt: int, n_generated: int) -> Reply:
        prices = self.cfg.api_prompt_price, self.cfg.api_completion_price
        cost = (n_prompt * prices[0] + n_generated * prices[1]) / 1e6
        return Reply(text, whole, n_prompt, n_generated, cost)

    def _book(self, key: str | None, reply: Reply) -> None:
        """On disk; an attempt without an answer has no key."""
        self.ledger.append({"key": key, **asdict(reply)})
        self._count(key, reply)

    def _count(self, key: str | None, reply: Reply) -> None:
        if key is not None:
            self._known[key] = reply
        self.spending.requests += 1
        self.spending.unanswered += key is None
        self.spending.prompt_tokens += reply.n_prompt
        self.spending.generated_tokens += reply.n_generated
        self.spending.cost += reply.cost


class _Retry(Exception):
    """An attempt that may succeed later; `after` is the server's own wish in seconds."""

    def __init__(self, what: str, retry_after: str | None = None, *, billed: bool = False) -> None:
        super().__init__(what)
        self.billed = billed
        """Whether it may have been served."""
        numeric = (retry_after or "").isdecimal()  # it may also be a date
        self.after = min(float(retry_after or ""), LONGEST_WAIT_S) if numeric else None
