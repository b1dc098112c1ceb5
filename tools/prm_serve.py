"""Serve a local process reward model (PRM) at a URL, for many clients.

    python tools/prm_serve.py --model FOLDER [--port 8008] [--prm_family qwen …]

POST /get_reward with `{"input": "QUESTION Step 1: TEXT ки\\nStep 2: TEXT ки"}` returns
`{"score": [0.9, 0.4]}`. Every error is JSON with a reason. The status is 422 for a malformed
request or a path that is too long, and 413 for a body over the limit. FastAPI and uvicorn read and
write in one event loop. The model scores in the event loop of another thread. Concurrent requests
therefore share a batch, and a long forward pass does not delay connections.

The server binds to loopback by default because it has no authentication. Web pages can reach a
loopback address, so requests with an Origin or another content type are rejected.
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
"""Time for a whole request, in seconds. Slower connections are closed."""
SHUTDOWN_S = 10
"""Time for requests under way when the server is stopped, in seconds."""
BACKLOG = 1024
"""Number of connections that may wait to be accepted."""
MAX_CHARS_PER_TOKEN = 8
"""Bound on the characters per token before tokenization. Mathematical text has three or four."""
PATH = "/get_reward"
Score = Callable[[str, Sequence[str]], Awaitable[list[float]]]


# ---- One request ----


def from_wire(text: str) -> tuple[str, list[str]]:
    """Return question and steps of an `input` in the official format, in linear time.

    Raises Unscored if `text` has another format.
    """
    *parts, rest = text.split(TAG)
    question, opener, first = parts[0].partition("Step 1:") if parts else ("", "", "")
    if not opener or rest.strip():
        raise Unscored(
            f"input must be 'QUESTION Step 1: TEXT {TAG}', with {TAG!r} at the end of each step"
        )
    others = (part.lstrip().removeprefix(f"Step {n}:") for n, part in enumerate(parts[1:], 2))
    return question.rstrip(), [step.strip() for step in (first, *others)]


def parse(body: bytes, max_tokens: int) -> tuple[str, list[str]]:
    """Return question and steps of a request. Raises Unscored unless it can be scored.

    Before the length of the path is checked, all work is linear in the length of the body.
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
            f"for {max_tokens} tokens"
        )
    try:
        text.encode()  # Half of a surrogate pair is valid JSON but not valid text.
    except UnicodeEncodeError as error:
        raise Unscored(str(error)) from error
    question, steps = from_wire(text)
    if len(steps) > max_tokens:  # every step has at least one token
        raise Unscored(f"path of {len(steps)} steps; the limit is {max_tokens} tokens")
    return question, steps


def refusal(status: int, detail: str) -> HTTPException:
    """Return a JSON error that closes the connection, because its body may be unread."""
    return HTTPException(status, detail, {"connection": "close"})


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body. Raises HTTPException if it is too long, too slow or from a web page."""
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
        raise refusal(400, "the client has disconnected") from error
    return bytes(body)


# ---- The server ----


def build_app(score: Score, *, max_body_bytes: int, max_tokens: int) -> FastAPI:
    """Return the application, without FastAPI's documentation pages."""
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
    """Close idle connections regularly, because uvicorn itself never does.

    A connection is idle if it sends no new request between two checks.
    """
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
    """Load the model and serve it until SIGINT or SIGTERM."""
    if cfg.prm_model_name_or_path is None:
        raise UserError("prm_serve.py needs a model; add --model FOLDER.")
    from rftt.graders.prm_local import LocalPRM

    prm, loop = LocalPRM(cfg), asyncio.new_event_loop()
    # A request must fit one batch, because a longer one would delay all others.
    prm.max_length = min(prm.max_length, cfg.prm_max_tokens_per_batch)
    server, listener = open_server(prm, loop, cfg, prm.max_length)

    def stop(_signal: int, _frame: object) -> None:
        server.should_exit = True

    # uvicorn installs its own handlers. After its end it raises the signal again for these.
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
    """Convert `--model FOLDER --port 8008` to `name=value`, and run the server."""
    words = sys.argv[1:]
    names = iter([word.removeprefix("--") for word in words])
    given = [word if "=" in word else f"{word}={next(names, '')}" for word in names]
    asked = bool(words) and "--help" not in words
    alias = [re.sub("^model=", "prm_model_name_or_path=", word) for word in given]
    cli(serve, ServeConfig, alias if asked else ["--help"])


if __name__ == "__main__":
    main()
