"""Measure the grader on real gold answers and hostile responses, optionally with Math-Verify.

    python bench/grader.py [--compare] [--data ../shared/data] [--seconds 20]

`--compare` needs math-verify in the same environment. Without it the comparison is skipped. Both
graders take turns on the same pairs, so that a busy machine slows both equally. A pair is a gold
answer with a respelling of itself, or with the next gold answer. The unit is pairs per CPU second.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rftt.graders.math import grade, parse_gold  # the path comes first

FIELDS = {
    "math500": "answer",
    "gsm8k_test": "answer",
    "olympiadbench": "final_answer",
    "aime24": "answer",
    "amc23": "answer",
}


def gold_pairs(data: Path) -> list[tuple[str, str]]:
    """Return (response, gold) pairs: respelt right answers, and the neighbour's wrong answers."""
    golds: list[str] = []
    for name, field in FIELDS.items():
        for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            value = json.loads(line)[field]
            golds.append(str(parse_gold(value[0] if isinstance(value, list) else str(value))))
    respelt = [gold.replace("\\frac", "\\dfrac").replace(" ", "") for gold in golds]
    neighbours = [*golds[1:], golds[0]]
    return [
        (f"So the answer is $\\boxed{{{answer.strip('$')}}}$.", gold)
        for gold, *answers in zip(golds, respelt, neighbours, strict=True)
        for answer in answers
    ]


def math_verify_grade() -> Callable[[str, str], bool]:
    """Return Math-Verify's grader. Raises ImportError if it is not installed."""
    from math_verify import parse, verify  # optional: only with --compare

    def judge(response: str, gold: str) -> bool:
        return bool(verify(parse(f"${gold.strip('$')}$"), parse(response)))

    return judge


def hostile_seconds(judge: Callable[[str, str], bool], data: Path) -> tuple[float, int]:
    """Return (CPU seconds of the slowest response, wrongly accepted ones) of the hostile list."""
    worst, paid = 0.0, 0
    for line in (data / "grader_hostile.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        begin = time.process_time()
        correct = judge("".join(text * times for text, times in row["recipe"]), row["gold"])
        worst = max(worst, time.process_time() - begin)
        paid += correct and row["expected"] == 0
    return worst, paid


def main() -> None:
    """Measure speed and hostile responses, and print one JSON object on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", action="store_true", help="also measure Math-Verify")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seconds", type=float, default=20, help="CPU seconds to spend")
    options = parser.parse_args()
    pairs = gold_pairs(options.data)
    judges = {"rftt": lambda response, gold: grade(response, gold).correct}
    skipped: dict[str, str] = {}
    if options.compare:
        try:
            judges["math-verify"] = math_verify_grade()
        except ImportError as error:
            skipped["math-verify"] = str(error)
            print(f"math-verify: skipped, {error}", file=sys.stderr)
    spent = dict.fromkeys(judges, 0.0)
    counted, step = 0, 7919  # a prime step visits the five sets evenly
    begin = time.process_time()
    while time.process_time() - begin < options.seconds and counted < len(pairs):
        response, gold = pairs[counted * step % len(pairs)]
        for name, judge in judges.items():
            start = time.process_time()
            judge(response, gold)
            spent[name] += time.process_time() - start
        counted += 1
    speed = {name: counted / max(seconds, 1e-9) for name, seconds in spent.items()}
    for name, rate in speed.items():
        print(f"{name}: {rate:.1f} pairs per CPU second", file=sys.stderr)
    if "math-verify" in speed:
        print(f"times faster: {speed['rftt'] / speed['math-verify']:.1f}", file=sys.stderr)
    worst, paid = hostile_seconds(judges["rftt"], options.data)
    print(json.dumps({"pairs": counted, "pairs_per_cpu_second": speed,
                      "hostile_max_s": worst, "hostile_wrong_pay": paid,
                      "skipped": skipped}))  # fmt: skip


if __name__ == "__main__":
    main()
