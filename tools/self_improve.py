"""The self-improvement loop of ms-swift's RFT: generate, score, filter, train, evaluate, N times.

    python tools/self_improve.py configs/tiny/self_improve.yaml [key=value …] [train.loss=dpo …]

A step is one of the other scripts in a process of its own, with its own config file and overrides:
what they can do, the loop can. Every model is evaluated on a target set and on guard sets; the best
on the target is kept unless a guard set has fallen too far. Writes iteration_<n>/<step>/ (0 is the
base model's evaluation), table.md and best.json below output_dir. Interrupted anywhere, it goes on:
finished steps are in steps.jsonl, a script begun continues by itself, and all that the loop decides
is a function of the evaluations. Models are named, never deleted.
"""

from __future__ import annotations

import ast
import fcntl
import json
import operator
import subprocess
import sys
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

from pydantic import model_validator

sys.path.insert(0, str(Path(__file__).parents[1]))
from rftt.run.cli import check_same_run, cli
from rftt.run.config import (
    Count,
    EvalConfig,
    LocalPath,
    Runtime,
    SearchConfig,
    Seed,
    SFTConfig,
    Share,
    config_class,
    load_config,
)
from rftt.run.files import Journal, read_jsonl, write_json
from rftt.run.stats import mean_ci, paired_bootstrap
from rftt.run.tables import name_of
from rftt.types import UserError


@config_class
class LoopConfig:
    """tools/self_improve.py: generate, score, filter, train, evaluate, N times (ms-swift's RFT)."""

    output_dir: Runtime[LocalPath]
    """Run directory; every step has a folder of its own below it."""
    model_name_or_path: LocalPath
    """The base model: where the first iteration begins."""
    seed: Seed = 0
    """Iteration n samples and trains with seed + n, unless a step sets its own."""
    iterations: Runtime[Count] = 3
    """Rounds of generating and training; a finished loop may be continued with more."""
    iterate_from: Literal["base", "last", "last_full_state"] = "base"
    """What is trained: the base anew, the last model, or that with its optimizer's moments. What
    generates is always the last model (ms-swift's RFT)."""
    search: dict[str, Any]
    """Keys of search.py, with `config` naming its file. In every step any number may be an
    expression of iter, the number of finished iterations: `temperature: 0.7 + 0.1*iter`."""
    train: dict[str, Any]
    """Keys of train_sft.py."""
    evaluate: dict[str, Any]
    """Keys of evaluate.py."""
    target_file: LocalPath
    """Problems whose accuracy decides which model is best."""
    guard_files: list[LocalPath] = field(default_factory=list)
    """Problems of other kinds, on which training should cost nothing."""
    metric: Literal["greedy", "sampled"] = "greedy"
    """Accuracy of the likeliest response, or the mean over num_samples samples."""
    guard_max_drop: Share = 0.02
    """A model more than this share below the base on any guard set is not kept as the best."""
    on_guard_drop: Literal["warn", "stop", "roll_back"] = "warn"
    """And then: go on from it, end the loop, or go on from the best model so far."""
    launch: list[str] = field(default_factory=list)
    """What starts each script instead of python, such as [torchrun, --nproc_per_node, "8"]."""

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [Path(file).stem for file in (self.target_file, *self.guard_files)]
        if len(names) > len(set(names)):
            raise UserError(f"target_file and guard_files need distinct names, not {names}.")
        return self


STEPS: dict[str, tuple[str, type, tuple[str, ...]]] = {
    "search": ("search.py", SearchConfig, ()),
    "train": ("train_sft.py", SFTConfig, ("train_file", "initial_state")),
    "evaluate": ("evaluate.py", EvalConfig, ("eval_file",)),
}
"""Step, as LoopConfig names it -> its script, what that reads, and the files that the loop sets."""
NUMBERS = (int, float, int | None, float | None)
Run = Callable[[int, str, str, dict[str, Any]], Path]
"""(iteration, step, name of its folder, keys that the loop sets) -> its folder, work done."""


@dataclass(frozen=True)
class Round:
    """A model and its accuracy: of iteration 1, 2, … or, as 0, of the base."""

    iteration: int
    model: str
    state: str | None
    """Its last checkpoint: what `iterate_from: last_full_state` goes on from."""
    rows: int
    """Training rows it has seen in its iteration."""
    scores: dict[str, list[float]]
    """set -> accuracy on each of its problems, in the order of their ids."""


