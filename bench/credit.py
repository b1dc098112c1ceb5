"""Compare explorers, advantages and process rewards at equal sampled tokens on the tiny world.

    python bench/credit.py [--seeds 0,1,2] [--only 'inverse/plain,inverse/fork*'] [--out FOLDER]
    python bench/credit.py --quick        a small table in less than five minutes
    python bench/credit.py --table        the table of what is finished; nothing is run

A cell is a recipe in a setting. All recipes of a setting and seed start from one warm-up model:
world -> base -> phase 1 -> warm-up -> RL -> evaluation on held-out problems. Each stage is one
process of the project's own scripts, and two run at a time. A finished stage has a file
`NAME.done.json` beside its folder and is never repeated. A stage that was killed continues.

`max_generated_tokens` ends every RL run. The learning rate is constant after three rounds, so it
does not depend on the number of rounds. A run ends with a whole round and may sample more than its
budget by that round's tokens.

The output is a table and docs/results/credit.json (--quick: OUT/credit.json). `change_vs_plain` has
paired 95 % bootstrap intervals over the problems of all seeds together. They describe these models.
`change_vs_plain_seeds` has 95 % t-intervals over the seeds' mean changes, which predict another
seed. With three seeds they are wide.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.tiny_results import last_rounds, scores, steps
from rftt.run.files import write_json
from rftt.run.stats import paired_bootstrap

ROOT = Path(__file__).parents[1]

# ---- Settings and recipes ----


@dataclass(frozen=True)
class Setting:
    """A world, and what each stage needs to know about it, as `key=value`."""

    tokens: int
    """Budget of sampled tokens of an RL run."""
    world: str | None = None
    """Family of tools/tiny_world.py. None copies data/tiny."""
    stages: dict[str, list[str]] = field(default_factory=dict)
    """Stage -> its own keys."""


SETTINGS = {
    "long": Setting(tokens=300_000, world="long"),
    "inverse": Setting(tokens=500_000, world="inverse"),
}
QUICK = Setting(
    tokens=60_000,
    stages={
        "search": ["max_problems=100"],
        "sft": ["num_train_epochs=6"],
        "rl": ["rollout_batch_size=16", "train_batch_size=128"],
        "eval": ["max_problems=200", "num_samples=4"],
    },
)


@dataclass(frozen=True)
class Recipe:
    """The keys that a cell adds to configs/tiny/rl.yaml."""

    keys: str
    prm: bool = False
    warm_up: str = "sft"
    forbidden: tuple[str, ...] = ()
    """Acts that are forbidden in RL and in the evaluation."""
    searched: bool = False
    """Whether the evaluation also searches, to compare with a majority at equal tokens."""


PLAIN, MCTS = "sampling_method=normal", "sampling_method=mcts"
FORK = "sampling_method=fork fork_roots=8 fork_branches=4"
TREE = "advantage_estimator=tree tree_advantage="
RPP = "advantage_estimator=reinforce++"
RECIPES = {
    # explorers
    "plain": Recipe(PLAIN, searched=True),
    "mcts": Recipe(MCTS, searched=True),
    "mcts-keep": Recipe(f"{MCTS} forced_actions=keep"),
    "mcts-twice": Recipe(f"{MCTS} children_per_act=2"),
    "tree": Recipe(f"{MCTS} tree_acts=drawn"),
    "mcts-puct": Recipe(f"{MCTS} selection=puct"),
    "fork": Recipe(f"{FORK} fork_rule=failed", searched=True),
    "fork-uncertain": Recipe(f"{FORK} fork_rule=uncertain"),
    "fork-random": Recipe(f"{FORK} fork_rule=random"),
    # advantages
    "fork-treerl": Recipe(f"{FORK} fork_rule=failed {TREE}treerl"),
    "fork-spo": Recipe(f"{FORK} fork_rule=failed {TREE}spo"),
    "fork-treepo": Recipe(f"{FORK} fork_rule=failed {TREE}treepo"),
    "mcts-treepo": Recipe(f"{MCTS} {TREE}treepo"),
    "tree-treepo": Recipe(f"{MCTS} tree_acts=drawn {TREE}treepo"),
    "plain-rpp": Recipe(f"{PLAIN} {RPP}"),
    # process rewards
    "prm-paper": Recipe(f"{PLAIN} reward_scheme=paper", prm=True),
    "prm-blend": Recipe(f"{PLAIN} reward_scheme=blend", prm=True),
    "prm-min": Recipe(f"{PLAIN} reward_scheme=min", prm=True),
    "prm-prof": Recipe(f"{PLAIN} reward_scheme=prof", prm=True),
    "prm-gain": Recipe(f"{PLAIN} {RPP} reward_scheme=gain", prm=True),
    # acts and form
    "no-verify": Recipe(PLAIN, forbidden=("verify",)),
    "no-refine": Recipe(PLAIN, forbidden=("refine",)),
    "cot": Recipe(PLAIN, warm_up="sft-cot"),
    "form": Recipe(f"{PLAIN} malformed_penalty=0.2"),
}
QUICK_RECIPES = ("plain", "mcts", "fork", "fork-treepo")

# ---- Stages ----


@dataclass(frozen=True)
class Stage:
    """One Python process. `folder` is its output, `needs` the folders of earlier stages."""

    folder: Path
    command: tuple[str, ...]
    needs: tuple[Path, ...] = ()

    @property
    def done(self) -> Path:
        """The file that a finished stage has."""
        return beside(self.folder, ".done.json")

    def is_done(self) -> bool:
        """Return whether this stage is finished. Raise ValueError if another command did it."""
        if not self.done.exists():
            return False
        before = json.loads(self.done.read_text())["command"]
        if before != shlex.join(self.command):
            raise ValueError(
                f"{self.folder} was made by `{before}`, now it is `{shlex.join(self.command)}`; "
                f"remove it and {self.done.name}, or use another --out."
            )
        return True

    def run(self) -> float:
        """Run the process with one compute thread. Return its seconds."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        with beside(self.folder, ".log").open("a") as log:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            command = (sys.executable, *self.command[1:])
            subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, check=True)
        seconds = time.monotonic() - begin
        write_json(self.done, {"command": shlex.join(self.command), "seconds": round(seconds)})
        return seconds


