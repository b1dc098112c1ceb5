"""Write report.md with plots/*.png, and report.html, for one run or for several side by side.

    python tools/report.py <run> [<run> …] [--out folder]

Input is the content of run directories: metrics.jsonl, eval/summary.json, stats.json, samples/ and
trees/. None of it is changed. report.md contains the tables and the curves: the paper's four
panels, the health of the learner, the acts, and accuracy over search simulations. report.html
contains the last rollouts with a colour per segment, and links to a page beside every search tree.
Missing parts of a run are listed at the end.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))
from rftt.run.files import Row, make_folder, one_line, printable
from rftt.run.log import number, say
from rftt.tokens import ACTS
from rftt.types import UserError
from tools.page import write_page
from tools.run_folder import CURVES, Panel, Run, missing, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FINAL = tuple(key for panels in CURVES.values() for _, _, keys in panels for key in keys)
N_SAMPLES = 4
"""Number of a run's last rollouts that are shown."""


def write_report(run_dirs: Mapping[str, Path], out: Path) -> Path:
    """Write `out`/report.html, report.md and plots/*.png. Return the path of report.md."""
    runs = [read_run(name, path) for name, path in run_dirs.items()]
    make_folder(out / "plots")
    lines = [f"# {inert(', '.join(run_dirs))}", ""]
    figures = {name: draw_curves(runs, panels) for name, panels in CURVES.items()}
    for name, figure in (figures | {"acts": draw_acts(runs), "search": draw_search(runs)}).items():
        if figure is not None:
            figure.savefig(out / "plots" / f"{name}.png", dpi=110)
            lines += [f"![{name}](plots/{name}.png)", ""]
    for title, cells_of in TABLES.items():
        lines += markdown_table(title, {run.name: cells_of(run) for run in runs})
    lines += counts_table(runs)
    for run in runs:
        lines += [f"## Last rollouts of {inert(run.name)}", ""] if run.samples else []
        lines += [line for row in run.samples[:N_SAMPLES] for line in sample_lines(row)]
    lines += ["## Left out", "", *(f"- {inert(run.name)}: {missing(run)}" for run in runs)]
    report = out / "report.md"
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_page(runs, out, n_samples=N_SAMPLES)
    return report


# ---- Tables: cells of a run by column. Columns that no run has are omitted. ----


