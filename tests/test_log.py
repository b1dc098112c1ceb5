"""Test run/log.py: what is written and printed, and that resumed files equal unbroken ones."""

import io
import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from rftt.run import log as log_module
from rftt.run.log import RunLog, environment, number
from rftt.types import UserError
from tests.conftest import ROOT

CONFIG = {"learning_rate": 5e-7, "report_to": [], "eval_file": None}


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_starts_with_its_config_and_environment(tmp_path: Path) -> None:
    RunLog(tmp_path / "run", CONFIG, enabled=True)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == CONFIG
    env = json.loads((tmp_path / "run/env.json").read_text())
    assert env["argv"] == sys.argv
    assert env["versions"]["torch"].startswith("2.")
    assert env["device"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock",
        "config.yaml",
        "env.json",
        "metrics.jsonl",
    ]


def test_the_commit_is_unknown_without_a_checkout_or_git(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=128, stdout="")
    monkeypatch.setattr(log_module.subprocess, "run", lambda *a, **k: failed)
    assert environment()["commit"] is None
    monkeypatch.setattr(log_module.shutil, "which", lambda name: None)
    monkeypatch.setattr(log_module.subprocess, "run", None)  # not called
    assert environment()["commit"] is None


def test_step_appends_a_sorted_row_and_prints_the_chosen_keys(tmp_path: Path, capsys) -> None:
    log = RunLog(tmp_path, CONFIG, enabled=True)
    log.step(0, {"reward": 0.25, "accuracy": 0.5}, ["accuracy", "eval/greedy", "reward"], total=4)
    out = capsys.readouterr().out
    assert out.startswith("step 0/4  accuracy 0.5  reward 0.25  eta 0:00:0")
    assert (tmp_path / "log.txt").read_text() == out
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 0, "accuracy": 0.5, "reward": 0.25}\n'


