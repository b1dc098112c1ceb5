"""A process reward model behind a URL: one local PRM for many clients.

    python tools/prm_serve.py --model FOLDER [--port 8008] [--prm_family qwen …]

POST /get_reward with `{"input": "QUESTION Step 1: TEXT ки\\nStep 2: TEXT ки"}` returns
`{"score": [0.9, 0.4]}`. Every error is JSON with a reason: 422 for a malformed request or a path
that is too long, 413 for a body over the limit. FastAPI and uvicorn read and write in one event
loop. The model scores in the event loop of a thread, so that concurrent requests share a batch and
a long forward pass delays no connection.

The server binds to loopback by default because it has no authentication. It refuses web pages,
which may otherwise reach a loopback address: they send an Origin or another content type.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from threading import Thread

sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as error:
    sys.stderr.write(f"error: {error.name} is missing; pip install -r requirements-serve.txt\n")
    raise SystemExit(2) from None
from rftt.graders.prm import TAG, ProcessModel, Unscored, ranking_warning
from rftt.run.cli import cli
from rftt.run.config import ServeConfig
from rftt.run.log import say
from rftt.types import UserError

IDLE_S = 60
"""Time for a whole request, in seconds; slower connections are closed."""
SHUTDOWN_S = 10
"""Time for requests under way when the server is stopped, in seconds."""
BACKLOG = 1024
"""Connections that may wait to be accepted."""
MAX_CHARS_PER_TOKEN = 8
"""Bound on the length of a path before it is tokenized; mathematical text has three or four."""
PATH = "/get_reward"
Score = Callable[[str, Sequence[str]], Awaitable[list[float]]]


# ---- One request ----


def from_wire(text: str) -> tuple[str, list[str]]:
    """Return question and steps of an official `input` in linear time.

    Raises Unscored if `text` has another format.
    """
    *parts, rest = text.split(TAG)
    question, opener, first = parts[0].partition("Step 1:") if parts else ("", "", "")
    if not opener or rest.strip():
        raise Unscored(f"input is not 'QUESTION Step 1: TEXT {TAG}', each step ended by {TAG!r}")
    others = (part.lstrip().removeprefix(f"Step {n}:") for n, part in enumerate(parts[1:], 2))
    return question.rstrip(), [step.strip() for step in (first, *others)]


def parse(body: bytes, max_tokens: int) -> tuple[str, list[str]]:
    """Return question and steps of a request. Raises Unscored unless it can be scored.

    Only work linear in the length of the body is done before the path is known to be short.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unscored(f"the body is not JSON ({error})") from error
    text = request.get("input") if isinstance(request, dict) else None
    if not isinstance(text, str):
        raise Unscored('the body must be {"input": "…"}')
    if len(text) > MAX_CHARS_PER_TOKEN * max_tokens:
        raise Unscored(
            f"path of {len(text)} characters; the limit is {MAX_CHARS_PER_TOKEN * max_tokens} "
            f"for the {max_tokens} tokens that are read"
        )
    try:
        text.encode()  # Half of a surrogate pair is valid JSON but not valid text.
    except UnicodeEncodeError as error:
        raise Unscored(str(error)) from error
    question, steps = from_wire(text)
    if len(steps) > max_tokens:  # every step takes a token at least
        raise Unscored(f"path of {len(steps)} steps; {max_tokens} tokens are read")
    return question, steps


