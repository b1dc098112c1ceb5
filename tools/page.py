"""Self-contained HTML: report.html of one or more runs, and a page per search tree. No network.

Data goes into the templates report.html and tree.html as JSON that cannot end its script element.
Their scripts put every text on the page as text, so that a model's output can never become markup.
A Content-Security-Policy forbids the pages to load anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from rftt.run.files import Row
from rftt.tokens import ACTS
from tools.run_folder import CURVES, Run

TEMPLATES = Path(__file__).parent
N_TREES = 40
"""How many of a run's trees the report links."""


def filled(template: str, data: Row) -> str:
    """Return the template with `data` filled in."""
    page = (TEMPLATES / template).read_text(encoding="utf-8")
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return page.replace("{{data}}", text)


def write_page(
    runs: Sequence[Run], tables: Mapping[str, list[list[str]]], out: Path, *, n_samples: int
) -> None:
    """Write `out`/report.html and the pages of the runs' trees. Tables: title -> head and rows."""
    data = {
        "title": ", ".join(run.name for run in runs),
        "runs": [
            {
                "name": run.name,
                "about": about(run.env),
                "samples": run.samples[:n_samples],
                "trees": tree_links(write_tree_pages(run), run.path, out),
            }
            for run in runs
        ],
        "charts": charts(runs),
        "tables": [{"title": t, "columns": r[0], "rows": r[1:]} for t, r in tables.items() if r],
        "acts": ACTS,
    }
    (out / "report.html").write_text(filled("report.html", data), encoding="utf-8")


def about(env: Row) -> str:
    """Return where a run was made; env.json has more."""
    if not env:
        return "no env.json"
    commit = (env["commit"] or "no commit")[:10] + (" with changes" if env["modified"] else "")
    return f"commit {commit} on {env['device']}, torch {env['versions'].get('torch')}"


def charts(runs: Sequence[Run]) -> list[Row]:
    """Return the panels of the plots: lines with their colour, and a band if they have one."""

    def over_steps(run: Run, key: str, label: str, colour: int, dashed: bool = False) -> Row:
        steps, values = run.series(key)
        return {"label": label, "colour": colour, "dashed": dashed, "x": steps, "y": values}

    panels = [
        {
            "title": title,
            "unit": unit,
            "x_label": "step",
            "lines": [
                over_steps(run, key, run.name if i == 0 else f"{run.name}, {key}", colour, i > 0)
                for colour, run in enumerate(runs)
                for i, key in enumerate(keys)
            ],
        }
        for figure in CURVES.values()
        for title, unit, keys in figure
    ]
    panels += [
        {
            "title": f"Acts of {run.name}",
            "unit": "share of steps",
            "x_label": "step",
            "lines": [over_steps(run, f"acts/{act}", act, i) for i, act in enumerate(ACTS)],
        }
        for run in runs
    ]
    panels.append(
        {
            "title": "Search and plain majority",
            "unit": "accuracy",
            "x_label": "generated tokens per problem",
            "lines": [
                {
                    "label": f"{run.name}, {kind}",
                    "colour": colour,
                    "dashed": kind != "search",
                    "x": [point["tokens"] for point in points],
                    "y": [point["accuracy"] for point in points],
                    "low": [point["low"] for point in points],
                    "high": [point["high"] for point in points],
                }
                for colour, run in enumerate(runs)
                for kind in ("search", "maj@k")
                if run.summary.get("search")
                for points in [
                    sorted(run.summary.get(kind, {}).values(), key=lambda p: p["tokens"])
                ]
            ],
        }
    )
    for panel in panels:
        panel["lines"] = [line for line in panel["lines"] if line["x"]]
    return [panel for panel in panels if panel["lines"]]


def write_tree_pages(run: Run) -> list[Path]:
    """Write a page beside every tree of a run, with the training rows that came from it."""
    by_tree: dict[str, list[Row]] = {}
    for row in run.rows:
        if "steps" in row:
            by_tree.setdefault(row.get("tree", ""), []).append(row)
    pages = []
    for path in sorted(run.path.glob("trees/**/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        name = path.relative_to(run.path).as_posix()
        page = path.with_suffix(".html")
        page.write_text(filled("tree.html", record | {"rows": by_tree.get(name, [])}), "utf-8")
        pages.append(page)
    return pages


def tree_links(pages: list[Path], run_dir: Path, out: Path) -> list[Row]:
    """Return links from a page in `out` to the last tree pages of a run."""
    return [
        {
            "label": page.relative_to(run_dir / "trees").with_suffix("").as_posix(),
            "href": quote(Path(os.path.relpath(page, out)).as_posix()),
        }
        for page in pages[-N_TREES:]
    ]
