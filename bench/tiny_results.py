"""Print tables of docs/results.md.

    python bench/tiny_results.py [chain|forgetting|controls|curves] RUN…

Each RUN is the output folder of one seed, written by runs/results_tiny.sh (chain),
runs/forgetting_tiny.sh (forgetting) or runs/controls_tiny.sh (controls and curves). `curves` writes
process_rewards.png beside the runs. The output is tables and then one JSON object.

Intervals are of 95 %, over the problems of all seeds together, and paired if two models are
compared. They describe the measurement of these models and do not predict another seed.
"""

from __future__ import annotations

import json
import sys
from itertools import accumulate
from pathlib import Path
from statistics import fmean, mean

from matplotlib.figure import Figure

from rftt.run.files import Row

sys.path.insert(0, str(Path(__file__).parents[1]))
from rftt.run.files import read_jsonl
from rftt.run.stats import mean_ci, paired_bootstrap

MODELS = {
    "base": "base model, direct answers",
    "sft": "warm-up",
    "rl": "RL, functional-token MCTS",
    "rl-normal": "RL, functional tokens, plain sampling",
    "sft-cot": "warm-up without functional tokens",
    "rl-cot": "RL without functional tokens, plain sampling",
}


def summary(run: Path, model: str) -> dict | None:
    """Return the summary of a model's evaluation, or None if it is missing."""
    file = run / f"eval-{model}" / "eval" / "summary.json"
    return json.loads(file.read_text()) if file.exists() else None


def steps(run: Path) -> list[Row]:
    """Return the metrics of a training run, one row per step."""
    return [row for _, row in read_jsonl(run / "metrics.jsonl")]


def total(run: Path, key: str) -> float | None:
    """Return the sum of a key over the steps of a training run, or None if the run is missing."""
    return sum(row[key] for row in steps(run)) if (run / "metrics.jsonl").exists() else None


def scores(folder: Path) -> dict[str, list[float]] | None:
    """Return per problem, in order of ids, greedy correctness and the share of right samples."""
    files = [
        file for file in folder.glob("eval/*.jsonl") if (folder / "eval/summary.json").exists()
    ]
    if not files:
        return None
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    rows.sort(key=lambda row: row["id"])
    return {
        "greedy": [float(row["greedy"]["correct"]) for row in rows],
        "sampled": [fmean(s["correct"] for s in row["samples"]) for row in rows],
    }


def cells(values: list[float]) -> str:
    """Format the mean and the value of each seed in per cent."""
    each = " / ".join(f"{100 * value:.1f}" for value in values)
    return f"**{100 * mean(values):.1f}** ({each})"


def measured(
    runs: list[Path], name: str, against: str | None = None
) -> dict[str, tuple[str, str, int]]:
    """Return metric -> (mean and each seed, interval or paired change, seeds)."""
    found: dict[str, tuple[str, str, int]] = {}
    pairs = [(scores(run / name), scores(run / (against or name))) for run in runs]
    whole = [(a, b) for a, b in pairs if a and b]
    for metric in ("greedy", "sampled") if whole else ():
        now = [x for a, _ in whole for x in a[metric]]
        before = [x for _, b in whole for x in b[metric]]
        each = cells([fmean(a[metric]) for a, _ in whole])
        if against:
            change, low, high = (100 * x for x in paired_bootstrap(now, before))
            found[metric] = (each, f"{change:+.1f} [{low:+.1f}, {high:+.1f}]", len(whole))
        else:
            _, low, high = (100 * x for x in mean_ci(now))
            found[metric] = (each, f"[{low:.1f}, {high:.1f}]", len(whole))
    return found


# ---- The tables ----


def chain(runs: list[Path]) -> dict:
    """Print the accuracies of all models, and of majorities over search and over samples."""
    result: dict[str, dict] = {}
    print(
        f"| model ({len(runs)} seeds) | greedy % | sampled % | maj@8 % | million tokens sampled |"
    )
    print("|---|---|---|---|---|")
    for model, label in MODELS.items():
        found = [s for run in runs if (s := summary(run, model))]
        if not found:
            continue
        drawn = [total(run / model, "tokens_generated") for run in runs if model.startswith("rl")]
        spent = [t / 1e6 for t in drawn if t is not None]
        greedy = [s["greedy"]["mean"] for s in found]
        sampled = [s["sampled"]["mean"] for s in found]
        majority = [s["maj@k"]["8"]["accuracy"] for s in found]
        cost = f"{mean(spent):.2f}" if spent else ""
        print(f"| {label} | {cells(greedy)} | {cells(sampled)} | {cells(majority)} | {cost} |")
        result[model] = {"greedy": greedy, "sampled": sampled, "maj@8": majority, "tokens": spent}
    print("\n| majority over | 1 | 2 | 4 | 8 | 16 | tokens at the last |")
    print("|---|---|---|---|---|---|---|")
    for model in ("sft", "rl"):
        for kind, label in (("search", "searched paths"), ("maj@k", "independent samples")):
            found = [s[kind] for run in runs if (s := summary(run, model))]
            ks = sorted(found[0], key=int)
            row = [mean([s[k]["accuracy"] for s in found]) for k in ks]
            cost = mean([s[ks[-1]]["tokens"] for s in found])
            shown = " | ".join(f"{100 * value:.1f}" for value in row) + " |" * (5 - len(ks))
            print(f"| {MODELS[model]}, {label} | {shown} | {cost:.0f} |")
            result[f"{model} {kind}"] = {"accuracy": row, "tokens": cost}
    return result


TEACHERS = {
    "base": "base model",
    "gold": "plain SFT on written solutions",
    "sampled": "rejection sampling from the base model",
}


