"""Run a script as a process: `--help`, one-line errors with exit code 2, SIGTERM, lack of memory.

config.py reads the configuration. torch is imported only after the configuration is valid.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from rftt.run.config import RUNTIME_KEYS, describe, load_config, typed_yaml
from rftt.run.files import decode_text, one_line, read_bytes
from rftt.types import UserError

C = TypeVar("C")

OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA Error: out of memory",  # vLLM's allocator
    "DefaultCPUAllocator: can't allocate memory",
)
"""Parts of messages of torch and vLLM, whose exception types would have to be imported."""
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes of a script that was stopped. It continues when it is started again."""
AGAIN = "and start the same command again to continue"
ACCESS = (
    "a file cannot be opened ({}); give yourself access to it, or use a writable output_dir if it "
    "is below that"
)
DISK = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "a file cannot be written ({}); the disk is full; free space " + AGAIN,
    ),
    errno.EROFS: "a file cannot be written ({}); use a writable output_dir " + AGAIN,
    errno.EIO: "a file cannot be written ({}); the disk has a fault; use another output_dir "
    + AGAIN,
    **dict.fromkeys((errno.EACCES, errno.EPERM), ACCESS),
    errno.ENAMETOOLONG: "a path is longer than the file system allows ({}); use a shorter one",
    errno.ELOOP: "a path leads through too many links ({}); correct the links",
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "too many files are open ({}); raise the limit (ulimit -n)"
    ),
    errno.ESTALE: "a file of a network drive has gone ({}); mount the drive again " + AGAIN,
}
"""Errors of a file system -> message. Without permission reading fails as well as writing."""


def cli(main: Callable[[C], None], schema: type[C], argv: Sequence[str] | None = None) -> None:
    """Run a script. `--help` lists the fields. A UserError becomes one line and exit code 2.

    The same holds for a lack of memory and for a disk that is full or read-only. SIGTERM and Ctrl-C
    end the script at once, unless it has called `stop_on_signals`. Work in a journal is not lost.
    """
    # Set before torch and transformers are imported: no progress bars for files, no NUMA notes.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        from rftt.run.log import say

        say(describe(schema).rstrip("\n"))
        raise SystemExit(0 if argv else 2)
    asked = threading.Event()

    def exit_now(_signal: int, _frame: object) -> None:
        asked.set()
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, exit_now)
    try:
        config = load_config(schema, argv)
        if getattr(config, "dtype", None) == "auto":
            from rftt.run.precision import settle_dtype

            config = settle_dtype(config)
        if getattr(config, "template_date", "") is None:
            config = settle_date(config)
        main(config)
    except UserError as error:
        _complain(str(error))
        raise SystemExit(2) from None
    except BaseException as error:
        causes = list(_causes(error))  # libraries wrap errors (torch's CheckpointException)
        if asked.is_set():
            raise SystemExit(TERMINATED) from None
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            _complain("interrupted; start the same command again to continue.")
            raise SystemExit(INTERRUPTED) from None
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            _complain(
                "not enough memory; set gradient_checkpointing: true, fsdp_cpu_offload: true, a "
                "smaller max_tokens_per_microbatch, max_num_seqs or gpu_memory_utilization. "
                f"tools/doctor.py prints an estimate ({one_line(error)})."
            )
            raise SystemExit(2) from None
        for cause in causes:
            if (number := _errno(cause)) in DISK:
                _complain(f"{DISK[number].format(one_line(cause))}.")
                raise SystemExit(2) from None
        raise


def _complain(message: str) -> None:
    """Write an error in one line. Without a terminal only the exit code remains."""
    with suppress(OSError, ValueError, AttributeError):  # closed pipe, full disk, no stream
        sys.stderr.write(f"error: {one_line(message, 10_000)}\n")
        sys.stderr.flush()


def _errno(error: BaseException) -> int | None:
    """Return the number of a system error. Libraries in Rust write it into their text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d{1,3})\)", str(error)[:10_000])
    return int(found[1]) if found else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it."""
    seen = set[int]()
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        left += [found.__context__, found.__cause__]
        if type(found).__name__ == "CheckpointException":  # torch's; torch is not imported
            failures = getattr(found, "failures", {})  # rank -> (error, stack)
            left += [failure[0] for failure in failures.values()]


@dataclass
class Stop:
    """A request to stop after the current step."""

    code: int = 0
    """Exit code, INTERRUPTED or TERMINATED. 0 means that no signal has arrived."""


def stop_on_signals() -> Stop:
    """Return a record of SIGTERM and of the first Ctrl-C, which no longer end the script.

    A training loop reads it after each step, writes a checkpoint and ends. The second Ctrl-C ends
    the script at once.
    """
    stop = Stop()

    def ask(name: int, _frame: object) -> None:
        stop.code = 128 + name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, ask)
    return stop


def load_function(key: str, name: str) -> Callable[..., object]:
    """Return the user's function that the config names as `module:function` under `key`.

    Raises UserError if it cannot be imported or is not callable.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"`{key}` must be an importable module:function, got {name!r} ({error}); put the "
            "module beside the script or on PYTHONPATH."
        ) from error
    if not callable(function):
        raise UserError(
            f"`{key}` must name a function, got {name!r}, which is of type "
            f"{type(function).__name__}; write module:function."
        )
    return function


def settle_date(config: Any) -> Any:
    """Return `config` with the date for chat templates: the run's first day, or today."""
    before = recorded_config(Path(config.output_dir) / "config.yaml")
    if "template_date" in before:  # None where a program began the run, without this function
        return replace(config, template_date=before["template_date"])
    return replace(config, template_date=date.today().isoformat())


def recorded_config(config_file: Path) -> dict[str, Any]:
    """Return the recorded config of a run directory, or {} for a new one."""
    if not config_file.exists():
        return {}
    try:
        before = typed_yaml(decode_text(read_bytes(config_file), config_file))
    except ValueError as error:
        raise UserError(f"{config_file} is damaged; use a new output_dir.") from error
    if not isinstance(before, dict):
        raise UserError(f"{config_file} is damaged; use a new output_dir.")
    return before


def check_same_run(config_file: Path, config: dict[str, Any]) -> None:
    """Raise UserError if a run directory belongs to an experiment with other settings."""
    before = recorded_config(config_file)
    for key, value in config.items():
        if key not in RUNTIME_KEYS and key in before and before[key] != value:
            raise UserError(
                f"{config_file.parent} was begun with {key}={before[key]!r}, now it is {value!r}; "
                "use a new output_dir."
            )
