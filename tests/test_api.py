"""The chat client against a local server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rftt.engines.api import ApiConfig, Reply, Spending, open_chat
from rftt.schema import Sampling, UserError

MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]
Answer = tuple[int, dict[str, str], bytes] | None
"""Status, headers, body; None hangs up without a word."""


def completion(text: str = "4", finish: str = "stop", usage: bool = True) -> Answer:
    data: dict[str, Any] = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
    if usage:
        data["usage"] = {"prompt_tokens": 10, "completion_tokens": 5}
    return 200, {}, json.dumps(data).encode()


class Server:
    """Answers request i with script[i], the last entry for ever after, and remembers them all."""

    def __init__(self) -> None:
        self.url = ""
        self.script: list[Answer] = [completion()]
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.delay_s = 0.0
        self.now = self.most = 0
        self.lock = threading.Lock()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["content-length"]))
        with self.lock:
            self.seen.append(json.loads(body))
            self.keys.append(request.headers["authorization"])
            answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.delay_s)
        with self.lock:
            self.now -= 1
        if answer is None:
            request.close_connection = True
            return
        status, headers, content = answer
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("content-length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)


@pytest.fixture
def server() -> Iterator[Server]:
    behaviour = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            behaviour.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    behaviour.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield behaviour
    http.shutdown()
    http.server_close()


@pytest.fixture
def config(server: Server, tmp_path: Path) -> Callable[..., ApiConfig]:
    def make(**changes: Any) -> ApiConfig:
        settings: dict[str, Any] = {
            "base_url": server.url,
            "model": "big",
            "ledger": tmp_path / "ledger.jsonl",
            "budget": 1.0,
            "prompt_price": 2.0,
            "completion_price": 4.0,
            "timeout_s": 5.0,
            "attempts": 4,
            "first_delay_s": 0.01,
        }
        return ApiConfig(**settings | changes)

    return make


def ask(cfg: ApiConfig, *seeds: int, max_tokens: int = 50) -> tuple[list[Reply], Spending]:
    async def together() -> tuple[list[Reply], Spending]:
        async with open_chat(cfg) as api:
            how = (Sampling(max_tokens=max_tokens, temperature=0.7, seed=seed) for seed in seeds)
            return await asyncio.gather(*(api.chat(MESSAGES, s) for s in how)), api.spending

    return asyncio.run(together())


def test_reply_carries_text_tokens_and_cost(
    server: Server, config: Callable[..., ApiConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    server.script = [completion("It is 4.", finish="length")]
    [reply], spending = ask(config(key_variable="SOME_KEY"), 3)
    assert reply == Reply("It is 4.", whole=False, n_prompt=10, n_generated=5, cost=4e-5)
    assert spending == Spending(1, 10, 5, 4e-5, reserved=0.0)
    assert server.keys == ["Bearer secret"]
    assert server.seen[0] == {
        "model": "big",
        "messages": MESSAGES,
        "max_tokens": 50,
        "temperature": 0.7,
        "top_p": 1.0,
        "seed": 3,
    }


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"retry-after": "0"}, b"slow down"),
        (500, {}, b"oops"),
        (503, {}, b""),
        (200, {}, b"<html>gateway</html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"mess'),
        None,
    ],
)
def test_passing_faults_are_retried(
    server: Server, config: Callable[..., ApiConfig], fault: Answer
) -> None:
    server.script = [fault, fault, completion()]
    [reply], spending = ask(config(), 0)
    assert reply.text == "4"
    assert len(server.seen) == 3
    assert spending.requests == 1
    unanswered = fault is None or fault[0] == 200
    assert (spending.reserved > 0) == unanswered


def test_time_out_is_retried_and_stays_reserved(
    server: Server, config: Callable[..., ApiConfig]
) -> None:
    server.delay_s = 1.0
    with pytest.raises(UserError, match=r"failed 2 times, the last time: ReadTimeout"):
        ask(config(timeout_s=0.1, attempts=2), 0)
    assert len(server.seen) == 2


def test_server_says_how_long_to_wait(server: Server, config: Callable[..., ApiConfig]) -> None:
    server.script = [(429, {"retry-after": "1"}, b""), completion()]
    start = time.monotonic()
    ask(config(), 0)
    assert time.monotonic() - start >= 1.0


def test_our_own_error_is_not_retried(server: Server, config: Callable[..., ApiConfig]) -> None:
    server.script = [(400, {}, b"no such model")]
    with pytest.raises(UserError, match="HTTP 400: 'no such model'"):
        ask(config(), 0)
    assert len(server.seen) == 1


def test_missing_key_is_named(config: Callable[..., ApiConfig]) -> None:
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        ask(config(key_variable="NO_SUCH_KEY"), 0)


def test_many_at_once_but_no_more_than_allowed(
    server: Server, config: Callable[..., ApiConfig]
) -> None:
    server.delay_s = 0.05
    replies, spending = ask(config(max_concurrent=4), *range(16))
    assert len(replies) == spending.requests == 16
    assert server.most == 4


def test_continued_run_pays_for_nothing_twice(
    server: Server, config: Callable[..., ApiConfig]
) -> None:
    cfg = config()
    first, _ = ask(cfg, 0, 1, 2)
    with cfg.ledger.open("a", encoding="utf-8") as file:
        file.write('{"key": "killed while wri')
    again, spending = ask(cfg, 0, 1, 2, 3)
    assert again[:3] == first
    assert len(server.seen) == 4
    assert (spending.requests, spending.prompt_tokens, spending.generated_tokens) == (4, 40, 20)
    assert spending.cost == pytest.approx(1.6e-4)
    assert len(cfg.ledger.read_text().splitlines()) == 4
    assert len(ask(cfg, 3)[0]) == 1
    assert len(server.seen) == 4


def test_invariant_budget_is_never_exceeded(
    server: Server, config: Callable[..., ApiConfig]
) -> None:
    server.script = [completion()]
    worst = (14 + 64) * 2e-6 + 50 * 4e-6  # the prompt is 14 bytes long
    cfg = config(budget=3 * worst)
    with pytest.raises(UserError, match="budget"):
        ask(cfg, *range(10))
    assert len(server.seen) <= 3
    with pytest.raises(UserError, match="budget"):
        ask(config(budget=0.99 * worst, ledger=cfg.ledger.with_name("new")), 0)

    def one_by_one() -> None:
        for seed in range(100, 200):
            ask(cfg, seed)

    with pytest.raises(UserError, match="budget"):
        one_by_one()  # the ledger counts what was really used
    spent = sum(json.loads(line)["cost"] for line in cfg.ledger.read_text().splitlines())
    assert cfg.budget - worst <= spent <= cfg.budget


def test_reply_without_usage_costs_its_worst_case(
    server: Server, config: Callable[..., ApiConfig]
) -> None:
    server.script = [completion(usage=False)]
    [reply], _ = ask(config(), 0)
    assert (reply.n_prompt, reply.n_generated) == (14 + 64, 50)