def training_cells(run: Run) -> dict[str, str]:
    """Return the means of metrics over the first and over the last tenth of the steps."""
    cells = {"steps": str(len(run.metrics))} if run.metrics else {}
    for key in FINAL:
        values = run.series(key)[1]
        tenth = max(1, len(values) // 10)
        means = [number(sum(v) / tenth) for v in (values[:tenth], values[-tenth:])]
        cells |= {key: " → ".join(means)} if values else {}
    return cells


def evaluation_cells(run: Run) -> dict[str, str]:
    """Return the accuracies of an evaluation with their intervals."""
    cells = {key: str(run.summary[key]) for key in ("set", "n") if key in run.summary}
    cells |= {k: interval(run.summary[k]) for k in ("greedy", "sampled") if run.summary.get(k)}
    for kind in ("pass@", "maj@", "best@"):
        cells |= {f"{kind}{k}": interval(x) for k, x in run.summary.get(f"{kind}k", {}).items()}
    return cells


def level_cells(run: Run) -> dict[str, str]:
    """Return the accuracy per level, unless the problems have no levels."""
    levels = run.summary.get("levels", {})
    if list(levels) == ["None"]:
        return {}
    return {name: f"{level['greedy']:.3f} (n={level['n']})" for name, level in levels.items()}


def stats_cells(run: Run) -> dict[str, str]:
    """Return the figures of a search."""
    return {key: number(x) for key, x in run.stats.items() if isinstance(x, int | float)}


def counts_table(runs: Sequence[Run]) -> list[str]:
    """Return a table of what searches kept, omitted and rejected, with one row per reason."""
    cells: dict[str, dict[str, str]] = {}
    for run in runs:
        for reason, n in run.stats.get("counts", {}).items():
            cells.setdefault(reason, {})[run.name] = number(n)
    return markdown_table("What was kept, omitted and rejected", cells, "reason")


def interval(value: Mapping[str, float]) -> str:
    """Format a mean or accuracy with its interval, and its tokens if they were counted."""
    mean = value["mean"] if "mean" in value else value["accuracy"]
    cost = f", {value['tokens']:,.0f} tokens" if "tokens" in value else ""
    return f"{mean:.3f} [{value['low']:.3f}, {value['high']:.3f}]{cost}"


TABLES: dict[str, Callable[[Run], dict[str, str]]] = {
    "Training: mean of the first → the last tenth of the steps": training_cells,
    "Evaluation, with 95 % intervals over problems": evaluation_cells,
    "Accuracy over search simulations": lambda run: {
        n: interval(value) for n, value in run.summary.get("search", {}).items()
    },
    "Greedy accuracy by level": level_cells,
    "Rows from search": stats_cells,
}


def markdown_table(
    title: str, cells: Mapping[str, dict[str, str]], first: str = "run"
) -> list[str]:
    """Return Markdown lines with one row per key of `cells`, or [] if no row has a cell."""
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    if not columns:
        return []
    rows = [[first, *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(row.get(c, "") for c in columns)] for name, row in cells.items() if row]
    lines = ["| " + " | ".join(map(inert, row)) + " |" for row in rows]
    return [f"## {title}", "", *lines, ""]


def inert(text: str) -> str:
    """Return a foreign text, such as a level, in one line that is neither markup nor a link."""
    safe = escape(one_line(text, 1000), quote=False).replace("](", "]\\(")
    return safe.replace("|", "\\|").replace("`", "\\`")


def label_of(text: str) -> str:
    """Return a foreign text as the label of a plot, in which a dollar sign starts no formula."""
    return one_line(text).replace("$", "\\$")


def sample_lines(row: Row) -> list[str]:
    """Format a rollout: figures in a line, texts fenced so that model output is never markup."""
    figures = [f"{key} {number(x)}" for key, x in row.items() if isinstance(x, int | float)]
    lists = {key: ", ".join(map(str, x)) for key, x in row.items() if isinstance(x, list)}
    texts = [printable(f"{key}: {x}") for key, x in (row | lists).items() if isinstance(x, str)]
    longest = max((len(run) for text in texts for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [", ".join(figures), "", f"{fence}text", *texts, fence, ""]


# ---- Plots (Agg: no display) ----


def new_figure(n_panels: int) -> tuple[Figure, list[Axes]]:
    """Return a grid of panels, two panels wide."""
    from matplotlib.figure import Figure

    n_rows, n_columns = (n_panels + 1) // 2, min(n_panels, 2)
    figure = Figure(figsize=(5 * n_columns, 3.2 * n_rows), layout="constrained")
    axes: list[Axes] = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.locator_params(axis="x", integer=True)  # steps are whole numbers
        ax.spines[["top", "right"]].set_visible(False)
    for spare in axes[n_panels:]:
        spare.set_axis_off()
    return figure, axes[:n_panels]


def draw_curves(runs: Sequence[Run], panels: Sequence[Panel]) -> Figure | None:
    """Draw metrics over steps, one colour per run. A panel's second key is dashed with dots."""
    drawn = [p for p in panels if any(run.series(key)[0] for run in runs for key in p[2])]
    if not drawn:
        return None
    figure, axes = new_figure(len(drawn))
    for ax, (title, unit, keys) in zip(axes, drawn, strict=True):
        for i, run in enumerate(runs):
            for key, style in zip(keys, ("-", "o--"), strict=False):
                steps, values = run.series(key)
                if steps:
                    label = run.name if key == keys[0] else f"{run.name}, {key}"
                    ax.plot(
                        steps, values, style, color=f"C{i}", lw=1.4, ms=3, label=label_of(label)
                    )
        ax.set(title=title, xlabel="step", ylabel=unit)
        ax.legend(frameon=False, fontsize=8)
    return figure


def draw_acts(runs: Sequence[Run]) -> Figure | None:
    """Draw the stacked share of each act among the rollouts' steps. White is outside segments."""
    keys = [f"acts/{act}" for act in ACTS]
    rows_of = {run.name: [r for r in run.metrics if not r.keys().isdisjoint(keys)] for run in runs}
    drawn = [(name, rows) for name, rows in rows_of.items() if rows]
    if not drawn:
        return None
    figure, axes = new_figure(len(drawn))
    for ax, (name, rows) in zip(axes, drawn, strict=True):
        shares = [[row.get(key) or 0.0 for row in rows] for key in keys]
        colors = [f"C{i}" for i in range(len(ACTS))]
        ax.stackplot([row["step"] for row in rows], shares, labels=ACTS, colors=colors)
        ax.set(
            title=f"Acts of {label_of(name)}", xlabel="step", ylabel="share of steps", ylim=(0, 1)
        )
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    return figure


def draw_search(runs: Sequence[Run]) -> Figure | None:
    """Draw the accuracy of search over simulations and, beside maj@k, over tokens.

    The dotted line is greedy.
    """
    drawn = [(f"C{i}", run) for i, run in enumerate(runs) if run.summary.get("search")]
    if not drawn:
        return None
    figure, (left, right) = new_figure(2)
    for color, run in drawn:
        for ax, kind, style in (
            (left, "search", "o-"), (right, "search", "o-"), (right, "maj@k", "s--")
        ):  # fmt: skip
            points = sorted((int(n), value) for n, value in run.summary.get(kind, {}).items())
            mean, low, high, tokens = (
                [value[key] for _, value in points] for key in ("accuracy", "low", "high", "tokens")
            )
            x = tokens if ax is right else [n for n, _ in points]
            label = run.name if kind == "search" else f"{run.name}, {kind}"
            ax.plot(x, mean, style, color=color, label=label_of(label))
            ax.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        if run.summary.get("greedy"):
            greedy = run.summary["greedy"]["mean"]
            left.axhline(greedy, color=color, ls=":", label=label_of(f"{run.name}, greedy"))
    left.set(title="Search at inference", xlabel="simulations", ylabel="accuracy")
    right.set(title="Search and plain majority", xlabel="generated tokens per problem")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.legend(frameon=False, fontsize=8)
    return figure


def main(argv: Sequence[str]) -> None:
    """Write the report of the run directories on the command line and print its path."""
    parser = argparse.ArgumentParser("python tools/report.py")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, help="folder of report.md (default: the first run's)")
    arguments = parser.parse_args(argv)
    names = [path.resolve().name for path in arguments.runs]
    names = names if len(set(names)) == len(names) else [str(path) for path in arguments.runs]
    run_dirs = dict(zip(names, arguments.runs, strict=True))
    say(str(write_report(run_dirs, arguments.out or arguments.runs[0])))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {one_line(error, 1000)}\n")
        raise SystemExit(2) from None
