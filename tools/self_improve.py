"""Improve a model with its own samples: generate, score, filter, train, evaluate (ms-swift's RFT).

    python tools/self_improve.py configs/tiny/self_improve.yaml [key=value …] [train.loss=dpo …]

Each step runs one of the other scripts in its own process, with its own config file and overrides.
Every model is evaluated on a target set and on guard sets. The best one on the target set is kept
unless a guard set has dropped too far. Models are never deleted. Output is iteration_<n>/<step>/
(0 is the evaluation of the base model), table.md and best.json in output_dir.

An interrupted loop continues: finished steps are in steps.jsonl with digests of what they were made
from, an unfinished script resumes by itself, and all decisions of the loop depend on the
evaluations only.
"""

from __future__ import annotations

import ast
import json
import operator
import os
import subprocess
import sys
import typing
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

from pydantic import model_validator

sys.path.insert(0, str(Path(__file__).parents[1]))
from rftt.run.cli import check_same_run, cli
from rftt.run.config import (
    RUNTIME_KEYS,
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
from rftt.run.files import Journal, Row, read_jsonl, write_json
from rftt.run.provenance import MadeFrom, data_digest, digest, model_digest
from rftt.run.stats import mean_ci, paired_bootstrap
from rftt.run.tables import name_of
from rftt.types import UserError


@config_class
class LoopConfig:
    """tools/self_improve.py: generate, score, filter, train, evaluate, N times (ms-swift's RFT)."""

    output_dir: Runtime[LocalPath]
    """Run directory with one folder per step."""
    model_name_or_path: LocalPath
    """Base model, with which the first iteration starts."""
    seed: Seed = 0
    """Seed. Iteration n samples and trains with seed + n, unless a step sets another one."""
    iterations: Runtime[Count] = 3
    """Number of iterations. A finished loop may be continued with more."""
    iterate_from: Literal["base", "last", "last_full_state"] = "base"
    """Model to train: the base model, the last model, or the last model with its optimizer's
    moments. The last model always generates (ms-swift's RFT)."""
    search: dict[str, Any]
    """Keys of search.py. `config` names its file. In every step a number may be an expression of
    iter, the number of finished iterations: `temperature: 0.7 + 0.1*iter`."""
    train: dict[str, Any]
    """Keys of train_sft.py."""
    evaluate: dict[str, Any]
    """Keys of evaluate.py."""
    target_file: LocalPath
    """Problems whose accuracy decides which model is the best."""
    guard_files: list[LocalPath] = field(default_factory=list)
    """Problems of other kinds, whose accuracy should not drop."""
    metric: Literal["greedy", "sampled"] = "greedy"
    """Accuracy of the greedy response, or the mean over num_samples samples."""
    guard_max_drop: Share = 0.02
    """Largest drop below the base model on a guard set with which a model may be the best."""
    on_guard_drop: Literal["warn", "stop", "roll_back"] = "warn"
    """Reaction to a larger drop: continue from this model, end the loop, or continue from the best
    model so far."""
    launch: list[str] = field(default_factory=list)
    """Command that replaces python for each script, such as [torchrun, --nproc_per_node, "8"]."""

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [Path(file).stem for file in (self.target_file, *self.guard_files)]
        if len(names) > len(set(names)):
            raise UserError(
                f"target_file and guard_files must have distinct names, got {names}; rename a file."
            )
        return self


STEPS: dict[str, tuple[str, type, tuple[str, ...]]] = {
    "search": ("search.py", SearchConfig, ()),
    "train": ("train_sft.py", SFTConfig, ("train_file", "initial_state")),
    "evaluate": ("evaluate.py", EvalConfig, ("eval_file",)),
}
"""Name of a step in LoopConfig -> its script, its config class, and the keys that the loop sets."""
MODELS = ("model_name_or_path", "prm_model_name_or_path", "initial_state")
FILES = (
    *("train_file", "eval_file", "mix_file", "raw_file", "prompts_file", "prm_check_file"),
    "chat_template",
)
"""Keys of scripts with a model or checkpoint, and those with a file."""
NUMBERS = (int, float, int | None, float | None)
Run = Callable[[int, str, str, dict[str, Any]], Path]
"""(iteration, step, name of its folder, keys that the loop sets) -> its folder, after its end."""


@dataclass(frozen=True)
class Round:
    """The model of an iteration and its accuracies. Iteration 0 is the base model."""

    iteration: int
    model: str
    state: str | None
    """Last checkpoint of its training, from which `iterate_from: last_full_state` continues."""
    rows: int
    """Number of training rows of its iteration."""
    scores: dict[str, list[float]]
    """set -> accuracy on each of its problems, in the order of their ids."""


def main(cfg: LoopConfig) -> None:
    """Run all iterations that are not finished, and write table.md and best.json after each."""
    from rftt.run.log import RunLog, lock_file, make_run_dir, say

    out = Path(cfg.output_dir)
    check_same_run(out / "config.yaml", asdict(cfg))
    check_steps(cfg)
    make_run_dir(out)
    # Steps inherit the lock. If a step outlives a killed loop, the next loop waits for it and does
    # not start it twice. Without locks the log warns of this.
    try:
        lock = lock_file(out / "lock")
    except BlockingIOError:
        say(f"waiting for a step that still runs in {out}")
        lock = lock_file(out / "lock", wait=True)
    with lock or nullcontext():
        log = RunLog(out, asdict(cfg), enabled=True)
        done = Journal(out / "steps.jsonl")

        def run(n: int, step: str, name: str, chosen: dict[str, Any]) -> Path:
            folder = out / f"iteration_{n}" / name
            try:
                digests = made_from(cfg, step, n, chosen)
            except UserError as error:  # such as a missing file
                raise UserError(f"iteration {n}: {name}: {error}") from error
            row = {"iteration": n, "step": name, "made_from": digests}
            if not is_done(row, done):
                log.info(f"== iteration {n} of {cfg.iterations}: {name}")
                script = Path(__file__).parents[1] / STEPS[step][0]
                own = arguments(cfg, step, n, chosen | {"output_dir": str(folder)})
                command = [*(cfg.launch or [sys.executable]), str(script), *own]
                code = subprocess.run(command, pass_fds=[lock.fileno()] if lock else []).returncode
                if code:
                    raise UserError(
                        f"iteration {n}: {name} ended with code {code}; correct the error above "
                        "and start the loop again."
                    )
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
    """Run iteration n after those in `rounds`. Iteration 0 only evaluates the base model."""
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
        rows.sort(key=lambda row: row["id"])  # the file is in order of completion
        if cfg.metric == "greedy":
            scores[name] = [float(row["greedy"]["correct"]) for row in rows]
        else:
            scores[name] = [fmean(s["correct"] for s in row["samples"]) for row in rows]
    return Round(n, model, state, n_rows, scores)


# ---- Finished steps ----


def is_done(row: Row, done: Journal) -> bool:
    """Return whether a step is finished. Raises UserError if it was made from other inputs."""
    for before in done.rows:
        if (before["iteration"], before["step"]) != (row["iteration"], row["step"]):
            continue
        digests = before.get("made_from", {})
        changed = [name for name, value in row["made_from"].items() if digests.get(name) != value]
        if changed:
            raise UserError(
                f"{done.path}: {row['step']} of iteration {row['iteration']} was made from other "
                f"{' and '.join(changed)} than these; use a new output_dir."
            )
        return True
    return False


def made_from(cfg: LoopConfig, step: str, n: int, chosen: dict[str, Any]) -> MadeFrom:
    """Return the digests of a step's inputs: settings, data files and models.

    Paths do not count as settings, so that a loop's folder may be moved.
    """
    line = arguments(cfg, step, n, chosen | {"output_dir": "-"})
    keys = asdict(load_config(STEPS[step][1], line))
    models = [keys[key] for key in MODELS if keys.get(key) and (key in chosen or keys["use_prm"])]
    data = [keys[key] for key in FILES if keys.get(key)]
    settings = {k: v for k, v in keys.items() if k not in {*RUNTIME_KEYS, *MODELS, *FILES}}
    return {
        "settings": digest([json.dumps(settings, sort_keys=True)]),
        "data": digest(map(data_digest, data)),
        "weights": digest(map(model_digest, models)),
    }


# ---- Settings of a step ----


def own_keys(cfg: LoopConfig, step: str) -> dict[str, Any]:
    """Return the keys that the user has set for a step."""
    return {"search": cfg.search, "train": cfg.train, "evaluate": cfg.evaluate}[step]


def arguments(cfg: LoopConfig, step: str, n: int, chosen: dict[str, Any]) -> list[str]:
    """Return the arguments of a step in iteration n: config file, keys, and keys of the loop.

    Expressions are evaluated.
    """
    hints = typing.get_type_hints(STEPS[step][1])
    keys: dict[str, Any] = {"seed": cfg.seed + (n if step != "evaluate" else 0)}
    keys |= own_keys(cfg, step) | chosen
    line = [os.path.expanduser(str(keys.pop("config")))] if "config" in keys else []
    for key, value in keys.items():
        if isinstance(value, str) and hints.get(key) in NUMBERS:
            value = value_at(f"{step}.{key}", value, max(0, n - 1))
        # Text is taken literally by the script; everything else is written as JSON.
        line.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    return line


def settings(cfg: LoopConfig, step: str, n: int) -> Any:
    """Return the checked config of a step in iteration n, with dummies for keys of the loop."""
    _, schema, files = STEPS[step]
    ours = dict.fromkeys(("output_dir", "model_name_or_path", *files), "-")
    if both := ours.keys() & own_keys(cfg, step).keys():
        raise UserError(f"{step}.{min(both)} must not be set, because the loop sets it; remove it.")
    try:
        return load_config(schema, arguments(cfg, step, n, ours))
    except UserError as error:
        raise UserError(f"{step}, iteration {n}: {error}") from error


def check_steps(cfg: LoopConfig) -> None:
    """Check the config of every step in every iteration, before the first one starts."""
    for n in range(1, cfg.iterations + 1):
        found = {step: settings(cfg, step, n) for step in STEPS}
        if cfg.metric == "sampled" and found["evaluate"].num_samples == 0:
            raise UserError("metric=sampled needs evaluate.num_samples of at least 1, got 0.")


# ---- Numbers that change from one iteration to the next ----

MAX_LENGTH, MAX_VALUE, MAX_EXPONENT = 100, 1e15, 64
"""Bounds on the characters of an expression, on every intermediate value, and on exponents."""
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
    """Return the value of the expression `text` for `key`, with `iter` equal to `iteration`.

    The text is parsed and evaluated within the bounds above, and never executed as code.
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


# ---- The best model and the table ----


def fallen_guards(cfg: LoopConfig, base: Round, now: Round) -> list[str]:
    """Return the guard sets on which `now` is more than guard_max_drop below the base model."""
    names = [Path(file).stem for file in cfg.guard_files]
    lost = {name: fmean(base.scores[name]) - fmean(now.scores[name]) for name in names}
    rounding = 1e-9  # 270 of 300, then 264, is a drop of exactly 0.02, which is allowed
    return [name for name in names if lost[name] > cfg.guard_max_drop + rounding]


def best_of(cfg: LoopConfig, rounds: list[Round]) -> Round:
    """Return the best round on the target set whose guard sets have not dropped too far.

    Among equals it is the first one.
    """
    kept = [now for now in rounds if not fallen_guards(cfg, rounds[0], now)]
    return max(kept, key=lambda now: fmean(now.scores[Path(cfg.target_file).stem]))


def rounds_table(cfg: LoopConfig, rounds: list[Round]) -> str:
    """Return a Markdown table of every model's accuracy and its change from the base model.

    Both are in per cent with 95 % intervals over problems. The change is paired.
    """

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
