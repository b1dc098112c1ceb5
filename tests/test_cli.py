"""Test the process around a script: help, one line for a mistake, a run directory's settings."""

import os
import subprocess
import sys

import pytest

from rftt.run.cli import check_same_run
from rftt.run.config import RLConfig, describe
from rftt.types import UserError
from tests.conftest import ROOT, count_calls


def test_help_names_every_field_with_little_work():
    n_calls, text = count_calls(lambda: describe(RLConfig))
    assert n_calls < 200_000  # 38,000 today
    assert all(name in text for name in RLConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("learning_rat=1", "Did you mean 'learning_rate'?"),
        ("train_file=nowhere.jsonl", "nowhere.jsonl does not exist; check the path."),
    ],
)
def test_a_script_prints_one_line_and_exits_with_2(tmp_path, argument, line):
    done = subprocess.run(
        [sys.executable, "train_rl.py", "configs/tiny/rl.yaml", f"output_dir={tmp_path}", argument],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_run_directory_keeps_to_its_settings(tmp_path):
    file = tmp_path / "config.yaml"
    check_same_run(file, {"seed": 1})
    file.write_text("seed: 0\nmax_num_seqs: 8\n")
    check_same_run(file, {"seed": 0, "max_num_seqs": 16})
    with pytest.raises(UserError, match="begun with seed=0, now it is 1"):
        check_same_run(file, {"seed": 1})


NAMES = ("audit_grader", "audit_rows", "gpu_check", "prm_serve", "prm_train")
TOOLS = [f"tools/{name}" for name in (*NAMES, "report", "self_improve", "tiny_world")]


@pytest.mark.cases
@pytest.mark.parametrize("name", ["bench/search", "bench/grader", "bench/train_step", *TOOLS])
def test_a_tool_starts_as_its_header_says(name):
    """From another folder and without PYTHONPATH: the script finds the package by itself."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
