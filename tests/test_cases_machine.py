"""Other people's machines: file systems, environments, command lines, odd numbers."""

from __future__ import annotations

import errno
import json
import re
import socket
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import evaluate
import search
from rftt.engines.http import proxy_of
from rftt.learner import fsdp
from rftt.learner.fsdp import process_group
from rftt.run import log as log_module
from rftt.run.cli import TERMINATED, check_same_run
from rftt.run.config import EvalConfig, RLConfig, SearchConfig, SFTConfig, load_config
from rftt.run.data import read_rows
from rftt.run.files import file_name, write_jsonl
from rftt.run.log import RunLog
from rftt.types import UserError
from tests.conftest import ENV, HANG_LIMIT, ROOT, wait_until
from tests.small_world import make_world, settings
from tests.test_tokens import FAMILIES
from tools import report, self_improve, tiny_world
from tools.self_improve import LoopConfig

pytestmark = pytest.mark.cases
LOOP = "configs/tiny/self_improve.yaml"
EVALUATE = ["model_name_or_path=m", "eval_file=e", "output_dir=o"]
TRAIN = ["model_name_or_path=m", "train_file=t", "output_dir=o", "learning_rate=0.001"]


# ---- File names ----


@pytest.mark.parametrize(
    "identity",
    ["q" * 260, "问题" * 15, "a/b", "..", "", "\0", "x" * 121, "\N{SLIGHTLY SMILING FACE}" * 99],
)
def test_any_id_is_a_file_name(tmp_path, identity) -> None:
    path = tmp_path / f"{file_name(identity)}.json"
    path.write_text("x", encoding="utf-8")
    assert path.parent == tmp_path
    assert len(path.name.encode()) <= 143
    assert file_name(identity + "1") != file_name(identity)


def test_a_short_id_keeps_its_name() -> None:
    assert file_name("train-1") == "train-1"


# ---- Run directories ----


def test_an_output_dir_that_is_or_is_below_a_file_is_one_line(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"output_dir .*file.* must be a folder"):
            RunLog(path, {}, enabled=True)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_an_output_dir_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, code) -> None:
    def refuse(self: Path, **_: object) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot be written to"):
        RunLog(tmp_path / "out", {}, enabled=True)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_warns_and_goes_on(tmp_path, monkeypatch, capsys, code) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(log_module.fcntl, "flock", refuse)
    RunLog(tmp_path, {}, enabled=True).step(0, {"loss": 1.0}, ("loss",))
    assert "does not support locks" in capsys.readouterr().out
    assert "loss" in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("search", ["data", "trees", "stats.json", "data/raw.jsonl", "data/sft.jsonl"]),
        ("evaluate", ["eval", "eval/train.jsonl", "eval/summary.json"]),
    ],
)
def test_a_file_where_a_folder_is_needed_is_one_line(tmp_path, script, names) -> None:
    """And a folder where a file is needed."""
    world = make_world(tmp_path / "world")
    main, schema = {
        "search": (search.main, SearchConfig),
        "evaluate": (evaluate.main, EvalConfig),
    }[script]
    for i, name in enumerate(names):
        place = tmp_path / str(i) / name
        place.parent.mkdir(parents=True)
        if place.suffix:
            place.mkdir()
        else:
            place.write_text("x")
        arguments = settings(script, world, tmp_path / str(i), "dtype=float32", "max_problems=1")
        with pytest.raises(UserError, match=rf"{re.escape(name)} must be a f(older|ile)") as caught:
            main(load_config(schema, arguments))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("below", ["", "below"])
def test_a_tool_whose_output_dir_is_a_file_ends_in_one_line(tmp_path, below) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "run").mkdir()
    out = tmp_path / "file" / below
    loop = load_config(LoopConfig, [str(ROOT / LOOP), f"output_dir={out}"])
    with pytest.raises(UserError, match=r"file.* must be a folder"):
        self_improve.main(loop)
    with pytest.raises(UserError, match=r"file.* must be a folder"):
        tiny_world.main(load_config(tiny_world.TinyConfig, [f"output_dir={out}"]))
    with pytest.raises(UserError, match=r"file.* must be a folder"):
        report.main([str(tmp_path / "run"), "--out", str(out)])