def beside(folder: Path, suffix: str) -> Path:
    """Return the path of a file beside `folder` that is named after it."""
    return folder.with_name(folder.name + suffix)


def plan(
    out: Path, name: str, setting: Setting, seed: int, recipes: Sequence[str]
) -> dict[Path, Stage]:
    """Return the stages of these recipes for one setting and seed, by folder, in order."""
    here = out / name / f"seed{seed}"
    stages: dict[Path, Stage] = {}

    def add(what: str, command: list[str], needs: list[Path]) -> Path:
        folder = here / what
        stages[folder] = Stage(folder, ("python", *command), tuple(needs))
        return folder

    def script(what: str, kind: str, needs: list[Path], model: Path, *keys: str) -> Path:
        scripts = {"search": "search.py", "sft": "train_sft.py", "rl": "train_rl.py"}
        config = {"eval": "evaluate"}.get(kind, kind)
        command = [scripts.get(kind, "evaluate.py"), f"configs/tiny/{config}.yaml", f"seed={seed}"]
        command += [f"model_name_or_path={model}", f"output_dir={here / what}", *keys]
        return add(what, command + setting.stages.get(kind, []), needs)

    world, files = [], Path("data/tiny")
    if setting.world:
        own = [f"family={setting.world}", *setting.stages.get("world", [])]
        files = here / "world"
        world = [
            add("world", ["tools/tiny_world.py", f"output_dir={files}", f"seed={seed}", *own], [])
        ]
    base, train = files / "base", f"train_file={files / 'train.jsonl'}"
    search = script("search", "search", world, base, train)
    rows = f"train_file={here / 'search/data/sft.jsonl'}"

    def evaluate(what: str, model: Path, needs: list[Path], *keys: str) -> None:
        test = f"eval_file={files / 'test.jsonl'}"
        script(f"eval-{what}", "eval", needs, model, test, *keys)

    evaluate("base", base, world, "simulations=[]")
    for recipe_name in recipes:
        recipe = RECIPES[recipe_name]
        warm_up = recipe.warm_up
        if here / warm_up not in stages:
            own = [] if warm_up == "sft" else ["functional_tokens=false"]
            script(warm_up, "sft", [search], base, rows, *own)
            evaluate(warm_up, here / warm_up / "hf", [here / warm_up], "simulations=[]")
        needs, keys = [here / warm_up], recipe.keys.split()
        if recipe.prm:
            prm = ["tools/prm_train.py", f"search_dir={search}", f"model_name_or_path={base}"]
            needs += [add("prm", [*prm, f"output_dir={here / 'prm'}", f"seed={seed}"], [search])]
            keys += ["use_prm=true", f"prm_model_name_or_path={here / 'prm'}"]
        forbidden = [f"forbidden_acts=[{','.join(recipe.forbidden)}]"] if recipe.forbidden else []
        budget = [f"max_generated_tokens={setting.tokens}", "max_steps=400", "warmup_ratio=0.0075"]
        budget += ["eval_file=null", "save_steps=0"]  # the evaluation is a stage of its own
        model = here / warm_up / "hf"
        cell = script(recipe_name, "rl", needs, model, train, *budget, *keys, *forbidden)
        search_too = [] if recipe.searched else ["simulations=[]"]
        evaluate(recipe_name, cell / "hf", [cell], *search_too, *forbidden)
    return stages


