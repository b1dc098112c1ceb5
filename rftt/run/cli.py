"""Run a script as a process: `--help`, one-line errors with exit code 2, SIGTERM, lack of memory.

config.py reads the configuration. torch is imported only after the configuration is valid.
"""

from __future__ import annotations

import importlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from rftt.run.config import RUNTIME_KEYS, describe, load_config
from rftt.types import Problem, UserError

C = TypeVar("C")

OUT_OF_MEMORY = ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory")
"""Parts of torch's messages. Its exception types are not used, because torch is not imported."""
STOPPED = 128 + signal.SIGTERM
"""Exit code of a script that SIGTERM has stopped. It continues when it is started again."""


def cli(main: Callable[[C], None], schema: type[C], argv: Sequence[str] | None = None) -> None:
    """Run a script. `--help` lists the fields. A UserError becomes one line and exit code 2.

    The same holds for a lack of memory. SIGTERM ends the script at once, unless it has called
    `stop_on_sigterm`. Work that is in a journal is not lost.
    """
    # Set before torch and transformers are imported: no progress bars for files, no NUMA notes.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(describe(schema))
        raise SystemExit(0 if argv else 2)
    asked = threading.Event()

    def exit_now(_signal: int, _frame: object) -> None:
        asked.set()
        raise SystemExit(STOPPED)

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
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except BaseException as error:
        if asked.is_set():  # libraries wrap what a handler raises (torch's CheckpointException)
            raise SystemExit(STOPPED) from None
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            reason = " ".join(str(error).split())[:200]
            sys.stderr.write(
                "error: not enough memory; set gradient_checkpointing: true, fsdp_cpu_offload: "
                "true, a smaller max_tokens_per_microbatch or a smaller max_num_seqs. "
                f"tools/doctor.py prints an estimate ({reason}).\n"
            )
            raise SystemExit(2) from None
        raise


def stop_on_sigterm() -> threading.Event:
    """Return an event that SIGTERM sets instead of ending the script.

    A training loop reads it after each step, writes a checkpoint and ends.
    """
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return asked


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


def own_reward(function: str, problem: Problem, text: str) -> float:
    """Return the user's reward. Raises UserError if it is not a finite number."""
    value = load_function("reward_function", function)(problem, text)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(
            f"reward_function must return a finite number, got {value!r} for problem {problem.id}; "
            "correct the function."
        )
    return float(value)


def settle_date(config: Any) -> Any:
    """Return `config` with the date for chat templates: the run's first day, or today."""
    before = _config_before(Path(config.output_dir) / "config.yaml")
    if "template_date" in before:  # None where a program began the run, without this function
        return replace(config, template_date=before["template_date"])
    return replace(config, template_date=date.today().isoformat())


def _config_before(config_file: Path) -> dict[str, Any]:
    """Return the recorded config of a run directory, or {} for a new one."""
    import yaml

    if not config_file.exists():
        return {}
    try:
        before = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{config_file} is damaged; use a new output_dir.") from error
    if not isinstance(before, dict):
        raise UserError(f"{config_file} is damaged; use a new output_dir.")
    return before


def check_same_run(config_file: Path, config: dict[str, Any]) -> None:
    """Raise UserError if a run directory belongs to an experiment with other settings."""
    before = _config_before(config_file)
    for key, value in config.items():
        if key not in RUNTIME_KEYS and key in before and before[key] != value:
            raise UserError(
                f"{config_file.parent} was begun with {key}={before[key]!r}, now it is {value!r}; "
                "use a new output_dir."
            )