def test_a_loop_without_locks_warns_and_goes_on(tmp_path, monkeypatch, capsys) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    started = subprocess.run

    def step(command: list[str], **how: Any) -> Any:
        if "pass_fds" not in how:  # git, for env.json
            return started(command, **how)
        assert how["pass_fds"] == []
        return SimpleNamespace(returncode=7)

    make_world(tmp_path)
    monkeypatch.setattr(log_module.fcntl, "flock", refuse)
    monkeypatch.setattr(self_improve.subprocess, "run", step)
    keys = [f"output_dir={tmp_path / 'out'}", f"model_name_or_path={tmp_path / 'base'}"]
    keys += [f"target_file={tmp_path / 'train.jsonl'}", "guard_files=[]"]
    with pytest.raises(UserError, match="eval-train ended with code 7"):
        self_improve.main(load_config(LoopConfig, [str(ROOT / LOOP), *keys]))
    assert "does not support locks" in capsys.readouterr().out


def test_the_config_of_a_loops_step_expands_the_home_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("num_samples: 3\n", encoding="utf-8")
    cfg = load_config(LoopConfig, [str(ROOT / LOOP), "evaluate.config=~/mine.yaml"])
    line = self_improve.arguments(cfg, "evaluate", 1, {})
    assert line[0] == str(tmp_path / "mine.yaml")


READING = """
import json, sys
from pathlib import Path
from rftt.run.config import EvalConfig, load_config

cfg = load_config(EvalConfig, sys.argv[2:])
found = [cfg.system_prompt, cfg.chat_template_kwargs]
Path(cfg.eval_file).with_name("found.json").write_text(json.dumps(found))
sys.exit(3)
"""


