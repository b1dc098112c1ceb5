"""A process reward model behind a URL: one local PRM for many clients.

    python tools/prm_serve.py --model FOLDER [--port 8008] [--prm_family qwen …]

POST /get_reward with `{"input": "QUESTION Step 1: TEXT ки\\nStep 2: TEXT ки"}` answers
`{"score": [0.9, 0.4]}`. What it cannot score is refused with a reason: 422 for a malformed request
or a path that is too long, 413 for a body over the limit. A thread per connection reads and writes,
the event loop scores, so that concurrent requests share a batch; a slow or rude client costs a
thread for `IDLE_S` at most. It binds to loopback unless told otherwise: there is no authentication.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

sys.path.insert(0, str(Path(__file__).parents[1]))
from rftt.graders.prm import TAG, ProcessModel, Unscored, ranking_warning
from rftt.run.cli import cli
from rftt.run.config import ServeConfig
from rftt.run.log import say
from rftt.types import UserError

IDLE_S = 60.0
"""A connection that sends nothing for so long is closed."""
BACKLOG = 1024
"""Connections that may wait to be accepted."""
PATH = "/get_reward"
Score = Callable[[str, Sequence[str]], list[float]]


def from_wire(text: str) -> tuple[str, list[str]]:
    """Question and steps of an official `input`. Raises Unscored where it is not one."""
    *parts, rest = text.split(TAG)
    opened = re.match(r"(.*?)\s*Step 1:(.*)", parts[0], re.DOTALL) if parts else None
    if opened is None or rest.strip():
        raise Unscored(f"input is not 'QUESTION Step 1: TEXT {TAG}', each step ended by {TAG!r}")
    steps = [opened[2], *(re.sub(rf"^\s*Step {n}:", "", p) for n, p in enumerate(parts[1:], 2))]
    return opened[1], [step.strip() for step in steps]


def answer(body: bytes, score: Score) -> tuple[int, dict[str, object]]:
    """Status and reply to one request body."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        return 422, {"detail": f"the body is not JSON ({error})"}
    text = request.get("input") if isinstance(request, dict) else None
    if not isinstance(text, str):
        return 422, {"detail": 'the body must be {"input": "…"}'}
    try:
        text.encode()  # half of a surrogate pair is JSON, but no text
        return 200, {"score": score(*from_wire(text))}
    except (Unscored, UnicodeEncodeError) as refusal:
        return 422, {"detail": str(refusal)}
    except UserError as error:
        return 500, {"detail": str(error)}


def open_server(
    prm: ProcessModel,
    loop: asyncio.AbstractEventLoop,
    *,
    host: str,
    port: int,
    max_body_bytes: int = 1 << 20,
) -> ThreadingHTTPServer:
    """A bound server whose requests `prm` scores in `loop`; a thread must run `serve_forever`."""

    def score(question: str, steps: Sequence[str]) -> list[float]:
        return asyncio.run_coroutine_threadsafe(prm.score(question, steps), loop).result()

    class Handler(BaseHTTPRequestHandler):
        protocol_version, timeout = "HTTP/1.1", IDLE_S

        def do_POST(self) -> None:
            length = self.headers.get("content-length", "")
            if self.path != PATH:
                self.reply(404, {"detail": f"POST {PATH}"}, close=True)
            elif not (length.isascii() and length.isdecimal()):
                self.reply(411, {"detail": "content-length is missing"}, close=True)
            elif int(length[:20]) > max_body_bytes:
                self.reply(413, {"detail": f"body over {max_body_bytes} bytes"}, close=True)
            else:
                body = self.rfile.read(int(length))
                self.reply(*answer(body, score))

        def reply(self, status: int, content: dict[str, object], *, close: bool = False) -> None:
            data = json.dumps(content, ensure_ascii=False).encode()
            self.close_connection |= close
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.send_header("connection", "close" if self.close_connection else "keep-alive")
            self.end_headers()
            self.wfile.write(data)

        def handle(self) -> None:
            try:
                BaseHTTPRequestHandler.handle(self)
            except (ConnectionError, TimeoutError):  # the client has gone
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: the client has the reason."""

    server = ThreadingHTTPServer((host, port), Handler, bind_and_activate=False)
    server.request_queue_size, server.daemon_threads = BACKLOG, True
    try:
        server.server_bind()
        server.server_activate()
    except OSError as error:
        server.server_close()
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); set port.") from error
    return server


def serve(cfg: ServeConfig) -> None:
    if cfg.prm_model_name_or_path is None:
        raise UserError("serve needs --model FOLDER.")
    from rftt.graders.prm_local import LocalPRM

    prm = LocalPRM(cfg)

    async def run() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, stop.set)
        server = open_server(
            prm, loop, host=cfg.host, port=cfg.port, max_body_bytes=cfg.max_body_bytes
        )
        Thread(target=server.serve_forever, daemon=True).start()
        if warning := await ranking_warning(prm, cfg.prm_check_file):
            say(f"warning: {warning}")
        say(f"listening on http://{cfg.host}:{server.server_port}{PATH}")
        await stop.wait()
        server.shutdown()
        server.server_close()

    asyncio.run(run())


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
