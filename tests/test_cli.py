"""Test strict reading of configs, and what a mistake on the command line prints."""

import os
import subprocess
import sys

import pytest

from rftt.run.cli import check_same_run, describe, load_config
from rftt.run.config import EvalConfig, RLConfig, SFTConfig
from rftt.types import UserError
from tests.conftest import ROOT, count_calls

NEEDED = ["output_dir=o", "model_name_or_path=m", "train_file=t", "learning_rate=1e-6"]


def test_overrides_come_after_the_file(tmp_path):
    file = tmp_path / "rl.yaml"
    file.write_text("learning_rate: 1e-5\ngamma: 1\nreport_to: [wandb]\n")
    cfg = load_config(RLConfig, [str(file), *NEEDED])
    assert (cfg.learning_rate, cfg.gamma, cfg.report_to) == (1e-6, 1.0, ["wandb"])
    assert isinstance(cfg.gamma, float)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("learning_rat=1", "unknown key 'learning_rat' (on the command line). Did you mean 'lear"),
        ("engine=sglang", "engine='sglang' is not one of hf, vllm"),
        ("seed=x", "seed='x' is not a int"),
        ("seed=true", "seed=True is not a int"),
        ("mask_truncated_completions=1", "mask_truncated_completions=1 is not a bool"),
        ("train_batch_size=48", "16 x num_generations 16 = 256 is not divisible by train_batch"),
        ("top_p=0.9", "top_p=0.9 biases"),
        ("simulations=0", "unknown key 'simulations'"),
        ("num_generations=0", "num_generations=0 is too small (on the command line)"),
        ("max_eval_problems=0", "max_eval_problems=0 is too small"),
        ("kl_target=0.1 kl_coef=0", "kl_target needs a kl_coef above 0"),
        ("nowhere.yaml", "config file nowhere.yaml does not exist"),
    ],
)
def test_mistakes_are_named(argument, message):
    with pytest.raises(UserError) as error:
        load_config(RLConfig, [*NEEDED, *argument.split()])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sentence_on_the_command_line_is_a_string():
    cfg = load_config(RLConfig, [*NEEDED, "system_prompt=Answer: use: x"])
    assert cfg.system_prompt == "Answer: use: x"


def test_nearest_batch_sizes_are_offered():
    with pytest.raises(UserError, match="nearest: 32, 64"):
        load_config(RLConfig, [*NEEDED, "train_batch_size=48"])


def test_unknown_key_in_a_file_is_named_with_its_line(tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text("# comment\nlearning_rate: 1\ntrain_fil: x\n")
    with pytest.raises(UserError, match=r"'train_fil' \(.*sft.yaml line 3\). Did you .*train_file"):
        load_config(SFTConfig, [str(file)])


def test_a_key_set_twice_in_a_file_is_named_with_both_lines(tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text("learning_rate: 1\nseed: 2\nlearning_rate: 3\n")
    with pytest.raises(UserError, match=r"learning_rate is set twice \(.* line 1, .* line 3\)"):
        load_config(SFTConfig, [str(file)])


def test_missing_key_is_named():
    with pytest.raises(UserError, match="eval_file is not set"):
        load_config(EvalConfig, ["output_dir=o", "model_name_or_path=m"])


def test_help_names_every_field_with_little_work():
    n_calls, text = count_calls(lambda: describe(RLConfig))
    assert n_calls < 200_000  # 38,000 today
    assert all(name in text for name in RLConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("learning_rat=1", "Did you mean 'learning_rate'?"),
        ("train_file=nowhere.jsonl", "nowhere.jsonl does not exist."),
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


TOOLS = [
    f"tools/{name}"
    for name in ("audit_grader", "prm_serve", "prm_train", "report", "self_improve", "tiny_world")
]


@pytest.mark.parametrize("name", ["bench/search", "bench/grader", "bench/train_step", *TOOLS])
def test_a_tool_starts_as_its_header_says(name):
    """From another folder and without PYTHONPATH: the script finds the package by itself."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
