"""One small demo run, shared by every test that needs a model which follows instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Here too, before torch is imported: the last bits of a sum depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
# A console script starts with the path of its interpreter, which may contain a space.
TORCHRUN = ("python", "-m", "torch.distributed.run")
ENV = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def run(*command, env=(), check=True, timeout=600):
    """A command in the repository root, its output as text."""
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=ENV | dict(env),
        capture_output=True,
        text=True,
        check=check,
        timeout=timeout,
    )


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """(folder of `make demo FAST=1`, the JSON object it printed last)."""
    out = tmp_path_factory.mktemp("demo")
    done = run("bash", "runs/demo.sh", env={"OUT": str(out), "FAST": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads(done.stdout.strip().splitlines()[-1])