def main(cfg: LoopConfig) -> None:
    from rftt.run.log import RunLog, say

    out = Path(cfg.output_dir)
    check_same_run(out / "config.yaml", asdict(cfg))
    check_steps(cfg)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        # Steps inherit it: one that has outlived a killed loop is waited for, not started twice.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for what still runs in {out}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        log = RunLog(out, asdict(cfg), enabled=True)
        done = Journal(out / "steps.jsonl")

        def run(n: int, step: str, name: str, chosen: dict[str, Any]) -> Path:
            folder = out / f"iteration_{n}" / name
            row = {"iteration": n, "step": name}
            if row not in done.rows:
                log.info(f"== iteration {n} of {cfg.iterations}: {name}")
                script = Path(__file__).parents[1] / STEPS[step][0]
                own = arguments(cfg, step, n, chosen | {"output_dir": str(folder)})
                command = [*(cfg.launch or [sys.executable]), str(script), *own]
                code = subprocess.run(command, pass_fds=[lock.fileno()]).returncode
                if code:
                    raise UserError(f"iteration {n}: {name} ended with code {code}; see above.")
                done.append(row)
            return folder

        rounds = [iterate(cfg, run, 0, [])]
        while rounds[-1].iteration < cfg.iterations:
            rounds.append(iterate(cfg, run, len(rounds), rounds))
            best, text = best_of(cfg, rounds), rounds_table(cfg, rounds)
            (out / "table.md").write_text(text + "\n", encoding="utf-8")
            accuracy = {name: fmean(scores) for name, scores in best.scores.items()}
            found = {"iteration": best.iteration, "model": best.model, "accuracy": accuracy}
            write_json(out / "best.json", found)
            log.info(f"{text}\nbest: iteration {best.iteration}, {best.model}")
            if fallen := fallen_guards(cfg, rounds[0], rounds[-1]):
                fell = f"{', '.join(fallen)} fell by more than {cfg.guard_max_drop}"
                log.info(f"iteration {rounds[-1].iteration}: {fell}: {cfg.on_guard_drop}")
                if cfg.on_guard_drop == "stop":
                    break


def iterate(cfg: LoopConfig, run: Run, n: int, rounds: list[Round]) -> Round:
    """One iteration after those in `rounds`; 0 only evaluates the base model."""
    model, state, n_rows = cfg.model_name_or_path, None, 0
    if n:
        rolled = cfg.on_guard_drop == "roll_back" and fallen_guards(cfg, rounds[0], rounds[-1])
        last = best_of(cfg, rounds) if rolled else rounds[-1]
        data = run(n, "search", "search", {"model_name_or_path": last.model})
        train_file = data / "data" / f"{settings(cfg, 'train', n).loss}.jsonl"
        n_rows = len(read_jsonl(train_file))
        start = model if cfg.iterate_from == "base" else last.model
        state = last.state if cfg.iterate_from == "last_full_state" else None
        chosen = {"model_name_or_path": start, "train_file": str(train_file)}
        trained = run(n, "train", "train", chosen | {"initial_state": state})
        model = str(trained / "hf")
        state = str(max(trained.glob("checkpoints/step_*/COMPLETE")).parent)
    scores = {}
    for file in (cfg.target_file, *cfg.guard_files):
        chosen = {"model_name_or_path": model, "eval_file": file}
        name = name_of(file)
        folder = run(n, "evaluate", f"eval-{name}", chosen)
        rows = [row for _, row in read_jsonl(folder / "eval" / f"{name}.jsonl")]
        rows.sort(key=lambda row: row["id"])  # they were written as they finished
        if cfg.metric == "greedy":
            scores[name] = [float(row["greedy"]["correct"]) for row in rows]
        else:
            scores[name] = [fmean(s["correct"] for s in row["samples"]) for row in rows]
    return Round(n, model, state, n_rows, scores)


# ---- Settings of a step ----


def own_keys(cfg: LoopConfig, step: str) -> dict[str, Any]:
    return {"search": cfg.search, "train": cfg.train, "evaluate": cfg.evaluate}[step]


def arguments(cfg: LoopConfig, step: str, n: int, chosen: dict[str, Any]) -> list[str]:
    """Return the command line of a step in iteration n: its file, its keys with expressions
    evaluated, and what the loop itself sets."""
    hints = typing.get_type_hints(STEPS[step][1])
    keys: dict[str, Any] = {"seed": cfg.seed + (n if step != "evaluate" else 0)}
    keys |= own_keys(cfg, step) | chosen
    line = [str(keys.pop("config"))] if "config" in keys else []
    for key, value in keys.items():
        if isinstance(value, str) and hints.get(key) in NUMBERS:
            value = value_at(f"{step}.{key}", value, max(0, n - 1))
        # Text is taken literally by the script; everything else is written as JSON.
        line.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    return line


def settings(cfg: LoopConfig, step: str, n: int) -> Any:
    """Return a step of iteration n as its script reads it, without the keys that the loop sets."""
    _, schema, files = STEPS[step]
    ours = dict.fromkeys(("output_dir", "model_name_or_path", *files), "-")
    if both := ours.keys() & own_keys(cfg, step).keys():
        raise UserError(f"{step}.{min(both)}: the loop itself sets it; leave it out.")
    try:
        return load_config(schema, arguments(cfg, step, n, ours))
    except UserError as error:
        raise UserError(f"{step}, iteration {n}: {error}") from error