def run_all(stages: dict[Path, Stage], workers: int) -> list[Path]:
    """Run what is not finished, `workers` processes at a time. Return the folders that failed.

    A stage whose need failed is left out, and all others are run.
    """
    done = {folder for folder, stage in stages.items() if stage.is_done()}
    waiting = {folder: stage for folder, stage in stages.items() if folder not in done}
    running: dict[Future[float], Path] = {}
    failed: list[Path] = []
    total = len(waiting)
    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            ready = [f for f, stage in waiting.items() if done.issuperset(stage.needs)]
            for folder in ready[: workers - len(running)]:
                running[pool.submit(waiting.pop(folder).run)] = folder
            if not running:
                break  # all that waits needs something that failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                folder = running.pop(future)
                if error := future.exception():
                    failed.append(folder)
                    print(f"FAILED {folder}: see {beside(folder, '.log')} ({error})", flush=True)
                else:
                    done.add(folder)
                    print(f"{len(done)}: {folder} {future.result():.0f} s", flush=True)
    if waiting:
        print(f"{len(waiting)} of {total} stages were left out, because a need failed", flush=True)
    return failed


# ---- Figures ----

METRICS = ("greedy", "sampled")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Seeds -> the 97.5 % quantile of Student's t with one degree of freedom less."""


def finished_scores(folder: Path) -> dict[str, list[float]] | None:
    """Return the scores of a finished evaluation, or None."""
    return scores(folder) if beside(folder, ".done.json").exists() else None


def over_seeds(changes: list[float]) -> list[float] | None:
    """Return mean, low and high of a 95 % t-interval over seeds, or None for one seed."""
    if len(changes) < 2:
        return None
    half = T_95[len(changes)] * stdev(changes) / len(changes) ** 0.5
    return percent([fmean(changes), fmean(changes) - half, fmean(changes) + half])


def percent(values: Sequence[float]) -> list[float]:
    return [round(100 * value, 2) for value in values]


def explorer_of(keys: dict[str, str]) -> str:
    """Return plain, mcts (acts are forced), tree (acts are the policy's own) or fork."""
    if keys["sampling_method"] != "mcts":
        return {"normal": "plain"}.get(keys["sampling_method"], keys["sampling_method"])
    return "tree" if keys.get("tree_acts") == "drawn" else "mcts"


def cell_of(out: Path, name: str, recipe_name: str, seeds: Sequence[int]) -> dict[str, Any] | None:
    """Return the JSON of a cell over those seeds for which it is finished, or None."""
    recipe = RECIPES[recipe_name]
    keys = dict(key.split("=", 1) for key in recipe.keys.split())
    estimator = keys.get("advantage_estimator", "grpo")
    own, plain, folders, used = [], [], [], []
    for seed in seeds:
        here = out / name / f"seed{seed}"
        found = finished_scores(here / f"eval-{recipe_name}")
        beside_it = finished_scores(here / "eval-plain")
        if found and beside_it:
            own.append(found)
            plain.append(beside_it)
            folders.append(here / recipe_name)
            used.append(seed)
    if not used:
        return None
    first = out / name / f"seed{used[0]}"
    done = json.loads(beside(first / recipe_name, ".done.json").read_text())
    runs = [steps(folder) for folder in folders]
    tokens = [round(sum(row["tokens_generated"] for row in run)) for run in runs]
    cell = {
        "recipe": recipe_name,
        "setting": name,
        "explorer": explorer_of(keys),
        "advantage": keys.get("tree_advantage", estimator),
        "reward_scheme": keys.get("reward_scheme", "none"),
        "prm": recipe.prm,
        "forbidden": list(recipe.forbidden),
        "seeds": used,
        "tokens": round(fmean(tokens)),
        "command": done["command"],
    }
    per_seed: dict[str, list[float]] = {"tokens": tokens, "rounds": [len(run) for run in runs]}
    bootstrapped, t_intervals = {}, {}
    for metric in METRICS:
        each = [fmean(found[metric]) for found in own]
        cell[metric] = round(100 * fmean(each), 2)
        per_seed[metric] = percent(each)
        now = [x for found in own for x in found[metric]]
        before = [x for found in plain for x in found[metric]]
        bootstrapped[metric] = percent(paired_bootstrap(now, before))
        pairs = zip(each, [fmean(found[metric]) for found in plain], strict=True)
        t_intervals[metric] = over_seeds([a - b for a, b in pairs])
    for key in ("malformed_share", "response_length", "acts/verify", "acts/refine"):
        per_seed[key] = [round(last_rounds(folder, key), 3) for folder in folders]
    cell |= {"change_vs_plain": bootstrapped, "change_vs_plain_seeds": t_intervals}
    cell["per_seed"] = per_seed
    if recipe.searched:
        files = [out / name / f"seed{s}/eval-{recipe_name}/eval/summary.json" for s in used]
        found = [json.loads(file.read_text())["equal_tokens"] for file in files]
        cell["search_minus_majority"] = {
            k: percent([fmean(one[k]["search - maj"]["mean"] for one in found)])[0]
            for k in found[0]
        }
    return cell


