"""Write self-contained HTML pages of search trees and of rollouts, coloured by segment.

Curves and tables are in report.md, and in TensorBoard, wandb or trackio. Data is inserted into the
templates report.html and tree.html as JSON that cannot end its script element. The scripts of the
pages insert every text as text and never as markup, so a model's output cannot act as code. A
Content-Security-Policy forbids the pages to load anything from the network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from rftt.run.files import Row
from rftt.tokens import ACTS
from tools.run_folder import Run, read_json

TEMPLATES = Path(__file__).parent
N_TREES = 40
"""Number of a run's trees that the report links."""


def filled(template: str, data: Row) -> str:
    """Return the template with `data` filled in."""
    page = (TEMPLATES / template).read_text(encoding="utf-8")
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return page.replace("{{data}}", text)


def write_page(runs: Sequence[Run], out: Path, *, n_samples: int) -> None:
    """Write `out`/report.html with the runs' last rollouts, and the pages of their trees."""
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
        "acts": ACTS,
    }
    (out / "report.html").write_text(filled("report.html", data), encoding="utf-8")


def about(env: Row) -> str:
    """Return the commit, device and torch version of a run. env.json has more."""
    if not env:
        return "no env.json"
    commit = (env["commit"] or "no commit")[:10] + (" with changes" if env["modified"] else "")
    return f"commit {commit} on {env['device']}, torch {env['versions'].get('torch')}"


def write_tree_pages(run: Run) -> list[Path]:
    """Write a page beside every tree of a run, with the training rows made from it."""
    by_tree: dict[str, list[Row]] = {}
    for row in run.rows:
        if "steps" in row:
            by_tree.setdefault(row.get("tree", ""), []).append(row)
    pages = []
    for path in sorted(run.path.glob("trees/**/[!.]*.json")):
        record = read_json(path)
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