def check_steps(cfg: LoopConfig) -> None:
    """Read every step of every iteration, before hours are spent on it."""
    for n in range(1, cfg.iterations + 1):
        found = {step: settings(cfg, step, n) for step in STEPS}
        if cfg.metric == "sampled" and found["evaluate"].num_samples == 0:
            raise UserError("metric=sampled needs evaluate.num_samples of at least 1.")


# ---- Numbers that change from one iteration to the next ----

MAX_LENGTH, MAX_VALUE, MAX_EXPONENT = 100, 1e15, 64
"""Characters of an expression, size of every intermediate value, exponent of **."""
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
FUNCTIONS: dict[str, Callable[[list[Any]], Any]] = {"min": min, "max": max}


def value_at(key: str, text: str, iteration: int) -> float:
    """Return the value of the expression `text`, set for `key`, when `iter` is `iteration`.

    Nothing is executed: the parsed text is walked, and all bounds above hold on the way.
    """
    try:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"it is longer than {MAX_LENGTH} characters")
        return _value(ast.parse(text.strip(), mode="eval").body, iteration)
    except SyntaxError:
        reason = "it does not parse"
    except (ValueError, ArithmeticError) as error:
        reason = str(error)
    raise UserError(
        f"{key}: {text!r} must be a number or an expression of iter ({reason}); write numbers, "
        "+ - * / // % **, min(…), max(…) and iter, as in min(0.7 + 0.1*iter, 0.9)."
    )


def _value(node: ast.expr, iteration: int) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            result = value
        case ast.Name(id="iter"):
            result = iteration
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            result = -_value(operand, iteration)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            a, b = _value(left, iteration), _value(right, iteration)
            if isinstance(op, ast.Pow) and abs(b) > MAX_EXPONENT:
                raise ValueError(f"{a} ** {b} is out of bounds")
            result = OPERATORS[type(op)](a, b)
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if (
            name in FUNCTIONS
        ):
            result = FUNCTIONS[name]([_value(arg, iteration) for arg in args])
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not supported")
    if isinstance(result, complex) or not abs(result) <= MAX_VALUE:  # NaN compares as False
        raise ValueError(f"{ast.unparse(node)!r} is out of bounds")
    return result


# ---- What is kept, and what is shown ----


def fallen_guards(cfg: LoopConfig, base: Round, now: Round) -> list[str]:
    """Guard sets on which `now` is more than guard_max_drop below the base model."""
    names = [Path(file).stem for file in cfg.guard_files]
    lost = {name: fmean(base.scores[name]) - fmean(now.scores[name]) for name in names}
    rounding = 1e-9  # 270 right of 300, then 264, is a drop of 0.02 and not of more
    return [name for name in names if lost[name] > cfg.guard_max_drop + rounding]


def best_of(cfg: LoopConfig, rounds: list[Round]) -> Round:
    """The best on the target set among those whose guard sets stand; the first of equals."""
    kept = [now for now in rounds if not fallen_guards(cfg, rounds[0], now)]
    return max(kept, key=lambda now: fmean(now.scores[Path(cfg.target_file).stem]))


def rounds_table(cfg: LoopConfig, rounds: list[Round]) -> str:
    """Markdown: accuracy of every model on every set, and its change since the base model, both in
    per cent with 95 % bootstrap intervals over problems (the change: paired)."""

    def figures(name: str, now: Round) -> str:
        scores, before = now.scores[name], rounds[0].scores[name]
        mean, low, high = (100 * x for x in mean_ci(scores, seed=cfg.seed))
        shown = f"{mean:.1f} [{low:.1f}, {high:.1f}]"
        change, low, high = (100 * x for x in paired_bootstrap(scores, before, seed=cfg.seed))
        return (
            f"{shown} | {change:+.1f} [{low:+.1f}, {high:+.1f}]" if now.iteration else f"{shown} |"
        )

    names = [Path(file).stem for file in (cfg.target_file, *cfg.guard_files)]
    lines = [
        f"| iteration | rows | {' | '.join(f'{name} % | change' for name in names)} | |",
        "|---|---|" + "---|---|" * len(names) + "---|",
    ]
    best = best_of(cfg, rounds)
    for now in rounds:
        note = "best" if now is best else ""
        note = "guard fell" if fallen_guards(cfg, rounds[0], now) else note
        cells = [str(now.iteration or "base"), str(now.rows or "")]
        lines.append(f"| {' | '.join([*cells, *(figures(n, now) for n in names), note])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli(main, LoopConfig)
