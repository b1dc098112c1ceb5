"""Test the HTML pages in headless Chromium, which runs their scripts and takes pictures.

Pictures go to outputs/screenshots (a CI artefact).
"""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rftt.mcts import Choice, Tree, grow
from rftt.run.stats import tree_record
from rftt.tokens import successors
from rftt.types import Problem, Step
from tests.conftest import HANG_LIMIT
from tools.page import filled
from tools.report import write_report

ROOT = Path(__file__).parents[1]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.html,
    pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed"),
]
HOSTILE = "</script><img src=x onerror='document.title=1'><script>document.title='owned'</script>"
RIGHT, WRONG, MERGED = (46, 139, 87), (200, 80, 60), (123, 79, 201)
"""The colours of tree.html."""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """The page's document after its script ran; with `picture`, a screenshot as well."""

    def run(page: Path, state: str = "", picture: str = "") -> str:
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"]
        flags += ["disable-background-networking", "disable-component-update", "disable-sync"]
        flags += [
            "hide-scrollbars",
            "window-size=1400,1000",
            f"user-data-dir={tmp_path / 'chrome'}",
        ]
        shots = ROOT / "outputs" / "screenshots"
        shots.mkdir(parents=True, exist_ok=True)
        wanted = ["dump-dom", *([f"screenshot={shots / picture}"] if picture else [])]
        found = ""
        for want in wanted:  # Chromium does one of them at a time
            command = [CHROMIUM, *(f"--{flag}" for flag in (*flags, want))]
            url = page.as_uri() + (f"#{state}" if state else "")
            done = subprocess.run(
                [*command, url], capture_output=True, text=True, timeout=HANG_LIMIT, check=True
            )
            found = found or done.stdout
        return found

    return run


def grown(simulations: int) -> Tree:
    """A tree whose leaves are right where a fixed rule says so; the same prefix for any number."""
    tree = Tree(partial(successors, phase="learned"), max_depth=6, exploration_weight=2.0, seed=3)

    async def expand(choice: Choice) -> list[Step]:
        n = len(tree.nodes)
        step = Step(choice.act, f"{choice.act} {n}", log_priors={"output": -0.5, "verify": -2.0})
        last = Step("output", f"so {n}", answer=str(n % 3)) if choice.act != "output" else None
        return [step, last] if last else [Step("output", f"so {n}", answer=str(n % 3))]

    async def value(steps: Sequence[Step]) -> float:
        return float(steps[-1].answer == "0")

    asyncio.run(grow(tree, expand, value, simulations=simulations))
    return tree


class Words:
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


def record(simulations: int = 10, question: str = "How many?") -> dict[str, Any]:
    problem = Problem("p", question, "0")
    return tree_record(grown(simulations), problem, Words())  # type: ignore[arg-type]


def drawn(document: str) -> dict[int, tuple[int, float]]:
    """Node -> (N, Q) as the page shows them."""
    found = re.findall(r'data-id="(\d+)" data-n="(\d+)" data-q="([\d.]+)"', document)
    return {int(id): (int(n), float(q)) for id, n, q in found}


def merged_row(tree: dict[str, Any]) -> dict[str, Any]:
    wrong = next(n["id"] for n in tree["nodes"] if n["terminal"] and not n["q"])
    right = next(n["id"] for n in tree["nodes"] if n["terminal"] and n["q"])
    steps = [
        {"act": "next_step", "text": "wrong turn", "node": wrong, "wrong": True},
        {"act": "verify", "text": "this is wrong"},
        {"act": "refine", "text": "back to the start"},
        {"act": "output", "text": "right", "node": right},
    ]
    return {"kind": "merged", "steps": steps, "failed_nodes": [wrong], "path_nodes": [right]}


