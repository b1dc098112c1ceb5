"""Test that no work is lost: a killed, stopped or disk-full script ends like an unbroken one.

    RFTT_KILLS=20 python -m pytest -q -s tests/test_faults.py

injects each fault 20 times instead of 3, into real processes (tests/zygote.py forks them) on random
models. After the last fault a run must end as an unbroken one does. What was finished before a
fault must not be repeated: a lost unit is a problem missing in the journal, or a step missing in a
checkpoint. The table at the end counts the injected faults and what they cost. `-m faults` also
selects the tests of damaged checkpoints and of servers that hang, drop or reply nonsense
(test_checkpoint.py, test_prm.py, test_openai.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rftt.run.files import read_jsonl, write_jsonl
from tests.conftest import ENV, HANG_LIMIT, ROOT, TORCHRUN, wait_until
from tests.small_world import make_world, settings

pytestmark = [pytest.mark.faults, pytest.mark.slow]
KILLS = int(os.environ.get("RFTT_KILLS", "3"))
MORE = {
    "search": ["max_problems=8", "problems_in_flight=2"],
    "evaluate": ["problems_in_flight=2", "num_samples=2"],
    "train_sft": ["train_file={rows}", "num_train_epochs=1", "save_steps=1", "eval_steps=2"],
    "train_rl": ["max_steps=4", "save_steps=1", "learning_rate=1e-2"],
}
TIMES: Counter[str] = Counter()
LOST: Counter[str] = Counter()
"""Fault -> times injected, units of work lost."""


@dataclass
class Zygote:
    """A process that runs scripts on the small world."""

    process: subprocess.Popen[str]
    world: Path

    def run(
        self,
        script: str,
        out: Path,
        *more: str,
        sig: int = 0,
        after: float = 0.0,
        began: str = "config.yaml",
        max_bytes: int = 0,
    ) -> tuple[int, float]:
        """(exit code or minus a signal, seconds) of one run into `out`."""
        rows = str(self.world / "rows.jsonl")
        mine = [argument.format(rows=rows) for argument in MORE[script]]
        order = {
            "script": f"{script}.py",
            "arguments": settings(script, self.world, out, *mine, *more),
            "log": f"{out}.stderr",
            "began": str(out / began),
            "after": after,
            "signal": sig,
            "max_bytes": max_bytes,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["seconds"]


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    world = make_world(tmp_path_factory.mktemp("world"))
    steps = [{"act": "next_step", "text": "2+3=5"}, {"act": "output", "text": "\\boxed{5}"}]
    questions = [row["problem"] for _, row in read_jsonl(world / "train.jsonl")]
    write_jsonl(world / "rows.jsonl", [{"question": q, "steps": steps} for q in questions])
    command = [sys.executable, str(ROOT / "tests/zygote.py")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV | {"PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    yield Zygote(process, world)
    process.communicate()
    lines = [f"{fault:58} {n:5} {LOST[fault]:9}" for fault, n in sorted(TIMES.items())]
    sys.stdout.write("\n".join(["", f"{'fault':58} times work lost", *lines, ""]))


@pytest.fixture(scope="module")
def unbroken(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, Any], float]]:
    """script -> (what an unbroken run leaves, seconds from its first file to its end)."""
    runs: dict[str, tuple[dict[str, Any], float]] = {}

    def get(script: str) -> tuple[dict[str, Any], float]:
        if script not in runs:
            out = tmp_path_factory.mktemp("unbroken") / script
            code, _ = zygote.run(script, out)
            assert code == 0, Path(f"{out}.stderr").read_text()
            last = max(path.stat().st_mtime for path in out.rglob("*"))
            runs[script] = left_by(script, out), last - (out / "env.json").stat().st_mtime
        return runs[script]

    return get


def left_by(script: str, out: Path) -> dict[str, Any]:
    """Return all results of a run, except seconds and the order in which problems ended."""
    if script == "search":
        trees = sorted(str(path.relative_to(out)) for path in out.glob("trees/*.json"))
        names = ["data/sft.jsonl", "stats.json", *trees]
        return {name: (out / name).read_text() for name in names}
    if script == "evaluate":
        rows = sorted((r for _, r in read_jsonl(out / "eval/train.jsonl")), key=lambda r: r["id"])
        for row in rows:  # log-probs are those of the batch, up to rounding
            for found in (row["greedy"], *row["samples"]):
                found["logprob"] = round(found["logprob"], 3)
        return {"rows": rows, "summary": json.loads((out / "eval/summary.json").read_text())}
    rows = [row for _, row in read_jsonl(out / "metrics.jsonl")]
    metrics = [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows]
    weights = hashlib.sha256((out / "hf/model.safetensors").read_bytes()).hexdigest()
    return {"metrics": metrics, "weights": weights}


def done_by(script: str, out: Path) -> set[str]:
    """Finished units of work: whole journal lines, or names of complete checkpoints."""
    journal = {"search": "data/raw.jsonl", "evaluate": "eval/train.jsonl"}.get(script)
    if journal:
        data = (out / journal).read_bytes() if (out / journal).exists() else b""
        return {line.decode() for line in data.split(b"\n")[:-1]}
    return {str(int(path.parent.name[5:])) for path in out.glob("checkpoints/step_*/COMPLETE")}


def note(fault: str, script: str, before: set[str], out: Path, times: int = 1) -> None:
    """Count the units that were finished before a fault and neither are there nor behind newer."""
    after = done_by(script, out)
    if script.startswith("train"):
        lost = max(0, max(map(int, before), default=0) - max(map(int, after), default=0))
    else:
        lost = len(before - after)
    TIMES[fault] += times
    LOST[fault] += lost
    assert lost == 0


@pytest.mark.parametrize("script", MORE)
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_ended_at_random_moments_a_script_ends_as_if_unbroken(
    script: str, sig: int, zygote: Zygote, unbroken: Any, tmp_path: Path
) -> None:
    whole, seconds = unbroken(script)
    fault = f"{signal.Signals(sig).name} at a random moment of {script}.py"
    random, n, runs = Random(f"{script} {sig}"), 0, 0
    while n < KILLS:
        out, before = tmp_path / f"run{runs}", set[str]()
        runs += 1
        assert runs < 20 * KILLS, "the script ends before it can be killed"
        while True:
            more = sig if n < KILLS else 0
            after = random.uniform(0, seconds) if random.random() < 0.9 else 0.0
            code, _ = zygote.run(script, out, sig=more, after=after)
            assert code in (0, -sig, 128 + sig), Path(f"{out}.stderr").read_text()
            note(fault, script, before, out, times=int(code != 0))
            before = done_by(script, out)
            if code == 0:
                break
            assert code == (-sig if sig == signal.SIGKILL else 128 + sig)
            n += 1
        assert left_by(script, out) == whole


@pytest.mark.cases
@pytest.mark.parametrize("script", ["train_sft", "train_rl"])
def test_a_disk_that_is_full_while_a_checkpoint_is_written(
    script: str, zygote: Zygote, unbroken: Any, tmp_path: Path
) -> None:
    """Every file ends at a random byte; what had been written before is still used."""
    whole, _ = unbroken(script)
    random, fault = Random(script), f"disk full in a checkpoint of {script}.py"
    for i in range(KILLS):
        out = tmp_path / str(i)
        code, _ = zygote.run(script, out, max_bytes=random.randint(4_000, 60_000))
        assert code == 2, Path(f"{out}.stderr").read_text()
        assert done_by(script, out) == set()
        code, _ = zygote.run(script, out, sig=signal.SIGTERM, began="checkpoints/latest")
        assert code == 128 + signal.SIGTERM
        before = done_by(script, out)
        code, _ = zygote.run(script, out, max_bytes=random.randint(4_000, 60_000))
        assert code == 2
        assert before
        note(fault, script, before, out, times=2)
        assert zygote.run(script, out)[0] == 0, Path(f"{out}.stderr").read_text()
        assert left_by(script, out) == whole


@pytest.mark.parametrize("script", ["search", "evaluate"])
def test_a_last_line_that_is_cut_off(
    script: str, zygote: Zygote, unbroken: Any, tmp_path: Path
) -> None:
    whole, _ = unbroken(script)
    random, out = Random(script), tmp_path / "run"
    assert zygote.run(script, out)[0] == 0
    journal = out / {"search": "data/raw.jsonl", "evaluate": "eval/train.jsonl"}[script]
    for _ in range(KILLS):
        data = journal.read_bytes()
        os.truncate(journal, random.randrange(len(data) // 2, len(data)))
        before = done_by(script, out)
        assert zygote.run(script, out)[0] == 0
        note(f"last line of {script}.py's journal cut off", script, before, out)
        assert left_by(script, out) == whole


@pytest.mark.dist
def test_a_rank_that_is_killed_under_torchrun(
    zygote: Zygote, unbroken: Any, tmp_path: Path
) -> None:
    """The other rank ends long before a collective times out. Two ranks started again end where one
    would.
    """
    metrics = unbroken("train_rl")[0]["metrics"]
    out = tmp_path / "two"
    arguments = settings("train_rl", zygote.world, out, *MORE["train_rl"])
    launch = [*TORCHRUN, "--nproc_per_node=2", "train_rl.py"]
    process = subprocess.Popen(
        [*launch, *arguments], cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_until(lambda: bool(done_by("train_rl", out)), process)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    process.communicate(timeout=HANG_LIMIT)  # shorter than a collective waits for a lost rank
    assert process.returncode != 0
    before = done_by("train_rl", out)
    subprocess.run([*launch, *arguments], cwd=ROOT, env=ENV, capture_output=True, check=True)
    note("a rank killed under torchrun", "train_rl", before, out)
    again = left_by("train_rl", out)["metrics"]
    assert [row["step"] for row in again] == list(range(4))
    for one, two in zip(metrics, again, strict=True):
        assert two["tokens_generated"] == one["tokens_generated"]
        assert two["policy_loss"] == pytest.approx(one["policy_loss"], abs=2e-4)
