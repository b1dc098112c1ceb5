"""The tables of docs/results.md out of runs/results_tiny.sh: python bench/tiny_results.py RUN…

Each RUN is the output folder of one seed. Prints a table per question, then one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

MODELS = {
    "base": "base model, direct answers",
    "sft": "warm-up",
    "rl": "RL, functional-token MCTS",
    "rl-normal": "RL, functional tokens, plain sampling",
    "sft-cot": "warm-up without functional tokens",
    "rl-cot": "RL without functional tokens, plain sampling",
}


def summary(run: Path, model: str) -> dict | None:
    file = run / f"eval-{model}" / "eval" / "summary.json"
    return json.loads(file.read_text()) if file.exists() else None


def tokens(run: Path, model: str) -> float | None:
    file = run / model / "metrics.jsonl"
    if not model.startswith("rl") or not file.exists():
        return None
    return sum(json.loads(line)["tokens_generated"] for line in file.read_text().splitlines())


def cells(values: list[float]) -> str:
    each = " / ".join(f"{100 * value:.1f}" for value in values)
    return f"**{100 * mean(values):.1f}** ({each})"


def main(runs: list[Path]) -> None:
    result: dict[str, dict] = {}
    print(
        f"| model ({len(runs)} seeds) | greedy % | sampled % | maj@8 % | million tokens sampled |"
    )
    print("|---|---|---|---|---|")
    for model, label in MODELS.items():
        found = [s for run in runs if (s := summary(run, model))]
        if not found:
            continue
        spent = [t / 1e6 for run in runs if (t := tokens(run, model)) is not None]
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
    print(json.dumps(result))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