def share_of(picture: str, colour: tuple[int, int, int]) -> float:
    """Share of the pixels that have a colour, give or take what smoothing does."""
    pixels = np.asarray(Image.open(ROOT / "outputs/screenshots" / picture).convert("RGB"), int)
    return float((np.abs(pixels - colour).max(-1) <= 8).mean())


@pytest.mark.oracle
def test_the_slider_shows_the_tree_as_it_was_then(
    tmp_path: Path, browse: Callable[..., str]
) -> None:
    page = tmp_path / "tree.html"
    page.write_text(filled("tree.html", record(10) | {"rows": []}))
    for simulations in (1, 4, 10):
        then = grown(simulations)
        wanted = {node.id: (node.visits, round(node.q, 3)) for node in then.nodes}
        assert drawn(browse(page, f"simulation={simulations}")) == wanted


def test_a_tree_page_shows_priors_texts_and_the_merged_path(
    tmp_path: Path, browse: Callable[..., str]
) -> None:
    tree = record(10)
    row, page = merged_row(tree), tmp_path / "tree.html"
    deep = next(n for n in tree["nodes"] if n["act"] == "output" and n["parent"])
    deep["text"] = "so it is 7"
    page.write_text(filled("tree.html", tree | {"rows": [row]}))
    document = browse(page, f"row=0&node={deep['id']}", picture="tree.png")
    assert f"<dd>{round(deep['prior'], 3)}</dd>" in document
    assert f"<pre>{deep['text']}</pre>" in document
    assert re.findall(r'data-act="(\w+)"', document) == ["verify", "refine"]
    of_merged = {
        int(x) for x in re.findall(r'class="node[^"]* merged[^"]*"[^>]*data-id="(\d+)"', document)
    }
    assert {row["failed_nodes"][0], row["path_nodes"][0], 0} <= of_merged
    assert all(share_of("tree.png", colour) > 2e-4 for colour in (RIGHT, WRONG, MERGED))
    plain = browse(page, picture="tree_plain.png")
    assert not re.search(r'data-act="\w', plain)
    assert share_of("tree_plain.png", MERGED) < share_of("tree.png", MERGED) / 3


WRITTEN = {
    r"so the answer is \boxed{18}.": "so the answer is ⟦18⟧.",
    r"\frac{1}{2} of \dfrac{x+1}{\sqrt{2}} is \(3 \times 4\)": "1/2 of (x+1)/(√2) is 3 × 4",
    r"\[ 5^2 \cdot x_{1} \le 2^{a+b} \]": " 5² · x₁ ≤ 2^(a+b) ",
    r"$x = 5$, $5 and $8, $5+$8 = $13, \$7, 50\%": "x = 5, $5 and $8, $5+$8 = $13, $7, 50%",
    r"1{,}000\text{ cm}, 90^\circ, \left(1\right)": "1,000 cm, 90°, (1)",
    r"\unknown{3}, snake_case, {1, 2}, a \ b": r"\unknown{3}, snake_case, {1, 2}, a  b",
    r"cut off: \boxed{\frac{1}{2": "cut off: ⟦1/2⟧",
    r"a\\b": "a\nb",
    "\\frac" * 20_000 + "x_1 " * 20_000: None,  # ends, in linear time
}
"""What a model writes -> what the page shows of it."""


def test_latex_is_readable_and_can_be_seen_as_written(
    tmp_path: Path, browse: Callable[..., str]
) -> None:
    tree, page = record(10), tmp_path / "tree.html"
    leaf = next(n["id"] for n in tree["nodes"] if n["terminal"])
    for written, shown in WRITTEN.items():
        tree["nodes"][leaf]["text"] = written
        page.write_text(filled("tree.html", tree | {"rows": []}))
        document = browse(page, f"node={leaf}")
        if shown is not None:
            assert f"<pre>{shown}</pre>" in document
            assert f"as the model wrote it</summary><pre>{written}</pre>" in document
        assert document.count('class="node') == len(tree["nodes"])