def forgetting(runs: list[Path]) -> dict:
    """Print the accuracies of both teachers on the target and the guard set."""
    result: dict[str, dict] = {}
    print("| model | set | greedy % | change | sampled % | change | tokens trained on |")
    print("|---|---|---|---|---|---|---|")
    for model, label in TEACHERS.items():
        for kind in ("test", "guard"):
            name, base = f"forgetting/eval-{model}-{kind}", f"forgetting/eval-base-{kind}"
            found = measured(runs, name, base)
            tokens = [total(run / "forgetting" / model, "tokens") for run in runs]
            cost = f"{mean(t for t in tokens if t is not None):,.0f}" if any(tokens) else ""
            row = [x for metric in ("greedy", "sampled") for x in found[metric][:2]]
            print(f"| {label} | {kind} | {' | '.join(row)} | {cost} |")
            result[f"{model} {kind}"] = {metric: found[metric] for metric in found}
    return result


CELLS = {
    "tokens | tree | PRM": {
        "yes | yes | no": "rl",
        "yes | two texts per act and node | no": "rl-twice",
        "yes | yes | yes": "rl-prm",
        "yes | no | no": "rl-normal",
        "yes | no | yes": "rl-normal-prm",
        "no | yes | either": "impossible: a tree over functional tokens needs the tokens",
        "no | no | no": "rl-cot",
        "no | no | yes": "rl-cot-prm",
    },
    "advantages | process scores": {
        "grpo | none": "rl",
        "grpo | paper": "rl-prm",
        "grpo | blend": "rl-blend",
        "reinforce++ | none": "rl-rpp",
        "reinforce++ | paper": "rl-rpp-prm",
        "reinforce++ | gain": "rl-rpp-gain",
    },
    "act forbidden in RL and after": {
        "none": "rl",
        **{act: f"rl-no-{act}" for act in ("verify", "refine", "next_step", "subquestion")},
    },
}
"""Compared settings -> values of a cell -> its run. Every change is relative to the run `rl`."""
FORBIDDEN = ("clarify", "analysis", "next_step", "subquestion", "direct_answer", "verify", "refine")


def last_rounds(run: Path, key: str) -> float:
    """Return the mean of a metric over the last three steps of a training run."""
    return fmean(row[key] for row in steps(run)[-3:])


def compared(found: dict[str, tuple[str, str, int]]) -> list[str]:
    """Return five cells of `measured`: greedy, its change, sampled, its change, seeds."""
    row = [x for figures in found.values() for x in figures[:2]]
    return [*row, str(found["greedy"][2])] if found else ["not run", "", "", "", ""]


def controls(runs: list[Path]) -> dict:
    """Print the control tables. A missing run is an empty row."""
    result: dict[str, dict] = {}
    figures = "greedy % | change | sampled % | change | seeds"
    for title, table in CELLS.items():
        print(f"| {title} | {figures} | response tokens, last 3 rounds | million tokens sampled |")
        print("|---" * (title.count("|") + 8) + "|")
        for cell, name in table.items():
            row = [name, *[""] * 6]
            if " " not in name:
                there = [run / name for run in runs if scores(run / f"eval-{name}")]
                length = " / ".join(f"{last_rounds(run, 'response_length'):.0f}" for run in there)
                spent = [total(run, "tokens_generated") or 0.0 for run in there]
                result[name] = measured(runs, f"eval-{name}", "eval-rl")
                row = [*compared(result[name]), length]
                row += [f"{mean(spent) / 1e6:.2f}" if spent else ""]
            print(f"| {cell} | {' | '.join(row)} |")
        print()
    print(f"| act forbidden after RL only | model | {figures} |\n|---|---|---|---|---|---|---|")
    for model in ("rl", "sft"):
        for act in ("none", *FORBIDDEN):
            name, whole = f"masked/eval-{model}-{act}", f"masked/eval-{model}-none"
            result[f"{model} without {act}"] = found = measured(runs, name, whole)
            print(f"| {act} | {MODELS[model]} | {' | '.join(compared(found))} |")
    return result


PANELS = {
    "response_length": "response length, tokens",
    "accuracy": "accuracy of the rollouts",
    "reward": "reward",
    "kl": "KL, nats per token",
}
"""Metric -> title of its panel. These are the paper's four curves."""


def curves(runs: list[Path]) -> dict:
    """Draw the metrics with one colour per reward scheme and one line per seed."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for i, (label, name) in enumerate(CELLS["advantages | process scores"].items()):
        for number, run in enumerate(run for run in runs if (run / name / "hf").exists()):
            rows = steps(run / name)
            spent = [tokens / 1e6 for tokens in accumulate(r["tokens_generated"] for r in rows)]
            for ax, key in zip(axes, PANELS, strict=True):
                shown = label.replace(" | ", ", ") if number == 0 else None
                ax.plot(spent, [row[key] for row in rows], color=f"C{i}", lw=0.9, label=shown)
    for ax, (key, title) in zip(axes, PANELS.items(), strict=True):
        ax.set(title=title, xlabel="million tokens sampled")
        ax.set_yscale("log" if key in ("reward", "kl") else "linear")
    axes[0].legend(frameon=False, fontsize=8)
    file = runs[0].parent / "process_rewards.png"
    figure.savefig(file, dpi=70)
    return {"figure": str(file)}


TABLES = {"chain": chain, "forgetting": forgetting, "controls": controls, "curves": curves}

if __name__ == "__main__":
    kind = sys.argv[1] if sys.argv[1] in TABLES else "chain"
    folders = [Path(argument) for argument in sys.argv[1:] if argument not in TABLES]
    print(json.dumps(TABLES[kind](folders)))