def test_the_time_left_is_that_of_the_steps_not_yet_done(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(log_module.time, "monotonic", lambda: next(clock))
    log = RunLog(tmp_path, CONFIG, enabled=True)
    log.step(7, {}, [], total=10)  # a resumed run: one step took 10 s, two are left
    log.step(8, {}, [], total=10)  # two steps took 30 s, one is left
    assert capsys.readouterr().out == "step 7/10  eta 0:00:20\nstep 8/10  eta 0:00:15\n"


def test_what_is_not_finite_is_stored_as_null(tmp_path: Path, capsys) -> None:
    log = RunLog(tmp_path, CONFIG, enabled=True)
    log.step(0, {"kl": float("nan"), "reward": float("inf")}, ["kl"])
    assert rows(tmp_path) == [{"step": 0, "kl": None, "reward": None}]
    assert "kl nan" in capsys.readouterr().out


@pytest.mark.invariant
def test_resuming_same_file_as_an_unbroken_run(tmp_path: Path) -> None:
    def run(run_dir: Path, first: int, last: int) -> None:
        log = RunLog(run_dir, CONFIG, enabled=True)
        log.rewind(first)
        for step in range(first, last):
            log.step(step, {"reward": step / 7}, [])

    run(tmp_path / "unbroken", 0, 6)
    run(tmp_path / "broken", 0, 5)
    with open(tmp_path / "broken/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')  # killed in the middle of a line
    run(tmp_path / "broken", 3, 6)  # the newest checkpoint was that of step 3
    broken, unbroken = (tmp_path / name / "metrics.jsonl" for name in ("broken", "unbroken"))
    assert broken.read_bytes() == unbroken.read_bytes()


def test_a_disabled_log_does_nothing(tmp_path: Path, capsys) -> None:
    log = RunLog(tmp_path / "run", CONFIG, enabled=False)
    log.info("hello")
    log.step(0, {"reward": 1.0}, ["reward"], total=2)
    log.rewind(0)
    with log.bar(3, "problem", "search") as bar:
        bar.advance(solved=1.0)
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_a_bar_without_a_terminal_is_a_line_every_tenth(tmp_path: Path, capsys) -> None:
    with RunLog(tmp_path, CONFIG, enabled=True).bar(40, "problem", "search") as bar:
        for done in range(40):
            bar.advance(solved=done % 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("search:  10%")
    assert "4/40" in lines[0]
    assert lines[0].endswith("solved 0.5")
    assert "100%" in lines[-1]


def test_a_bar_on_a_terminal_is_drawn_and_wiped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with RunLog(tmp_path, CONFIG, enabled=True).bar(2, "problem", "search") as bar:
        bar.advance(solved=0.5)
        bar.advance(solved=1)
    drawn = terminal.getvalue()
    assert "search" in drawn
    assert "\n" not in drawn
    assert drawn.endswith("\r")


def test_report_to_names_what_is_wrong_or_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError,
        match="`report_to` must be a list of any of tensorboard, wandb, trackio, got 'mlflow'",
    ):
        RunLog(tmp_path, CONFIG, enabled=True, report_to=["mlflow"])
    monkeypatch.setattr(log_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb"):
        RunLog(tmp_path, CONFIG, enabled=True, report_to=["wandb"])


@pytest.mark.cases
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_receives_the_rows_of_one_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    opened: list[dict] = []
    sent: list[tuple] = []
    run = SimpleNamespace(log=lambda row, step: sent.append((step, row)))
    tracker = SimpleNamespace(init=lambda **options: opened.append(options) or run)
    monkeypatch.setitem(sys.modules, name, tracker)
    monkeypatch.setattr(log_module, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    out = tmp_path / "seed0/rl"
    log = RunLog(out, CONFIG, enabled=True, report_to=[name])
    assert opened == []
    log.step(3, {"reward": 0.5, "kl": float("nan")}, [])
    log.step(4, {"reward": 0.75}, [])
    assert sent == [(3, {"reward": 0.5}), (4, {"reward": 0.75})]
    log._lock.close()
    RunLog(out, CONFIG, enabled=True, report_to=[name]).step(5, {}, [])
    assert opened[0] == opened[1]
    assert opened[0]["name"] == "seed0/rl"
    assert opened[0]["resume"] == "allow"
    assert opened[0]["config"] == CONFIG
    assert opened[0]["project"] == "rftt"
    if name == "wandb":
        assert len(opened[0]["id"]) == 32
    else:
        assert os.environ.pop("TRACKIO_DIR") == str(out / "trackio")


@pytest.mark.cases
def test_a_tracker_that_opens_no_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb's own error is not a subclass of Python's narrower ones."""

    class Error(Exception):
        pass

    names: list[str] = []

    def init(*, name: str, **_: object) -> None:
        names.append(name)
        raise Error("api_key not configured\n(no-tty)")

    tracker = SimpleNamespace(init=init, Error=Error, __name__="wandb")
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setattr(log_module, "find_spec", lambda name: ModuleSpec(name, None))
    (tmp_path / "seed0" / "rl").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "seed0" / "rl")
    log = RunLog(Path(), CONFIG, enabled=True, report_to=["wandb"])
    with pytest.raises(UserError, match=r"wandb opens no run .api_key .*; log in") as error:
        log.step(0, {"reward": 0.5}, [])
    assert "\n" not in str(error.value)
    assert names == ["seed0/rl"]


class Closed(io.StringIO):
    """A stream whose reader has gone, or whose disk is full."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.cases
@pytest.mark.faults
def test_a_terminal_that_is_gone_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", Closed())
    log = RunLog(tmp_path, CONFIG, enabled=True)
    for step in range(3):
        log.step(step, {"reward": 0.5}, ["reward"])
    with log.bar(1, "problem", "search") as bar:
        bar.advance()
    assert len(rows(tmp_path)) == len((tmp_path / "log.txt").read_text().splitlines()) == 3


@pytest.mark.cases
@pytest.mark.faults
@pytest.mark.parametrize("target", ["| head -1", "> /dev/full", ">&-"])
def test_a_process_whose_stdout_is_gone_ends_well(tmp_path: Path, target: str) -> None:
    code = (
        "from pathlib import Path; from rftt.run.log import RunLog\n"
        f"log = RunLog(Path({str(tmp_path / 'run')!r}), {{}}, enabled=True)\n"
        "for step in range(2000): log.step(step, {'reward': 0.5}, ['reward'])"
    )
    command = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {target}', sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(rows(tmp_path / "run")) == 2000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.4123, "0.412"),
        (12.5, "12.5"),
        (-0.25, "-0.25"),
        (1636.7, "1,637"),
        (5e-7, "5.0e-07"),
        (100, "100"),
        (20.0, "20"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text
