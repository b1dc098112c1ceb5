"""Test bench/credit.py: which stages a cell needs, resuming, and the figures of finished cells."""

import json
import shlex
from pathlib import Path

import pytest

from bench import credit
from rftt.run.config import EvalConfig, RLConfig, SearchConfig, SFTConfig, load_config
from rftt.run.files import write_json, write_jsonl
from rftt.run.stats import paired_bootstrap
from tools.prm_train import PRMTrainConfig
from tools.tiny_world import TinyConfig

SCRIPTS = {
    "search.py": SearchConfig,
    "train_sft.py": SFTConfig,
    "train_rl.py": RLConfig,
    "evaluate.py": EvalConfig,
    "tools/prm_train.py": PRMTrainConfig,
    "tools/tiny_world.py": TinyConfig,
}


def planned(out: Path, *recipes: str, name: str = "inverse") -> dict[str, credit.Stage]:
    stages = credit.plan(out, name, credit.SETTINGS[name], 1, recipes)
    return {folder.name: stage for folder, stage in stages.items()}


@pytest.mark.parametrize("recipe", credit.RECIPES)
def test_every_command_is_a_valid_config(recipe, tmp_path):
    stages = planned(tmp_path, "plain", recipe)
    for stage in stages.values():
        _, script, *arguments = stage.command
        load_config(SCRIPTS[script], arguments)
    rl = load_config(RLConfig, list(stages[recipe].command[2:]))
    assert rl.max_generated_tokens == credit.SETTINGS["inverse"].tokens
    assert rl.lr_scheduler_type == "constant"
    assert rl.use_prm == credit.RECIPES[recipe].prm
    evaluation = load_config(EvalConfig, list(stages[f"eval-{recipe}"].command[2:]))
    assert evaluation.forbidden_acts == rl.forbidden_acts
    assert evaluation.model_name_or_path == f"{rl.output_dir}/hf"


def test_cells_share_what_comes_before_rl(tmp_path):
    stages = planned(tmp_path, "plain", "prm-gain", "prm-paper", "cot")
    assert list(stages) == [
        *("world", "search", "eval-base", "sft", "eval-sft", "plain", "eval-plain"),
        *("prm", "prm-gain", "eval-prm-gain", "prm-paper", "eval-prm-paper"),
        *("sft-cot", "eval-sft-cot", "cot", "eval-cot"),
    ]
    for name, stage in stages.items():
        earlier = list(stages)[: list(stages).index(name)]
        assert {need.name for need in stage.needs} <= set(earlier)
    assert {need.name for need in stages["prm-gain"].needs} == {"sft", "prm"}


def process(code: str) -> tuple[str, ...]:
    return ("python", "-c", code)


def test_finished_stages_are_not_repeated_and_failures_stop_only_what_needs_them(tmp_path, capsys):
    counted = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    good = credit.Stage(tmp_path / "good", process(counted))
    bad = credit.Stage(tmp_path / "bad", process("raise SystemExit('broken')"))
    after_good = credit.Stage(tmp_path / "next", process(counted), (good.folder,))
    after_bad = credit.Stage(tmp_path / "never", process(counted), (good.folder, bad.folder))
    stages = {stage.folder: stage for stage in (bad, after_bad, good, after_good)}
    for _ in range(2):
        assert credit.run_all(stages, workers=2) == [bad.folder]
        assert (tmp_path / "count").read_text() == "xx"
    assert "1 of 2 stages were left out" in capsys.readouterr().out
    assert "broken" in (tmp_path / "bad.log").read_text()
    assert json.loads(good.done.read_text())["command"] == shlex.join(good.command)
    changed = credit.Stage(good.folder, process("pass"))
    with pytest.raises(ValueError, match=r"remove it and good.done.json, or use another --out"):
        credit.run_all({changed.folder: changed}, workers=1)


