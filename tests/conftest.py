"""Shared helpers: commands, waiting, and one small demo run for the whole session."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
HANG_LIMIT = 1500.0
"""Seconds after which anything counts as hanging: the only time limit of the tests.

`make demo FAST=1`, the longest command, may take a tenth of it on a slow machine. It stays below
the 30 minutes that torch waits for a rank.
"""
# Here too, before torch is imported: the last bits of a sum depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
# The tests are for CPUs: on a machine with one GPU two ranks could not start. CUDA_VISIBLE_DEVICES
# from outside is kept.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# A console script starts with the path of its interpreter, which may contain a space. With
# --standalone the system chooses the port, so that tests may run side by side.
TORCHRUN = ("python", "-m", "torch.distributed.run", "--standalone")
ENV = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
# A slow machine must not fail an example that takes long to make or to check.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")


def run(*command, env=(), check=True):
    """Run a command in the repository root and return it with its output as text."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=ENV | dict(env),
        capture_output=True,
        text=True,
        timeout=HANG_LIMIT,
    )
    if check:
        assert done.returncode == 0, f"{command} exits with {done.returncode}: {done.stderr}"
    return done


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    """Wait until `condition` holds. Fail if `process` ends before that."""
    deadline = time.monotonic() + HANG_LIMIT
    while not condition():
        assert process.poll() is None, f"ended too early, with code {process.returncode}"
        assert time.monotonic() < deadline, f"nothing happened for {HANG_LIMIT} s"
        time.sleep(0.002)


def count_calls(function: Callable[[], Any]) -> tuple[int, Any]:
    """Return how many functions `function` calls, a measure of work, and its result."""
    n_calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal n_calls
        n_calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return n_calls, result


# ---- One session on several workers (pytest-xdist) ----


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each group of tests to one worker: its tests share fixtures.

    xdist_group would do the same, but pytest-xdist 3.8 cannot rename the tests of pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the long groups first, so that all workers are busy to the end."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: rank_of(group_of(item.nodeid)))


def group_of(nodeid: str) -> str:
    """Return the file of a test, or its part of one of the two files that are divided."""
    path, _, name = nodeid.partition("::")
    file = Path(path).stem
    if file == "test_demo":  # the demo is shared by all workers
        return f"{file}-{name}"
    if file == "test_faults":  # the unbroken run is shared by the tests of a script
        scripts = ("search", "evaluate", "train_sft", "train_rl")
        return f"{file}-{next((s for s in scripts if f'{s}]' in name), 'train_rl')}"
    return file


def rank_of(group: str) -> int:
    """Place of a group in LONG_GROUPS, by its longest prefix there; the quick ones come last."""
    known = [name for name in LONG_GROUPS if group.startswith(name)]
    return LONG_GROUPS.index(max(known, key=len)) if known else len(LONG_GROUPS)


LONG_GROUPS = (
    "test_demo-test_last_line",  # makes the demo
    "test_self_improve",
    "test_resume",
    "test_faults",
    "test_offline",
    "test_errors",
    "test_demo-",
    "test_shares",
    "test_doctor",
    "test_prm",
    "test_fsdp",
    "test_checkpoint",
    "test_rejection",
    "test_openai",
)
"""Prefixes of groups of a minute and more, in the order in which they start."""


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all workers of a session have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder of `make demo FAST=1`, the JSON object it printed last).

    The first worker that needs the demo runs it, and the others wait for its lock.
    """
    out = shared_folder(tmp_path_factory) / "demo"
    report = out.with_suffix(".json")
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            done = run("bash", "runs/demo.sh", env={"OUT": str(out), "FAST": "1"}, check=False)
            found = {"code": done.returncode, "stdout": done.stdout, "stderr": done.stderr[-3000:]}
            report.write_text(json.dumps(found))
    found = json.loads(report.read_text())
    assert found["code"] == 0, found["stderr"]
    return out, json.loads(found["stdout"].strip().splitlines()[-1])
