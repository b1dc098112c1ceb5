"""Make a user's likely mistakes through the real scripts.

Each one must print one line that names what is wrong, where, and what to do, with exit code 2.
Under torchrun every rank prints it at once.
"""

from __future__ import annotations

import fcntl
import json
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from torch import distributed as dist
from transformers.utils import logging

import train_rl
from rftt.run.config import RLConfig, load_config
from tests.conftest import ROOT, TORCHRUN, run
from tests.small_world import damage, make_world, settings

pytestmark = pytest.mark.errors


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def fails(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Run a script in this process; the one line it prints before it exits with 2."""
    handler = signal.getsignal(signal.SIGTERM)
    logging.disable_progress_bar()  # as cli.py does, before transformers is imported

    def start(script: str, *more: str) -> str:
        arguments = settings(script, world, tmp_path / "out", *more)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        errors = capfd.readouterr().err
        assert stopped.value.code == 2, errors
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1, errors
        return errors

    yield start
    signal.signal(signal.SIGTERM, handler)
    logging.enable_progress_bar()
    if dist.is_initialized():
        dist.destroy_process_group()


def write(path: Path, *rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"problem": "1+1?", "answer": "2"}
TEXT: dict[str, tuple[str, list[str], list[str]]] = {
    "unknown key": ("train_rl", ["{bad}/rl.yaml"],
        ["unknown key 'learing_rate'", "rl.yaml line 2", "Did you mean 'learning_rate'?"]),
    "wrong choice": ("train_rl", ["advantage_estimator=ppo2"],
        ["`advantage_estimator` must be one of ppo,", "tree, got 'ppo2' (on the command line)"]),
    "wrong type": ("train_rl", ["max_steps=many"], ["must be an integer", "got 'many'"]),
    "incompatible": ("train_rl", ["num_generations=1", "train_batch_size=2"],
        ["num_generations=1", "zero advantages with grpo", "use at least 2"]),
    "no use": ("train_rl", ["advantage_estimator=grpo", "whiten_rewards=true"],
        ["whiten_rewards does nothing with grpo", "use scale_rewards"]),
    "filter of nothing": ("search", ["method=beam", "n_best_to_keep=1"],
        ["n_best_to_keep: only method=sample and method=score", "got method=beam; remove"]),
    "no PRM to use": ("train_rl", ["use_prm=true"],
        ["use_prm: true needs prm_model_name_or_path or prm_url."]),
    "NaN": ("train_sft", ["train_file={bad}/rows.jsonl", "learning_rate=1", "adam_beta2=0",
        "num_train_epochs=60", "eval_ratio=0"],
        ["NaN or infinite at step", "sample id", "Batch dumped to", "lower learning_rate"]),
    "batch not divisible": ("train_rl", ["train_batch_size=3"],
        ["rollout_batch_size 2 x num_generations 2 = 4", "train_batch_size 3", "nearest: 2, 4."]),
    "unsafe sampling": ("train_rl", ["top_p=0.9"],
        ["top_p=0.9", "biases the policy ratio", "set top_p: 1.0"]),
    "missing file": ("search", ["train_file={bad}/none.jsonl"], ["none.jsonl", "does not exist"]),
    "empty file": ("train_sft", ["train_file={bad}/empty.jsonl"], ["empty.jsonl", "has 0 rows"]),
    "broken line": ("evaluate", ["eval_file={bad}/broken.jsonl"], ["broken.jsonl:2", "not JSON"]),
    "missing field": ("search", ["train_file={bad}/field.jsonl"],
        ["field.jsonl:2 has no 'problem'", "(found: exercise, idx)", "Set prompt_key: exercise."]),
    "missing field of a row": ("train_sft", ["train_file={bad}/field.jsonl"],
        ["field.jsonl:1 has neither 'steps' nor 'response'", "search.py writes such rows"]),
    "unparsable gold": ("train_rl", ["train_file={bad}/gold.jsonl"],
        ["2 of 3 rows have no gold answer", "gold.jsonl:2", "Set answer_key: worked"]),
    "no model": ("search", ["model_name_or_path={bad}/nowhere"],
        ["model_name_or_path", "nowhere", "a folder with a tokenizer or a reachable hub name"]),
    "no weights": ("evaluate", ["model_name_or_path={bad}/adapter"], ["no model at", "adapter"]),
    "nothing to train": ("train_sft", ["train_file={bad}/rows.jsonl",
        "model_name_or_path={bad}/adapter"], ["no model at", "adapter"]),
    "no chat template": ("evaluate", ["model_name_or_path={bad}/mute"],
        ["mute", "has no chat template", "use an instruct model"]),
    "tokens not single ids": ("train_rl", ["model_name_or_path={world}/base"],
        ["functional token '<clarify>' encodes to", "base", "train_sft.py first"]),
    "checkpoint and vocabulary": ("train_rl", ["model_name_or_path={bad}/short"],
        ["must have a row for each", "short", "saved without resized embeddings"]),
    "no warm-up": ("train_rl", ["allow_cold_start=false"],
        ["total probability to functional tokens", "speaks", "set allow_cold_start: true"]),
    "doubled BOS": ("evaluate", ["model_name_or_path={bad}/doubled"],
        ["two BOS tokens", "doubled", "remove one"]),
    "not enough memory": ("evaluate", ["max_num_seqs=1000000000000"],
        ["not enough memory", "max_num_seqs", "tools/doctor.py"]),
    "prompt too long in RL": ("train_rl", ["max_model_len=4"],
        ["do not fit max_model_len=4", "problems train-1", "raise it"]),
    "no such function": ("train_rl", ["reward_functions=[nobody:knows]"],
        ["reward_functions", "nobody"]),
    "prompt too long": ("evaluate", ["max_model_len=4"],
        ["do not fit max_model_len=4", "problems train-1", "raise it"]),
    "resume mismatch": ("train_rl", ["output_dir={bad}/begun", "kl_coef=0.5"],
        ["was begun with kl_coef=0.01, now it is 0.5", "begun", "use a new output_dir"]),
    "output exists": ("train_rl", ["output_dir={bad}/begun", "resume_from_checkpoint=never"],
        ["has checkpoints", "begun", "overwrite_output_dir: true"]),
    "output in use": ("evaluate", ["output_dir={bad}/taken"],
        ["in use by another process", "taken", "another output_dir"]),
}  # fmt: skip
"""Situation -> script, arguments that provoke it, what the line must hold: what, where, the cure"""


@pytest.fixture(scope="module")
def bad(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the table's arguments point at: files and folders with one fault each."""
    path = tmp_path_factory.mktemp("bad")
    (path / "rl.yaml").write_text("max_steps: 3\nlearing_rate: 1e-6\n")
    write(path / "empty.jsonl")
    steps = [{"act": "output", "text": "\\boxed{2}"}]
    rows = [{"question": "1+1?", "steps": steps}] * 8
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(path / "broken.jsonl", GOOD)
    with open(path / "broken.jsonl", "a", encoding="utf-8") as file:
        file.write('{"problem": \n')
    write(path / "field.jsonl", GOOD, {"exercise": "1+1?", "idx": "7"})
    worked = {"problem": "1+1?", "answer": "", "worked": "1 and 1 is 2\n#### 2"}
    write(path / "gold.jsonl", GOOD, worked, worked)
    for fault in ("short", "doubled", "mute"):
        damage(world / "speaks", path / fault, fault)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / "adapter").mkdir(exist_ok=True)
        (path / "adapter" / name).write_bytes((world / "speaks" / name).read_bytes())
    begun = path / "begun"
    (begun / "checkpoints/step_000001").mkdir(parents=True)
    (begun / "checkpoints/step_000001/COMPLETE").touch()
    cfg = load_config(RLConfig, settings("train_rl", world, begun))
    (begun / "config.yaml").write_text(json.dumps(asdict(cfg)))
    (path / "taken").mkdir()
    with open(path / "taken/.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


@pytest.mark.parametrize("situation", TEXT)
def test_a_mistake_is_one_line_that_names_the_cure(
    situation: str, world: Path, bad: Path, fails: Callable[..., str]
) -> None:
    script, arguments, pieces = TEXT[situation]
    line = fails(script, *(argument.format(world=world, bad=bad) for argument in arguments))
    assert [piece for piece in pieces if piece not in line] == [], line


def test_a_training_does_not_go_on_with_other_rows(
    world: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    file = tmp_path / "rows.jsonl"
    more = [f"train_file={file}", "eval_ratio=0", "num_train_epochs=1"]
    write(file, *[{"question": "1+1?", "response": "\\boxed{2}"}] * 4)
    command = [sys.executable, "train_sft.py", *settings("train_sft", world, tmp_path / "out")]
    assert "2 steps from 0" in run(*command, *more).stdout
    assert "2 steps from 2" in run(*command, *more).stdout
    write(file, *[{"question": "1+2?", "response": "\\boxed{3}"}] * 4)
    assert "out was begun with other rows; use a new output_dir" in fails("train_sft", *more)


def test_a_run_in_use_is_not_overwritten(
    bad: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    complete = tmp_path / "out/checkpoints/step_000001/COMPLETE"
    complete.parent.mkdir(parents=True)
    complete.touch()
    with open(tmp_path / "out/.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        more = (f"train_file={bad}/rows.jsonl", "overwrite_output_dir=true")
        assert "in use by another process" in fails("train_sft", *more)
    assert complete.exists()


def test_vllm_that_is_missing_is_named(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "rftt.engines.vllm", raising=False)
    line = fails("search", "engine=vllm")
    assert "engine=vllm needs vllm, which is not installed" in line
    assert "set engine=hf" in line


def test_an_engine_out_of_step_is_named(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_rl.full_weights
    lost = "model.norm.weight"
    monkeypatch.setattr(
        train_rl, "full_weights", lambda model: (w for w in whole(model) if w[0] != lost)
    )
    assert (
        f"load_weights: the learner did not send {lost}, so the engine keeps old weights"
        in fails("train_rl")
    )


def test_a_step_from_which_nothing_can_be_learnt_is_told(world: Path, tmp_path: Path) -> None:
    """A random model never answers: every group has equal rewards. The run goes on."""
    out = tmp_path / "out"
    run("python", ROOT / "train_rl.py", *settings("train_rl", world, out, "max_steps=1"))
    told = (out / "log.txt").read_text()
    assert "step 0: all 2 groups have equal rewards; nothing to learn (solve rate 0.00)" in told
    assert "answers that do not parse: read samples/." in told


@pytest.mark.dist
@pytest.mark.parametrize("situation", ["missing file", "no warm-up", "resume mismatch"])
def test_every_rank_exits_at_once_with_the_same_line(
    situation: str, world: Path, bad: Path, tmp_path: Path
) -> None:
    _, arguments, pieces = TEXT[situation]
    more = [argument.format(world=world, bad=bad) for argument in arguments]
    done = run(
        *(*TORCHRUN, "--nproc_per_node=2", ROOT / "train_rl.py"),
        *settings("train_rl", world, tmp_path / "out", *more),
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2, done.stderr
    assert len(set(lines)) == 1
    assert all(piece in lines[0] for piece in pieces)
    assert "exitcode  : 2" in done.stderr
    assert not [word for word in ("timed out", "Connection", "RuntimeError") if word in done.stderr]