def finish(here: Path, recipe: str, greedy: list[bool], sampled: list[list[bool]]) -> None:
    """Write what a finished cell leaves behind, its problems in another order."""
    problems = list(zip(greedy, sampled, strict=True))
    rows = [
        {"id": f"{i}", "greedy": {"correct": one}, "samples": [{"correct": s} for s in many]}
        for i, (one, many) in enumerate(problems)
    ]
    write_jsonl(here / f"eval-{recipe}" / "eval" / "test.jsonl", rows[::-1])
    gain = {"search - maj": {"mean": 0.25, "low": 0.0, "high": 0.5}}
    write_json(here / f"eval-{recipe}" / "eval" / "summary.json", {"equal_tokens": {"4": gain}})
    shares = {"malformed_share": 0.5, "acts/verify": 0.1, "acts/refine": 0.1}
    row = {"tokens_generated": 100.0, "response_length": 7.0, **shares}
    write_jsonl(here / recipe / "metrics.jsonl", [row, row])
    for stage in (recipe, f"eval-{recipe}"):
        write_json(here / f"{stage}.done.json", {"command": f"make {stage}", "seconds": 1})


FORMAT = {
    "recipe": str, "setting": str, "explorer": str, "advantage": str, "reward_scheme": str,
    "prm": bool, "forbidden": list, "seeds": list, "tokens": int, "command": str, "greedy": float,
    "sampled": float, "change_vs_plain": dict,
}  # fmt: skip


def test_the_figures_of_finished_cells(tmp_path, capsys):
    right = {"plain": [True, False, False, False], "no-verify": [True, True, False, False]}
    for seed in (0, 1):
        for recipe, greedy in right.items():
            turned = greedy[seed:] + greedy[:seed]
            sampled = [[one, False] for one in turned]
            finish(tmp_path / "inverse" / f"seed{seed}", recipe, turned, sampled)
    finish(tmp_path / "inverse" / "seed2", "no-verify", [True] * 4, [[True]] * 4)  # no plain run
    file = tmp_path / "credit.json"
    assert credit.main(["--table", f"--out={tmp_path}", f"--json={file}"]) == 0
    plain, forbidden = json.loads(file.read_text())["cells"]
    for cell in (plain, forbidden):
        assert {key: type(cell[key]) for key in FORMAT} == FORMAT
        assert {len(cell["change_vs_plain"][metric]) for metric in credit.METRICS} == {3}
    assert plain["search_minus_majority"] == {"4": 25.0}
    assert (plain["recipe"], plain["greedy"], plain["sampled"]) == ("plain", 25.0, 12.5)
    assert plain["change_vs_plain"]["greedy"] == [0.0, 0.0, 0.0]
    assert (forbidden["forbidden"], forbidden["seeds"]) == (["verify"], [0, 1])
    assert (forbidden["greedy"], forbidden["tokens"]) == (50.0, 200)
    assert (forbidden["command"], forbidden["explorer"]) == ("make no-verify", "plain")
    each = [x for seed in (0, 1) for x in right["no-verify"][seed:] + right["no-verify"][:seed]]
    base = [x for seed in (0, 1) for x in right["plain"][seed:] + right["plain"][:seed]]
    expected = credit.percent(paired_bootstrap(each, base))
    assert forbidden["change_vs_plain"]["greedy"] == expected
    assert forbidden["change_vs_plain_seeds"]["greedy"] == [25.0, 25.0, 25.0]
    assert "| no-verify | **50.0** (50.0 / 50.0) | +25.0 [" in capsys.readouterr().out


@pytest.mark.oracle
def test_the_interval_over_seeds_is_students():
    """0.1, 0.2, 0.3: mean 0.2, standard error 0.1/√3, t(2) = 4.303."""
    half = 4.303 * 0.1 / 3**0.5
    assert credit.over_seeds([0.1, 0.2, 0.3]) == credit.percent([0.2, 0.2 - half, 0.2 + half])
    assert credit.over_seeds([0.1]) is None


def test_explorers_have_the_names_of_the_table():
    kinds = {}
    for name, recipe in credit.RECIPES.items():
        keys = dict(key.split("=", 1) for key in recipe.keys.split())
        kinds.setdefault(credit.explorer_of(keys), []).append(name)
    assert set(kinds) == {"plain", "mcts", "tree", "fork"}
    assert kinds["tree"] == ["tree", "tree-treepo"]
