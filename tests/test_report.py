"""Test tools/report.py on made-up run directories: what it shows, omits, and escapes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from rftt.tokens import ACTS
from rftt.types import UserError
from tools.report import draw_curves, draw_search, main, write_report
from tools.run_folder import Run

ROOT = Path(__file__).parents[1]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rl_run(path: Path, n_steps: int = 20) -> Path:
    rows = []
    for step in range(n_steps):
        x = step / n_steps
        shares = {f"acts/{act}": 1 / 8 + (x / 8 if i % 2 else -x / 8) for i, act in enumerate(ACTS)}
        rows.append(
            {"step": step, "accuracy": 0.4 + 0.4 * x, "reward": 0.45 + 0.35 * x, "kl": 0.08 * x}
            | {"response_length": 80 + 40 * x + 5 * math.sin(step), "entropy": 1 - x / 2}
            | {"clip_share": 0.01, "mismatch_kl": 1e-6, "truncated_share": 0.02}
            | shares
            | ({"eval/greedy": 0.5 + 0.3 * x} if step % 5 == 0 else {})
        )
    write_rows(path / "metrics.jsonl", rows)
    sample = {"id": "p1", "response": "<output>`7`</output>", "acts": ["output"], "outcome": 1.0}
    write_rows(path / "samples/step_000009.jsonl", [{"id": "old", "response": "old"}])
    write_rows(path / "samples/step_000019.jsonl", [sample | {"answer": None}])
    return path


def evaluation(path: Path, lift: float = 0.0) -> Path:
    def around(mean: float) -> dict[str, float]:
        return {"mean": mean + lift, "low": mean + lift - 0.03, "high": mean + lift + 0.03}

    search = {str(n): around(0.6 + 0.05 * i) for i, n in enumerate((1, 2, 4, 8, 16))}
    for value in search.values():
        value |= {"accuracy": value.pop("mean"), "tokens": 512.4}
    summary = {
        "set": "test",
        "n": 500,
        "greedy": around(0.7),
        "sampled": around(0.6),
        "pass@k": {"1": around(0.6), "8": around(0.9)},
        "maj@k": {"8": search["8"]},
        "levels": {"2": {"n": 250, "greedy": 0.8}, "3": {"n": 250, "greedy": 0.6}},
        "search": search,
    }
    (path / "eval").mkdir(parents=True)
    (path / "eval/summary.json").write_text(json.dumps(summary))
    return path


def test_a_run_is_reported_with_its_plots_and_tables(tmp_path: Path) -> None:
    run = evaluation(rl_run(tmp_path / "rl"))
    report = write_report({"rl": run}, tmp_path / "out").read_text()
    header = next(line for line in report.splitlines() if line.startswith("| run | steps"))
    row = next(line for line in report.splitlines() if line.startswith("| rl | 20 |"))
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["accuracy"] == "0.41 → 0.77"  # means of steps 0-1 and 18-19
    assert cells["eval/greedy"] == "0.5 → 0.725"
    assert "0.700 [0.670, 0.730]" in report
    assert "| run | set | n | greedy | sampled | pass@1 | pass@8 | maj@8 |" in report
    assert "| rl | 0.600 [0.570, 0.630], 512 tokens | 0.650" in report
    assert "| rl | 0.800 (n=250) | 0.600 (n=250) |" in report
    plots = {path.name for path in (tmp_path / "out/plots").iterdir()}
    assert plots == {"curves.png", "health.png", "acts.png", "search.png"}
    for name in plots:
        assert f"(plots/{name})" in report
        with Image.open(tmp_path / "out/plots" / name) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").resize((64, 64)).getcolors(5000) or []) > 20
    assert "- rl: stats.json\n" in report


def test_runs_are_compared_and_their_gaps_named(tmp_path: Path) -> None:
    rl, plain = rl_run(tmp_path / "rl"), evaluation(tmp_path / "base")
    (tmp_path / "search").mkdir()
    (tmp_path / "search/stats.json").write_text(
        '{"problems": 40, "rows": 31, "solved": 0.65, "counts": {"kept_merged": 12}}'
    )
    runs = {"search": tmp_path / "search", "base": plain, "rl": rl}
    report = write_report(runs, tmp_path / "out").read_text()
    assert "| run | problems | rows | solved |\n| --- | --- | --- | --- |\n| search | 40" in report
    assert "| reason | search |\n| --- | --- |\n| kept_merged | 12 |\n" in report
    assert "- search: metrics.jsonl, eval/summary.json, samples/\n" in report
    assert "- base: metrics.jsonl, stats.json, samples/\n" in report
    assert "## Last rollouts of base" not in report


def test_a_value_that_a_run_lacks_is_an_empty_cell(tmp_path: Path) -> None:
    one, other = rl_run(tmp_path / "one"), rl_run(tmp_path / "other")
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({k: v for k, v in row.items() if k != "reward"}) for row in rows]
    (other / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    report = write_report({"one": one, "other": other}, tmp_path / "out").read_text()
    assert " |  | " in next(line for line in report.splitlines() if line.startswith("| other | 20"))


def test_problems_without_levels_have_no_table_of_levels(tmp_path: Path) -> None:
    run = evaluation(tmp_path / "base")
    assert "by level" in write_report({"base": run}, tmp_path / "out").read_text()
    summary = json.loads((run / "eval/summary.json").read_text())
    summary["levels"] = {"None": {"n": 80, "greedy": 0.5}}
    (run / "eval/summary.json").write_text(json.dumps(summary))
    assert "by level" not in write_report({"base": run}, tmp_path / "out").read_text()


def test_inputs_are_only_read(tmp_path: Path) -> None:
    run = evaluation(rl_run(tmp_path / "rl"))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "accu')  # the run is still writing
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    report = write_report({"rl": run}, tmp_path / "out").read_text()
    assert "| rl | 20 |" in report
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_empty_run_gives_a_report_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    report = write_report({"empty": tmp_path / "empty"}, tmp_path / "out").read_text()
    assert "metrics.jsonl, eval/summary.json, stats.json, samples/" in report
    assert list((tmp_path / "out/plots").iterdir()) == []
    with pytest.raises(UserError, match="nowhere does not exist"):
        write_report({"nowhere": tmp_path / "nowhere"}, tmp_path / "out")


def test_model_output_cannot_become_markup(tmp_path: Path) -> None:
    hostile = "```\n# Heading\n<script>alert(1)</script>\n````"
    write_rows(tmp_path / "rl/samples/step_000000.jsonl", [{"response": hostile, "outcome": 0}])
    report = write_report({"rl": tmp_path / "rl"}, tmp_path / "out").read_text()
    start = report.index("`````text\n")
    end = report.index("\n`````\n", start)
    assert start < report.index(hostile) < end
    assert "outcome 0" in report


def test_only_the_newest_rollouts_are_shown(tmp_path: Path) -> None:
    report = write_report({"rl": rl_run(tmp_path / "rl")}, tmp_path / "out").read_text()
    assert "response: <output>`7`</output>" in report
    assert "acts: output" in report
    assert "response: old" not in report


@pytest.mark.oracle
def test_plots_draw_the_numbers_of_the_files(tmp_path: Path) -> None:
    rows = [{"step": 3, "reward": 0.1}, {"step": 4, "reward": None}, {"step": 5, "reward": 0.3}]
    summary = {"search": {"16": {"accuracy": 0.9, "low": 0.8, "high": 1.0, "tokens": 5}}}
    summary["search"]["2"] = {"accuracy": 0.7, "low": 0.6, "high": 0.8, "tokens": 1}
    summary["maj@k"] = {"1": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "tokens": 2}}
    run = Run("r", Path(), rows, summary, {}, [], {}, [])
    figure = draw_curves([run], [("Reward", "", ("reward",)), ("KL", "", ("kl",))])
    assert figure is not None
    assert len(figure.axes) == 1  # no run has a KL
    (line,) = figure.axes[0].get_lines()
    assert line.get_xydata().tolist() == [[3, 0.1], [5, 0.3]]
    searched = draw_search([run])
    assert searched is not None
    over_simulations, over_tokens = searched.axes
    assert over_simulations.get_lines()[0].get_xydata().tolist() == [[2, 0.7], [16, 0.9]]
    found = [line.get_xydata().tolist() for line in over_tokens.get_lines()]
    assert found == [[[1, 0.7], [5, 0.9]], [[2, 0.5]]]


def test_the_command_names_runs_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = rl_run(tmp_path / "a/rl", 3), rl_run(tmp_path / "b/rl", 3)
    main([str(one), str(two), "--out", str(tmp_path / "both")])
    assert capsys.readouterr().out == f"{tmp_path / 'both/report.md'}\n"
    assert f"# {one}, {two}" in (tmp_path / "both/report.md").read_text()
    result = subprocess.run(
        [sys.executable, "tools/report.py", str(tmp_path / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert (
        result.stderr
        == f"error: run directory {tmp_path / 'none'} does not exist; check the path.\n"
    )
