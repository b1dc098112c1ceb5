"""Other people's terminals, disks and files of a run: one line, and a state to continue from."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import train_rl
from rftt.engines.opened import check_files, open_model
from rftt.run import log as log_module
from rftt.run.cli import INTERRUPTED, TERMINATED, check_same_run, cli, stop_on_signals
from rftt.run.config import EvalConfig, RLConfig, load_config
from rftt.run.files import one_line, printable
from rftt.run.log import RunLog, say
from rftt.types import UserError
from tests.conftest import ROOT
from tests.learners import tiny_model
from tests.small_world import make_world, settings
from tests.test_cases_machine import EVALUATE
from tools.report import write_report

pytestmark = pytest.mark.cases


def ended_by(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """(exit code, stderr) of a script that raises `error`."""

    def main(_cfg: EvalConfig) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        cli(main, EvalConfig, [*EVALUATE, "dtype=float32"])
    return ended.value.code, capsys.readouterr().err


# ---- Ctrl-C and signals ----


def test_ctrl_c_is_one_line_and_code_130(capsys) -> None:
    code, line = ended_by(KeyboardInterrupt(), capsys)
    assert (code, line.count("\n")) == (130, 1)
    assert "interrupted; start the same command again to continue" in line


def test_ctrl_c_that_a_library_wraps_is_found(capsys) -> None:
    error = RuntimeError("worker failed")
    error.__cause__ = KeyboardInterrupt()
    assert ended_by(error, capsys)[0] == INTERRUPTED


@pytest.mark.parametrize(
    ("name", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)]
)
def test_a_training_ends_after_its_step_and_a_second_ctrl_c_ends_it_at_once(name, code) -> None:
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = stop_on_signals()
        assert stop.code == 0
        signal.raise_signal(name)
        assert stop.code == code
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


# ---- Disks ----


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (errno.ENOSPC, "the disk is full; free space"),
        (errno.EDQUOT, "the disk is full; free space"),
        (errno.EROFS, "use a writable output_dir"),
        (errno.EACCES, "cannot be opened"),
        (errno.EIO, "the disk has a fault"),
        (errno.EMFILE, "raise the limit (ulimit -n)"),
        (errno.ESTALE, "mount the drive again"),
    ],
)
def test_a_disk_that_fails_is_one_line(capsys, code, cure) -> None:
    error = RuntimeError("a library's own error")
    error.__context__ = OSError(code, os.strerror(code), "o/metrics.jsonl")
    status, line = ended_by(error, capsys)
    assert (status, line.count("\n")) == (2, 1)
    assert cure in line
    assert "o/metrics.jsonl" in line


@pytest.mark.parametrize("name", ["output_dir", "config file"])
def test_a_path_that_is_too_long_is_one_line(tmp_path, capsys, name) -> None:
    (tmp_path / "loop").symlink_to("loop")
    words = [*EVALUATE[:2], "dtype=float32"]
    for path in ("x" * 300, tmp_path / "loop"):
        more = [f"output_dir={path}"] if name == "output_dir" else [str(path), "output_dir=o"]
        with pytest.raises(SystemExit) as ended:
            cli(lambda c: RunLog(Path(c.output_dir), {}, enabled=True), EvalConfig, [*more, *words])
        assert (ended.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


def test_a_disk_that_fails_in_a_library_is_one_line(capsys) -> None:
    status, line = ended_by(RuntimeError("I/O error: no room (os error 28)"), capsys)
    assert (status, line.count("\n")) == (2, 1)
    assert "the disk is full; free space" in line


def test_other_errors_keep_their_traceback() -> None:
    def main(_cfg: EvalConfig) -> None:
        raise OSError(errno.EPIPE, "a bug")

    with pytest.raises(OSError, match="a bug"):
        cli(main, EvalConfig, [*EVALUATE, "dtype=float32"])


# ---- Terminals ----


@pytest.mark.parametrize("target", ["| head -1", "> /dev/full", ">&-"])
def test_help_whose_reader_is_gone_ends_well(target) -> None:
    command = ["bash", "-c", f'set -o pipefail; "$0" train_rl.py --help {target}', sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_training_whose_reader_is_gone_runs_to_its_end(tmp_path, monkeypatch) -> None:
    """As in `train_rl.py … 2>&1 | head -1`, when head has ended."""
    world = make_world(tmp_path / "world")
    words = settings("train_rl", world, tmp_path / "run", "dtype=float32", "save_steps=0")
    monkeypatch.setattr(transformers_logging, "_tqdm_active", False)  # as rftt.run.cli sets it
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), open(writer, "w", encoding="utf-8", buffering=1) as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        monkeypatch.setattr(sys, "stderr", gone)
        train_rl.main(load_config(RLConfig, words))
        monkeypatch.undo()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert re.findall(r"^step (\d/2) ", log, re.MULTILINE) == ["0/2", "1/2"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize("stream", ["closed", None])
def test_an_error_without_a_stream_keeps_its_code(monkeypatch, stream) -> None:
    file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (closed at once)
    file.close()
    monkeypatch.setattr(sys, "stderr", file if stream else None)
    with pytest.raises(SystemExit) as ended:
        cli(lambda _: None, EvalConfig, ["sede=1"])
    assert ended.value.code == 2


HOSTILE = "\x1b]0;title\x07\x1b[31mred\u202eright\ud83d\r."


def test_escape_sequences_reach_no_terminal_and_no_log(tmp_path, capsys) -> None:
    log = RunLog(tmp_path, {}, enabled=True)
    log.info(HOSTILE)
    with log.bar(1, "problem", HOSTILE) as bar:
        bar.advance()
    shown = capsys.readouterr()
    for text in (shown.out, shown.err, (tmp_path / "log.txt").read_text()):
        assert "\\x1b[31mred" in text
        assert not set(text) & set("\x1b\x07\r\u202e\ud83d")
    assert printable("tab\tand\nline é 问 🙂") == "tab\tand\nline é 问 🙂"


def test_an_error_of_foreign_text_is_one_line(capsys) -> None:
    code, line = ended_by(UserError(f"{HOSTILE}\nsecond line"), capsys)
    assert (code, line.count("\n")) == (2, 1)
    assert "\x1b" not in line
    assert one_line(ValueError()) == "ValueError"


def test_what_a_terminal_cannot_encode_is_escaped(monkeypatch, tmp_path) -> None:
    with open(tmp_path / "terminal", "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        say("é first")
        say("second")
    assert (tmp_path / "terminal").read_text() == "\\xe9 first\nsecond\n"
    assert log_module.sys.stdout is terminal


# ---- Reports ----


def test_names_and_levels_are_no_markup_in_a_report(tmp_path) -> None:
    name = "a<b>|$x\n# h `c` [l](j:x)\x1b[31m"
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0}\n{"step": 1, "reward": 2.0}\n')
    levels = {"<script>x</script>\n## y": {"greedy": 0.5, "n": 2}}
    (run / "eval/summary.json").write_text(json.dumps({"set": "s", "n": 2, "levels": levels}))
    report = write_report({name: run}, tmp_path / "out").read_text()
    assert "<b>" not in report
    assert "<script>" not in report
    assert "\x1b" not in report
    assert [line[:3] for line in report.splitlines() if line.startswith("#")].count("# h") == 0
    assert "## y" not in report.splitlines()
    assert "](j:x)" not in report
    assert len(list((tmp_path / "out/plots").iterdir())) == 1


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 0}\n{"ste\n{"step": 2}\n', r"metrics.jsonl:2 is not JSON"),
        (
            "metrics.jsonl",
            "[" * 9000 + "\n",
            "metrics.jsonl:1 is not JSON .*deeply",
        ),
        ("eval/summary.json", "{", "summary.json is not JSON"),
        ("eval/summary.json", "[]", "summary.json must contain a JSON object"),
        ("trees/a.json", '{"nodes": ', "a.json is not JSON"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line(tmp_path, file, content, message) -> None:
    path = tmp_path / "run" / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        write_report({"run": tmp_path / "run"}, tmp_path / "out")


def test_a_bad_middle_line_of_the_metrics_is_one_line(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is not JSON"):
        RunLog(tmp_path, {}, enabled=True)


# ---- Configs of a run directory ----


@pytest.mark.parametrize(
    "content",
    ["- a list", "", "a: [1", "a: &a [*a]", "[" * 9000, "a: \ud83d", "a: !!python/object:x {}"],
)
def test_a_damaged_config_of_a_run_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"config.yaml.*(is damaged; use a new|must be UTF-8)"):
        check_same_run(tmp_path / "config.yaml", {"seed": 0})


def test_an_alias_bomb_in_a_run_directory_is_one_line(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]" for i in range(9)]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "seed: *a9"]))
    with pytest.raises(UserError, match="is damaged; use a new output_dir"):
        check_same_run(tmp_path / "config.yaml", {"seed": 0})


# ---- Pickles ----


def test_a_pickle_is_never_read(tmp_path: Path) -> None:

    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle.* convert .* safetensors"):
        check_files(str(tmp_path))
    with pytest.raises(UserError, match="no model at"):
        open_model(AutoModelForCausalLM, str(tmp_path), torch.float32, check=False)
