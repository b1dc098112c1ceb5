"""Test that every shipped YAML loads, and that every field is documented and read."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from rftt.run.config import (
    EvalConfig,
    RLConfig,
    SearchConfig,
    SFTConfig,
    describe,
    field_docs,
    load_config,
)
from tools.self_improve import LoopConfig

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "search": (SearchConfig, "search.py"),
    "sft": (SFTConfig, "train_sft.py"),
    "rl": (RLConfig, "train_rl.py"),
    "evaluate": (EvalConfig, "evaluate.py"),
    "self_improve": (LoopConfig, "tools/self_improve.py"),
}
"""How a config file's name begins -> its class and script."""
YAMLS = sorted(ROOT.glob("configs/**/*.yaml"))
REFUSED = {"top_p"}
"""Fields that exist to be refused with a reason (a validator of RLConfig): nothing reads them."""
by_script = pytest.mark.parametrize("kind", SCRIPTS)


def kind_of(path: Path) -> str:
    return next(kind for kind in SCRIPTS if path.name.startswith(kind))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_shipped_config_loads_and_says_nothing_twice(path: Path) -> None:
    config = load_config(SCRIPTS[kind_of(path)][0], [str(path)])
    assert config.output_dir
    keys = [key.value for key, _ in yaml.compose(path.read_text(encoding="utf-8")).value]
    assert len(keys) == len(set(keys))


ONE_CARD = sorted(path.name for path in ROOT.glob("configs/*gb"))


@pytest.mark.parametrize("folder", ["tiny", "qwen2.5-7b", "llama-3.1-8b", *ONE_CARD])
def test_each_model_has_a_config_for_every_script(folder: str) -> None:
    assert {kind_of(path) for path in YAMLS if path.parent.name == folder} | {
        "self_improve"
    } == set(SCRIPTS)


@by_script
def test_every_field_has_a_docstring_and_is_in_the_help(kind: str) -> None:
    schema = SCRIPTS[kind][0]
    docs = field_docs(schema)
    assert sorted(docs) == sorted(field.name for field in fields(schema))
    assert [name for name, doc in docs.items() if not doc.strip()] == []
    assert [name for name in docs if f"\n{name}: " not in describe(schema)] == []


def reads(text: str) -> set[str]:
    """Return the names x of every `cfg.x`, also behind `self`, and of `config.x` in `text`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("cfg", "config", "self.cfg", "self._cfg")
    }


@by_script
def test_every_field_is_read_by_its_script_or_the_package(kind: str) -> None:
    schema, script = SCRIPTS[kind]
    modules = [path for path in ROOT.glob("rftt/**/*.py") if path.name != "config.py"]
    read = set().union(*(reads(path.read_text()) for path in [ROOT / script, *modules]))
    assert sorted({field.name for field in fields(schema)} - read - REFUSED) == []
    assert reads("cfg.seed + other.dtype") == {"seed"}


@by_script
def test_a_script_explains_itself_and_fails_in_one_line(kind: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, SCRIPTS[kind][1], *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    shown = run("--help")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == describe(SCRIPTS[kind][0])
    wrong = run("output_dr=x")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "unknown key 'output_dr'" in wrong.stderr
    assert wrong.stderr.endswith("Did you mean 'output_dir'?\n")
    assert wrong.stderr.count("\n") == 1


FAKE_PYTHON = f"""#!{sys.executable}
import json, os, sys
if sys.argv[1] == "-c":
    os.execv(sys.executable, sys.argv)
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""
"""Executes `python -c …`, and only records all other calls."""


@pytest.mark.parametrize("arguments", [[], ["models/other"]], ids=["model of the file", "argument"])
def test_the_recipe_of_a_copied_folder_stays_in_its_own_outputs(
    tmp_path: Path, arguments: list[str]
) -> None:
    folder = shutil.copytree(ROOT / "configs/qwen2.5-7b", tmp_path / "mine")
    fake, calls = tmp_path / "bin/python", tmp_path / "calls"
    fake.parent.mkdir()
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", ROOT / "runs/recipe.sh", folder, "train.jsonl", "test.jsonl", *arguments]
    subprocess.run(command, env=os.environ | {"PATH": path, "CALLS": str(calls)}, check=True)
    configs = []
    classes = {script: schema for schema, script in SCRIPTS.values()}
    for call in map(json.loads, calls.read_text().splitlines()):
        if "tools/report.py" not in call:  # every stage uses all GPUs, on a port of its own
            assert call[:3] == ["-m", "torch.distributed.run", "--standalone"]
        script = next(argument for argument in call if argument.endswith(".py"))
        if script in classes:
            given = call[call.index(script) + 1 :]
            configs.append(load_config(classes[script], given))
    search, sft, rl, *evaluations = configs
    base = [*arguments, "Qwen/Qwen2.5-7B-Instruct"][0]
    assert [search.train_file, rl.train_file, rl.eval_file] == ["train.jsonl"] * 2 + ["test.jsonl"]
    assert sft.train_file == "outputs/mine/search/data/sft.jsonl"
    outs = ["search", "sft", "rl", "eval-base", "eval-sft", "eval-rl"]
    assert [config.output_dir for config in configs] == [f"outputs/mine/{out}" for out in outs]
    models = [base, base, "outputs/mine/sft/hf", base, "outputs/mine/sft/hf", "outputs/mine/rl/hf"]
    assert [config.model_name_or_path for config in configs] == models
    assert {config.eval_file for config in evaluations} == {"test.jsonl"}


@pytest.mark.oracle
def test_the_published_recipe_is_the_papers() -> None:
    """arXiv 2502.13389, where the paper gives a number."""
    folder = ROOT / "configs/qwen2.5-7b"
    search = load_config(SearchConfig, [str(folder / "search.yaml")])
    assert (search.simulations, search.search_depth, search.exploration_weight) == (16, 15, 2.0)
    sft = load_config(SFTConfig, [str(folder / "sft.yaml")])
    assert (sft.learning_rate, sft.lr_scheduler_type, sft.weight_decay) == (7e-6, "constant", 0.1)
    assert (sft.train_batch_size, sft.num_train_epochs, sft.max_length) == (128, 10, 8192)
    assert (sft.adam_beta1, sft.adam_beta2, sft.dtype) == (0.9, 0.95, "bfloat16")
    rl = load_config(RLConfig, [str(folder / "rl.yaml")])
    assert (rl.rollout_batch_size, rl.num_generations, rl.train_batch_size) == (16, 16, 16)
    assert (rl.learning_rate, rl.lr_scheduler_type, rl.min_lr_ratio) == (5e-7, "cosine", 0.1)
    assert (rl.warmup_ratio, rl.max_grad_norm, rl.max_steps) == (0.03, 1.0, 250)
    assert (rl.adam_beta1, rl.adam_beta2, rl.temperature) == (0.9, 0.95, 0.95)
    assert (rl.epsilon, rl.gamma, rl.lam, rl.kl_coef) == (0.2, 1.0, 0.95, 0.01)
    assert (rl.num_ppo_epochs, rl.search_depth, rl.exploration_weight) == (1, 18, 2.0)
    assert (rl.correct_reward, rl.wrong_reward, rl.no_answer_reward) == (1.0, 0.1, 0.0)
    assert (rl.advantage_estimator, rl.sampling_method) == ("reinforce++", "mcts")