def starts(out: Path, name: str, seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """Return the accuracies before RL: model -> metric -> one figure per finished seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for model in ("base", "sft", "sft-cot"):
        each = [finished_scores(out / name / f"seed{seed}" / f"eval-{model}") for seed in seeds]
        if whole := [one for one in each if one]:
            found[model] = {m: percent([fmean(one[m]) for one in whole]) for m in METRICS}
    return found


def table(cells: list[dict[str, Any]], before: dict[str, Any]) -> str:
    """Return the figures as Markdown, one table per setting."""
    lines: list[str] = []
    figures = "greedy % | change, problems | change, seeds | sampled % | change, problems"
    for name in dict.fromkeys(cell["setting"] for cell in cells):
        lines += [f"**{name}**: before RL, greedy % of each seed: {before.get(name, {})}", ""]
        lines += [f"| recipe | {figures} | change, seeds | thousand tokens | malformed % |"]
        lines += ["|---" * 9 + "|"]
        for cell in cells:
            if cell["setting"] != name:
                continue
            shown = [cell["recipe"]]
            for metric in METRICS:
                each = " / ".join(f"{x:.1f}" for x in cell["per_seed"][metric])
                shown += [f"**{cell[metric]:.1f}** ({each})"]
                for kind in ("change_vs_plain", "change_vs_plain_seeds"):
                    known = cell["recipe"] != "plain" and cell[kind][metric]
                    shown += ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*known) if known else ""]
            malformed = " / ".join(f"{100 * x:.0f}" for x in cell["per_seed"]["malformed_share"])
            shown += [f"{cell['tokens'] / 1e3:.0f}", malformed]
            lines += [f"| {' | '.join(shown)} |"]
        lines += [""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one setting, four recipes, one seed")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--only", default="*", help="SETTING/RECIPE patterns, with commas")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas")
    parser.add_argument("--out", type=Path, default=None, help="folder of all runs")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--json", type=Path, default=None, help="file of the figures")
    args = parser.parse_args(arguments)
    os.chdir(ROOT)  # all paths are relative to it, so the recorded commands are portable
    settings = {"tale": QUICK} if args.quick else SETTINGS
    recipes = QUICK_RECIPES if args.quick else tuple(RECIPES)
    out = args.out or Path("outputs/credit-quick" if args.quick else "outputs/credit")
    file = args.json or (out / "credit.json" if args.quick else ROOT / "docs/results/credit.json")
    seeds = [0] if args.quick else [int(seed) for seed in args.seeds.split(",")]
    only = args.only.split(",")
    failed: list[Path] = []
    stages: dict[Path, Stage] = {}
    for seed in seeds:  # one whole seed after the other
        for name, setting in settings.items():
            chosen = [r for r in recipes if any(fnmatch(f"{name}/{r}", one) for one in only)]
            if chosen:
                stages |= plan(out, name, setting, seed, chosen)
    if not args.table:
        failed = run_all(stages, args.workers)
    every = [cell_of(out, name, recipe, seeds) for name in settings for recipe in recipes]
    cells = [cell for cell in every if cell]
    before = {name: starts(out, name, seeds) for name in settings}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"cells": cells, "before": before})
    print(table(cells, before))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
