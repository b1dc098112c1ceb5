"""Use an OpenAI-compatible URL as the instruct model of a prompted search: messages in, text out.

This is not an Engine. Such servers return text without token ids, so only phase 1 (distilling from
a bigger model) can use one. The `openai` client retries and waits. The ledger and the budget belong
to this module. They are part of the transport, because it handles every attempt:

1. A reply is written to disk before it is used. When a run stops, requests under way are awaited.
   The same command therefore never pays twice for a reply.
2. The budget is a hard limit. A request waits, or fails, while its worst case does not fit. An
   attempt without a reply, or with an implausible usage, is booked at its worst case. No server
   can make a booking larger than that, so that the bookings never exceed the budget.
3. Only the key and the body are sent. Other headers of the client come from the environment and are
   dropped.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from asyncio import Task
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2

from rftt.engines.base import Reply, Sampling
from rftt.engines.http import RETRIED, Bounded
from rftt.prompts import Messages
from rftt.run.files import Journal, valid_unicode
from rftt.types import UserError

try:
    import openai
except ModuleNotFoundError:
    raise UserError(
        "engine=api needs the package openai; pip install -r requirements-api.txt."
    ) from None

if TYPE_CHECKING:
    from rftt.run.config import Api

MESSAGE_OVERHEAD = 64
"""Upper bound on the tokens that a chat template adds to one message."""
MAX_TOKEN_BYTES = 64
"""Bound on the bytes of a token on average. A usage of fewer tokens than that is not accepted."""
MIN_KEY = 12
"""Shortest key, in characters, that is a secret and cannot be a word of a reply."""
FINISHED = frozenset({"stop", "eos", "eos_token", "stop_sequence", "end_turn"})
"""Finish reasons of a complete reply. Others mean that it was cut off or withheld."""

UNSENT = (
    *(httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError),
    *(httpx2.UnsupportedProtocol, httpx2.LocalProtocolError),
)
"""Failures before a request leaves this machine. They are not billed."""


@dataclass
class Spending:
    """Totals of one ledger, over all runs."""

    requests: int = 0
    unanswered: int = 0
    """Requests without a reply that the server may have billed. Their worst case is booked."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cost: float = 0.0
    above: int = 0
    """Replies of this process with a usage above the worst case, which was booked instead."""

    @property
    def tokens(self) -> int:
        """Number of prompt and generated tokens."""
        return self.prompt_tokens + self.generated_tokens

    def __str__(self) -> str:
        above = f"; the server reported more for {self.above} of them" if self.above else ""
        return (
            f"{self.requests} requests ({self.unanswered} unanswered), {self.prompt_tokens} prompt "
            f"+ {self.generated_tokens} generated tokens, cost {self.cost:.4f}{above}"
        )


@dataclass(frozen=True)
class Order:
    """Data about a request that the transport needs and the client does not pass on."""

    key: str
    """Key of the reply in the ledger."""
    worst: Reply
    """Most tokens and highest cost that the reply can have."""


ORDER: ContextVar[Order] = ContextVar("order")


# ---- The ledger and the hard budget ----


@dataclass
class Account:
    """The replies on disk and the budget, which covers them and the requests under way."""

    cfg: Api
    ledger: Journal
    spending: Spending = field(default_factory=Spending)
    known: dict[str, Reply] = field(default_factory=dict)
    flying: list[Reply] = field(default_factory=list)
    """Worst cases of the requests under way."""
    room: asyncio.Condition = field(default_factory=asyncio.Condition)

    def __post_init__(self) -> None:
        for row in self.ledger.rows:
            self._count(row["key"], Reply(**{k: v for k, v in row.items() if k != "key"}))

    async def reserve(self, worst: Reply) -> None:
        """Wait until a request that takes `worst` fits. Raises UserError if it never can."""
        async with self.room:
            await self.room.wait_for(partial(self._fits, worst))
            self.flying.append(worst)

    async def release(self, worst: Reply) -> None:
        """Release what `reserve` reserved, so that waiting requests are checked again."""
        self.flying.remove(worst)
        async with self.room:
            self.room.notify_all()

    def _fits(self, new: Reply) -> bool:
        cfg, spent, flying = self.cfg, self.spending, [*self.flying, new]
        for name, limit, so_far, worst in (
            ("api_max_tokens", cfg.api_max_tokens, spent.tokens, [r.tokens for r in flying]),
            ("api_max_cost", cfg.api_max_cost, spent.cost, [r.cost for r in flying]),
        ):
            if limit is not None and so_far + worst[-1] > limit:
                raise UserError(
                    f"{name}={limit} is used up: {spent}; the next request may need {worst[-1]:g}. "
                    "Finished work is saved; raise the budget and start again to resume."
                )
            if limit is not None and so_far + sum(worst) > limit:
                return False
        return len(flying) <= cfg.api_max_concurrent

    def book(self, key: str | None, reply: Reply) -> None:
        """Write a reply to the ledger. An attempt without a reply has the key None."""
        self.ledger.append({"key": key, **asdict(reply)})
        self._count(key, reply)

    def _count(self, key: str | None, reply: Reply) -> None:
        if key is not None:
            self.known[key] = reply
        self.spending.requests += 1
        self.spending.unanswered += key is None
        self.spending.prompt_tokens += reply.n_prompt
        self.spending.generated_tokens += reply.n_generated
        self.spending.cost += reply.cost