def refusal(status: int, detail: str) -> HTTPException:
    """Return a JSON error after which the connection is closed: its body may not have been read."""
    return HTTPException(status, detail, {"connection": "close"})


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body. Raises HTTPException as soon as it is too long, slow or from a web page."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if "origin" in request.headers:
        raise refusal(403, "requests from web pages are not accepted")
    if kind != "application/json":
        raise refusal(415, f"content-type must be application/json, got {kind[:80]!r}")
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise refusal(413, f"the body is longer than {max_bytes} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(IDLE_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise refusal(413, f"the body is longer than {max_bytes} bytes")
    except TimeoutError as error:
        raise refusal(408, f"the body did not arrive within {IDLE_S} s") from error
    except ClientDisconnect as error:
        raise refusal(400, "the client has gone") from error
    return bytes(body)


# ---- The server ----


def build_app(score: Score, *, max_body_bytes: int, max_tokens: int) -> FastAPI:
    """Return the application, without FastAPI's pages about itself."""
    app = FastAPI(openapi_url=None)

    @app.post(PATH)
    async def get_reward(request: Request) -> dict[str, list[float]]:
        body = await read_body(request, max_body_bytes)
        try:
            return {"score": await score(*parse(body, max_tokens))}
        except Unscored as reason:
            raise HTTPException(422, str(reason)) from reason
        except (UserError, RuntimeError) as error:
            raise HTTPException(500, str(error)) from error

    return app


def open_server(
    prm: ProcessModel, loop: asyncio.AbstractEventLoop, cfg: ServeConfig, max_tokens: int
) -> tuple[uvicorn.Server, socket.socket]:
    """Return a server and its bound socket. A thread must run `loop`, in which `prm` scores."""

    async def score(question: str, steps: Sequence[str]) -> list[float]:
        coroutine = prm.score(question, steps)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))

    app = build_app(score, max_body_bytes=cfg.max_body_bytes, max_tokens=max_tokens)
    try:
        family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
        listener = socket.create_server((cfg.host, cfg.port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {cfg.host}:{cfg.port} ({error}); set port.") from error
    settings = uvicorn.Config(
        app,
        http="h11",  # `drop_idle` reads the state of its connections
        ws="none",
        lifespan="off",
        backlog=BACKLOG,
        log_config=None,
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return uvicorn.Server(settings), listener


async def drop_idle(server: uvicorn.Server) -> None:
    """Close connections that send no new request between two looks; uvicorn waits for ever."""
    before: set[object] = set()
    while True:
        await asyncio.sleep(IDLE_S)
        cycles = [(c, getattr(c, "cycle", None)) for c in server.server_state.connections]
        idle = [(c, cycle) for c, cycle in cycles if cycle is None or cycle.response_complete]
        for connection, cycle in idle:
            if (connection, cycle) in before:
                connection.transport.close()
        before = set(idle)


def serve(cfg: ServeConfig) -> None:
    if cfg.prm_model_name_or_path is None:
        raise UserError("serve needs --model FOLDER.")
    from rftt.graders.prm_local import LocalPRM

    prm, loop = LocalPRM(cfg), asyncio.new_event_loop()
    # One request is never longer than a batch: it would delay all others.
    prm.max_length = min(prm.max_length, cfg.prm_max_tokens_per_batch)
    server, listener = open_server(prm, loop, cfg, prm.max_length)

    def stop(_signal: int, _frame: object) -> None:
        server.should_exit = True

    # uvicorn has handlers of its own, and raises the signal again for these when it has ended.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, stop)
    if warning := loop.run_until_complete(ranking_warning(prm, cfg.prm_check_file)):
        say(f"warning: {warning}")
    Thread(target=loop.run_forever, name="prm", daemon=True).start()

    async def run() -> None:
        idle = asyncio.create_task(drop_idle(server))
        say(f"listening on http://{cfg.host}:{listener.getsockname()[1]}{PATH}")
        await server.serve([listener])
        idle.cancel()

    asyncio.run(run())
    loop.call_soon_threadsafe(loop.stop)


def main() -> None:
    """`--model FOLDER --port 8008`: the other scripts' `name=value`, with dashes."""
    words = sys.argv[1:]
    names = iter([word.removeprefix("--") for word in words])
    given = [word if "=" in word else f"{word}={next(names, '')}" for word in names]
    asked = bool(words) and "--help" not in words
    alias = [re.sub("^model=", "prm_model_name_or_path=", word) for word in given]
    cli(serve, ServeConfig, alias if asked else ["--help"])


if __name__ == "__main__":
    main()