def test_a_loop_hands_any_text_of_its_config_to_a_step(tmp_path) -> None:
    """From the loop's file over its command line into the config of the script."""
    texts = {
        "prompt": "Smile 🙂 é 问 # Rules: '\"\n\ttwo",
        "kwargs": {"mood": "🙂", "🙃": ["\u2028"]},
    }
    (tmp_path / "base").mkdir()
    write_jsonl(tmp_path / "problems.jsonl", [{"question": "1+1?", "answer": "2"}])
    loop = yaml.safe_load((ROOT / LOOP).read_text(encoding="utf-8"))
    loop |= {
        "model_name_or_path": str(tmp_path / "base"),
        "target_file": str(tmp_path / "problems.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "launch": [sys.executable, "-c", READING],
    }
    loop["evaluate"] |= {"system_prompt": texts["prompt"], "chat_template_kwargs": texts["kwargs"]}
    file = tmp_path / "loop.yaml"
    file.write_text(yaml.safe_dump(loop, allow_unicode=True), encoding="utf-8")
    cfg = load_config(LoopConfig, [str(file)])
    with pytest.raises(UserError, match="eval-problems ended with code 3"):
        self_improve.main(cfg)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == [texts["prompt"], texts["kwargs"]]
    check_same_run(tmp_path / "out" / "config.yaml", asdict(load_config(LoopConfig, [str(file)])))


# ---- Environments ----


def refused_group(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    monkeypatch.setattr(fsdp, "FORMING", timedelta(seconds=1))
    for name in (*fsdp.GROUP_KEYS, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error, process_group("cpu"):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_group_of_another_job_ends_with_one_line(monkeypatch, rank) -> None:
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    message = refused_group(monkeypatch, **group, RANK=rank)
    assert f"MASTER_ADDR=127.0.0.1, MASTER_PORT={group['MASTER_PORT']}, RANK={rank}" in message
    assert "cannot be formed" in message
    assert "unset these variables" in message


JOINING = """
import sys
from rftt.learner.fsdp import process_group
from rftt.run.cli import cli
from rftt.run.config import EvalConfig

def main(cfg):
    with process_group("cpu"):
        pass

cli(main, EvalConfig, sys.argv[1:])
"""


@pytest.mark.faults
@pytest.mark.parametrize("rank", ["0", "1"])
def test_sigterm_ends_a_process_that_waits_for_its_group(rank: str) -> None:
    """Rank 0 waits for the others. Rank 1 has found a server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        if rank == "0":
            server.close()  # rank 0 itself listens there
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank}
        process = subprocess.Popen(
            [sys.executable, "-c", JOINING, *EVALUATE, "dtype=float32"],
            cwd=ROOT,
            env={k: v for k, v in ENV.items() if k != "TORCHELASTIC_RUN_ID"} | group,
            stderr=subprocess.PIPE,
            text=True,
        )
        if rank == "0":
            wait_until(lambda: is_open(port), process)
        else:
            server.settimeout(HANG_LIMIT)
            probe, _ = server.accept()
            client, _ = server.accept()  # torch's, in C++
            probe.close()
        process.terminate()
        _, shown = process.communicate(timeout=HANG_LIMIT)
        if rank == "1":
            client.close()
    assert (process.returncode, shown) == (TERMINATED, "")


def is_open(port: str) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0


@pytest.mark.parametrize("name", ["MASTER_ADDR", "WORLD_SIZE", "RANK"])
def test_half_a_group_in_the_environment_is_one_line(monkeypatch, name) -> None:
    message = refused_group(monkeypatch, **{name: "1"})
    assert f"the environment has {name}=1 but lacks" in message


@pytest.mark.parametrize("group", [{"MASTER_PORT": "x"}, {"RANK": "x"}, {"WORLD_SIZE": "x"}])
def test_a_group_with_words_for_numbers_is_one_line(monkeypatch, group) -> None:
    whole = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "1", "RANK": "0"}
    assert "cannot be formed" in refused_group(monkeypatch, **(whole | group))


def test_a_proxy_does_not_stand_before_loopback(monkeypatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for url in ("http://127.0.0.1:8008", "http://localhost:8008", "http://[::1]:8008"):
        assert proxy_of(url) is None
    assert proxy_of("http://example.com") == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000/v1", "must start with http:// or https:// and a host"),
        ("ftp://a/v1", "must start with http"),
        ("http:///v1", "must start with http"),
        ("http://a b/v1", "must start with http"),
        ("http://a:x/v1", "must have a host and a port"),
        ("http://user:secret@a/v1", "the URL of a must not contain a password"),
    ],
)
def test_a_url_that_nobody_can_call_is_one_line(url, message) -> None:
    for key in ("api_url", "prm_url"):
        with pytest.raises(UserError, match=message) as error:
            load_config(SearchConfig, ["model_name_or_path=m", *TRAIN[1:3], f"{key}={url}"])
        assert "secret" not in str(error.value)


# ---- Command lines (cases/command_line.txt) and numbers (cases/numbers.txt) ----


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("system_prompt", "Solve it. # Rules: be brief"),
        ("system_prompt", "Line one.\nLine two."),
        ("system_prompt", "Answer in this form: a number"),
        ("system_prompt", "[a] {b} 'c' \"d\""),
        ("prm_good_token", " +"),
        ("prm_bad_token", "-"),
        ("prm_step_tag", "\n\n"),
        ("output_dir", "2026-11-25"),
        ("prompt_key", "{Body} {Question}"),
        ("answer_key", "1e3"),
        ("system_prompt", "null and void"),
    ],
)
def test_text_on_the_command_line_stays_text(key, text) -> None:
    assert getattr(load_config(EvalConfig, [*EVALUATE, f"{key}={text}"]), key) == text


@pytest.mark.parametrize("key", ["output_dir", "model_name_or_path", "eval_file", "chat_template"])
def test_a_path_expands_the_home_folder(monkeypatch, key) -> None:
    monkeypatch.setenv("HOME", "/elsewhere")
    assert getattr(load_config(EvalConfig, [*EVALUATE, f"{key}=~/runs"]), key) == "/elsewhere/runs"


@pytest.mark.parametrize(
    ("schema", "argument"),
    [
        (SFTConfig, "max_grad_norm=0"),
        (SFTConfig, "max_grad_norm=-1"),
        (SFTConfig, "eval_ratio=20"),
        (SFTConfig, "num_train_epochs=-1"),
        (SFTConfig, "num_train_epochs=1e9"),
        (SFTConfig, "warmup_ratio=100"),
        (SFTConfig, "learning_rate=10"),
        (SFTConfig, "weight_decay=5"),
        (RLConfig, "kl_coef=-0.01"),
        (RLConfig, "kl_coef=1e9"),
        (RLConfig, "gamma=99"),
        (RLConfig, "temperature=nan"),
        (RLConfig, "temperature=-1"),
        (RLConfig, "gpu_memory_utilization=90"),
        (RLConfig, "epsilon=-1"),
        (RLConfig, "epsilon=1"),
        (RLConfig, "critic_learning_rate=2"),
        (RLConfig, "num_generations=1000000000"),
    ],
)
def test_a_number_that_cannot_be_meant_is_one_line(schema, argument) -> None:
    key, _, value = argument.partition("=")
    with pytest.raises(UserError, match=f"`{key}` must be .*, got {value}") as error:
        load_config(schema, [*TRAIN, argument])
    assert "\n" not in str(error.value)


def test_epochs_that_train_on_no_row_are_one_line(tmp_path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "response": "a"}] * 4)
    keys = [f"train_file={tmp_path / 'rows.jsonl'}", "functional_tokens=false", "eval_ratio=0"]
    cfg = load_config(SFTConfig, [*TRAIN, *keys, "num_train_epochs=0.1"])
    with pytest.raises(UserError, match=r"num_train_epochs=0.1 must cover at least one of 4 rows"):
        read_rows(cfg, FAMILIES["qwen2"]())