def priced(cfg: Api, text: str, whole: bool, n_prompt: int, n_generated: int) -> Reply:
    """Return a reply with its cost."""
    cost = (n_prompt * cfg.api_prompt_price + n_generated * cfg.api_completion_price) / 1e6
    return Reply(text, whole, n_prompt, n_generated, cost)


def read_reply(cfg: Api, body: bytes, worst: Reply) -> Reply:
    """Return the reply in a chat completion. Raises ValueError if `body` is something else."""
    try:
        data = json.loads(body)
        choice, usage = data["choices"][0], data.get("usage")
        content, finish = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(repr(error)) from error
    if isinstance(content, list):  # some servers return parts, such as thoughts and text
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str | None):
        raise ValueError(f"content must be text, got {type(content).__name__}")
    text = valid_unicode(content or "")
    usage = usage if isinstance(usage, dict) else {}
    n_prompt = plausible(
        usage.get("prompt_tokens"), worst.n_prompt // MAX_TOKEN_BYTES, worst.n_prompt
    )
    least = len(text.encode()) // MAX_TOKEN_BYTES
    n_generated = plausible(usage.get("completion_tokens"), least, worst.n_generated)
    whole = isinstance(finish, str) and finish in FINISHED
    return priced(cfg, text, whole, n_prompt, n_generated)


def plausible(tokens: object, least: int, worst: int) -> int:
    """Return a server's token count, or the worst case if the count is implausible.

    More than the worst case is never booked, because only the worst case is reserved in the budget.
    """
    if type(tokens) is int and max(1, least) <= tokens <= worst:
        return tokens
    return worst


def exceeds(body: bytes, worst: Reply) -> bool:
    """Return whether a chat completion reports a usage above the worst case."""
    usage = json.loads(body).get("usage")
    usage = usage if isinstance(usage, dict) else {}
    bounds = {"prompt_tokens": worst.n_prompt, "completion_tokens": worst.n_generated}
    return any(type(usage.get(k)) is int and usage[k] > bound for k, bound in bounds.items())


def without_key(text: str, key: str) -> str:
    """Return a server's text without the key, which it may echo.

    Placeholders of servers without a key, such as EMPTY, are short and remain.
    """
    return text.replace(key, "[key]") if len(key) >= MIN_KEY else text