def test_long_texts_fold_and_refused_steps_have_a_badge(
    tmp_path: Path, browse: Callable[..., str]
) -> None:
    tree, page = record(10, "How many? " * 200), tmp_path / "tree.html"
    leaf = next(n for n in tree["nodes"] if n["terminal"] and n["parent"])
    text = "Each of the pens costs \\frac{1}{2} dollar. " * 40
    tree["nodes"][leaf["parent"]]["text"] = text
    leaf |= {"text": "I am sorry.", "refused": "apology", "answer": None}
    page.write_text(filled("tree.html", tree | {"rows": [merged_row(tree)]}))
    document = browse(page, f"node={leaf['id']}&row=0", picture="tree_long.png")
    assert 'data-refused="apology"' in document
    assert '<span class="badge">apology</span>' in document
    (summary,) = re.findall(r"<details><summary>([^<]*Each of[^<]*)</summary>", document)
    assert len(summary) < 100  # folded, because it only precedes the step
    assert document.count('data-refused="') == 1
    assert "badge" not in browse(page, "node=0").partition('id="detail"')[2].partition("<script")[0]
    opened = browse(page, f"node={leaf['parent']}")
    assert re.search(r'<details open=""><summary>Each of', opened)  # the chosen step itself


@pytest.mark.cases
def test_a_models_output_never_becomes_markup(tmp_path: Path, browse: Callable[..., str]) -> None:
    tree, run = record(4, HOSTILE), tmp_path / "run"
    tree["nodes"][1] |= {"text": HOSTILE}
    (run / "trees").mkdir(parents=True)
    (run / "trees/0.json").write_text(json.dumps(tree))
    sample = {"id": HOSTILE, "question": HOSTILE, "gold": "1", "outcome": 0.0, "answer": HOSTILE}
    sample |= {"steps": [HOSTILE], "acts": ["verify"], "step_rewards": [0.0]}
    (run / "samples").mkdir()
    (run / "samples/step_000000.jsonl").write_text(json.dumps(sample) + "\n")
    write_report({"run": run}, run)
    for page, state in ((run / "report.html", ""), (run / "trees/0.html", "node=1")):
        document = browse(page, state)
        assert "<img" not in document
        assert "&lt;img src=x" in document
        assert re.search("<title>.*?</title>", document)[0] in (  # type: ignore[index]
            "<title>run</title>",
            "<title>Tree of p</title>",
        )
        assert not re.findall(r"https?://(?!www\.w3\.org)", page.read_text())


def test_a_report_shows_rollouts_and_links(tmp_path: Path, browse: Callable[..., str]) -> None:
    run = tmp_path / "rl"
    (run / "samples").mkdir(parents=True)
    (run / "trees/step_000009").mkdir(parents=True)
    (run / "trees/step_000009/a%2Fb.json").write_text(json.dumps(record(4)))
    sample = {"id": "p", "question": "1+1?", "gold": "2", "answer": "2", "outcome": 1.0}
    sample |= {"steps": ["<verify>so</verify>", "lost", "<output>2</output>"]}
    sample |= {"acts": ["verify", "", "output"], "step_rewards": [0.25, 0.0, 1.0]}
    (run / "samples/step_000009.jsonl").write_text(json.dumps(sample) + "\n")
    write_report({"rl": run}, tmp_path / "out")
    document = browse(tmp_path / "out/report.html", picture="report.png")
    assert re.findall(r'class="segment"[^>]*data-act="(\w+)"', document) == [
        "verify",
        "outside",
        "output",
    ]
    assert re.findall(r'class="reward"[^>]*>([\d.]+)<', document) == ["0.25", "1"]
    (link,) = re.findall(r'<a href="([^"]+)"', document)
    target = tmp_path / "out" / link.replace("%25", "%")
    assert target.resolve() == (run / "trees/step_000009/a%2Fb.html").resolve()
    assert target.is_file()
    assert share_of("report.png", RIGHT) > 1e-5
