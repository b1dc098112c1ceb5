"""Run the real scripts many times quickly: import the slow packages once, then fork.

Reads JSON lines {"script", "arguments", "began", "after", "signal", "max_bytes"} and answers each
with {"code"}: the script's exit code, or minus the signal that ended it. The signal is sent `after`
seconds after the file `began` was written. `max_bytes` bounds every file that the script writes,
as a full disk does.
"""

import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

import safetensors.torch  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import train_sft  # noqa: F401

ROOT = Path(__file__).parents[1]


def child(order: dict) -> None:
    """Become the script. Never returns."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if order["max_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["max_bytes"],) * 2)
    sys.argv = [order["script"], *order["arguments"]]
    code = 1
    try:
        runpy.run_path(str(ROOT / order["script"]), run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        if code == 1:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def serve(order: dict) -> int:
    begin, began = time.time(), Path(order["began"])
    pid = os.fork()
    if pid == 0:
        child(order)
    due = None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if due is None and order["signal"] and began.exists() and began.stat().st_mtime >= begin:
            due = time.monotonic() + order["after"]
        if due is not None and time.monotonic() >= due:
            os.kill(pid, order["signal"])
            due = float("inf")
        time.sleep(0.002)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        begin = time.monotonic()
        code = serve(json.loads(line))
        sys.stdout.write(json.dumps({"code": code, "seconds": time.monotonic() - begin}) + "\n")
        sys.stdout.flush()