class Metered(httpx2.AsyncBaseTransport):
    """A transport that reserves and books every attempt of the client, including retries."""

    def __init__(self, account: Account, inner: Bounded, key: str) -> None:
        self.account, self.inner, self._key = account, inner, key
        self.tasks: set[Task[httpx2.Response]] = set()
        """Requests under way."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one attempt as soon as it fits. Cancelling the caller does not cancel it."""
        order, headers = ORDER.get(), {"content-type": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        plain = httpx2.Request("POST", request.url, headers=headers, content=request.content)
        await self.account.reserve(order.worst)
        task = asyncio.create_task(self._send(plain, order))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return await asyncio.shield(task)

    async def _send(self, request: httpx2.Request, order: Order) -> httpx2.Response:
        """Send a request and book its cost before the reply is returned."""
        account, worst = self.account, order.worst
        try:
            response = await self.inner.handle_async_request(request)
            if response.is_success:
                reply = read_reply(account.cfg, response.content, worst)
                account.book(order.key, replace(reply, text=without_key(reply.text, self._key)))
                account.spending.above += exceeds(response.content, worst)
            return response
        except UNSENT:
            raise
        except (httpx2.TransportError, asyncio.CancelledError):  # the server may bill it
            account.book(None, worst)
            raise
        except ValueError as error:  # a status that the client retries
            account.book(None, worst)
            return httpx2.Response(502, text=f"not a chat completion: {error}", request=request)
        finally:
            await account.release(worst)

    async def aclose(self) -> None:
        """Wait for the requests under way, because they will be billed, and close."""
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.inner.aclose()


# ---- The chat ----


@asynccontextmanager
async def open_api(cfg: Api, ledger: Path) -> AsyncIterator[ChatAPI]:
    """Yield a chat with the replies of earlier runs and a connection for new ones.

    `ledger` is a JSONL file with every reply, its tokens and its cost. An attempt without a reply
    has the key null.
    """
    key, url = read_key(cfg.api_key_env), str(cfg.api_url).rstrip("/")
    account = Account(cfg, Journal(ledger))
    inner = Bounded(url, deadline_s=cfg.api_timeout_s, max_connections=cfg.api_max_concurrent)
    transport = Metered(account, inner, key)
    try:
        async with openai.AsyncOpenAI(
            base_url=url,
            api_key="none",  # the transport holds the real one
            max_retries=cfg.api_attempts - 1,
            timeout=None,
            http_client=httpx2.AsyncClient(transport=transport, trust_env=False),
        ) as client:
            yield ChatAPI(cfg, client, transport, key)
    finally:
        account.ledger.close()


def read_key(variable: str | None) -> str:
    """Return the API key in an environment variable, or "" if `variable` is not set.

    Raises UserError for a malformed key, without showing it.
    """
    if not variable:
        return ""
    if variable not in os.environ:
        raise UserError(f"environment variable {variable} must contain the API key; set it.")
    key = os.environ[variable].strip()
    if not key.isascii() or not key.isprintable() or " " in key or not key:
        raise UserError(f"the API key in {variable} must be one word of printable ASCII; check it.")
    return key


class ChatAPI:
    """A chat with a server, with its spending."""

    def __init__(self, cfg: Api, client: openai.AsyncOpenAI, transport: Metered, key: str) -> None:
        self.cfg, self.account, self._client = cfg, transport.account, client
        self.spending = self.account.spending
        self._where, self._key = f"{cfg.api_url}{transport.inner.route}", key

    async def chat(self, messages: Messages, sampling: Sampling) -> Reply:
        """Return one reply, from the ledger if it has one.

        Raises UserError if the server rejects the request, if the budget is used up, or after the
        last retry.
        """
        asked: dict[str, Any] = {
            "model": self.cfg.api_model,
            "messages": messages,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        if key in self.account.known:
            return self.account.known[key]
        # The body may omit fields, but the ledger's key always covers the whole request.
        body = {name: value for name, value in asked.items() if name not in ("max_tokens", "seed")}
        body[self.cfg.api_max_tokens_key] = sampling.max_tokens
        if self.cfg.api_seed:
            body["seed"] = sampling.seed % 2**31  # many servers hold it in 32 bits
        bound = sum(len(m["content"].encode()) + MESSAGE_OVERHEAD for m in messages)
        ORDER.set(Order(key, priced(self.cfg, "", False, bound, sampling.max_tokens)))
        try:
            await self._client.post("/chat/completions", body=body, cast_to=httpx2.Response)
        except openai.APIStatusError as error:
            status = f"HTTP {error.status_code}: {self._shown(error.response.text)}"
            if error.status_code not in RETRIED:
                raise UserError(f"{self._where} rejected a request: {status}") from None
            raise self._failed(status) from None
        except openai.APIConnectionError as error:
            raise self._failed(self._shown(repr(error.__cause__), quote=False)) from None
        return self.account.known[key]

    def _failed(self, last: str) -> UserError:
        attempts = self.cfg.api_attempts
        return UserError(f"{self._where} failed {attempts} times, the last time: {last}.")

    def _shown(self, text: str, *, quote: bool = True) -> str:
        """Return the beginning of a server's text without the key, which it may echo."""
        text = (text.replace(self._key, "[key]") if self._key else text)[:200]
        return repr(text) if quote else text
