"""Strict reading of `script.py config.yaml key=value …` into a config dataclass.

An unknown key, a wrong type or an impossible combination ends in one line and exit code 2, before
anything heavy is imported.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from rftt.types import UserError

C = TypeVar("C")

MAY_BE_ZERO = (
    *("seed", "eval_steps", "save_steps", "save_total_limit", "num_samples"),
    *("min_shared_steps", "resample_rounds", "max_plain_paths", "max_direct_sentences", "n_guard"),
    *("min_row_tokens", "port"),
)
"""Every other whole number counts something of which there must be one at least."""
OUT_OF_MEMORY = ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory")
"""What torch says, which is not imported here."""
STOPPED = 128 + signal.SIGTERM
"""Exit code of a script that SIGTERM has stopped; started again, it goes on."""
FREE_TO_CHANGE = (
    *("device", "problems_in_flight", "max_num_seqs", "gpu_memory_utilization"),
    *("max_tokens_per_microbatch", "gradient_checkpointing", "fsdp_cpu_offload", "report_to"),
    *("save_steps", "save_total_limit", "eval_steps", "max_eval_problems"),
    *("api_key_env", "api_max_tokens", "api_max_cost", "api_prompt_price", "api_completion_price"),
    *("api_max_concurrent", "api_timeout_s", "api_attempts"),
    *("max_generated_tokens", "resume_from_checkpoint", "overwrite_output_dir", "output_dir"),
    *("prm_url", "prm_timeout_s", "prm_tries", "prm_max_concurrency", "prm_max_tokens_per_batch"),
    "iterations",
)
"""Keys that a continued run may change: place, budget, speed and what it shows, not results."""


def load_config(schema: type[C], argv: Sequence[str]) -> C:
    """`[file.yaml] key=value …` -> a checked `schema`. Raises UserError on anything unexpected."""
    values = given(argv)
    known = {f.name: f for f in fields(schema)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(schema)
    checked: dict[str, Any] = {}
    for key, (value, where) in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise UserError(f"config: unknown key {key!r} ({where}). Did you mean {near[0]!r}?")
        checked[key] = _check(key, value, hints[key], where)
        if type(checked[key]) is int and checked[key] < (0 if key in MAY_BE_ZERO else 1):
            raise UserError(f"config: {key}={value} is too small ({where}).")
    missing = [name for name, f in known.items() if name not in checked and is_required(f)]
    if missing:
        raise UserError(
            f"config: {missing[0]} is not set; add it to the file or as {missing[0]}=…."
        )
    return schema(**checked)


def given(argv: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """key -> (value, where it was set) of a file and what follows it; later ones win."""
    values: dict[str, tuple[Any, str]] = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        group, dot, name = key.partition(".")
        inside, _ = values.get(group, ({}, ""))
        if equals and dot and isinstance(inside, dict):  # train.learning_rate=1e-3
            values[group] = (inside | {name: _yaml_value(text)}, "on the command line")
        elif equals:
            values[key] = (_yaml_value(text), "on the command line")
        else:
            values |= _read_yaml(argument)
    return values


def cli(main: Callable[[C], None], schema: type[C], argv: Sequence[str] | None = None) -> None:
    """Run a script: `--help` lists the fields; a UserError becomes one line and exit code 2.

    So does memory that runs out. SIGTERM ends the script at once (what is in a journal is done),
    unless it has called `stop_on_sigterm`.
    """
    # Before torch and transformers are imported: no bars for files, no notes on NUMA.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(describe(schema))
        raise SystemExit(0 if argv else 2)
    asked = threading.Event()

    def exit_now(_signal: int, _frame: object) -> None:
        asked.set()
        raise SystemExit(STOPPED)

    signal.signal(signal.SIGTERM, exit_now)
    try:
        config = load_config(schema, argv)
        if (
            getattr(config, "dtype", None) == "auto"
        ):  # torch is imported only for a config that is good
            from rftt.run.precision import settle_dtype

            config = settle_dtype(config)
        main(config)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except BaseException as error:
        if asked.is_set():  # libraries wrap what a handler raises (torch's CheckpointException)
            raise SystemExit(STOPPED) from None
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            reason = " ".join(str(error).split())[:200]
            sys.stderr.write(
                "error: not enough memory; set gradient_checkpointing or fsdp_cpu_offload: true, "
                "or a smaller max_tokens_per_microbatch or max_num_seqs, and see tools/doctor.py "
                f"({reason}).\n"
            )
            raise SystemExit(2) from None
        raise


def stop_on_sigterm() -> threading.Event:
    """From now on SIGTERM only sets this event: a loop ends after its step, with a checkpoint."""
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return asked


def load_function(key: str, name: str) -> Callable[..., object]:
    """The user's own `module:function`, importable from here, that the config names under `key`."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}={name} is no module:function ({error}).") from error
    if not callable(function):
        raise UserError(f"{key}={name} is a {type(function).__name__}, not a function.")
    return function


def check_same_run(config_file: Path, config: dict[str, Any]) -> None:
    """Refuse to continue a run directory with settings that would mix two experiments in it."""
    import yaml

    if not config_file.exists():
        return
    before = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    for key, value in config.items():
        if key not in FREE_TO_CHANGE and key in before and before[key] != value:
            raise UserError(
                f"{config_file.parent} was begun with {key}={before[key]!r}, now it is {value!r}; "
                "use a new output_dir."
            )


def describe(schema: type) -> str:
    """The help text: every field with its type, default and docstring."""
    hints = typing.get_type_hints(schema)
    known = {f.name: f for f in fields(schema)}
    lines = [f"{schema.__doc__}\n", "usage: python SCRIPT.py config.yaml [key=value …]\n"]
    for base in reversed(schema.__mro__[:-1]):
        for name, doc in field_docs(base).items():
            default = "required" if is_required(known[name]) else repr(_default(known[name]))
            lines.append(f"{name}: {_type_name(hints[name])} = {default}\n    {doc}")
    return "\n".join(lines) + "\n"


def field_docs(schema: type) -> dict[str, str]:
    """name -> docstring of the fields that `schema` itself declares."""
    tree = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(tree, ast.ClassDef), "a dataclass is a class"
    docs: dict[str, str] = {}
    for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_doc = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            docs[statement.target.id] = str(following.value.value) if is_doc else ""  # type: ignore[union-attr]
    return docs


def _read_yaml(path: str) -> dict[str, tuple[Any, str]]:
    import yaml

    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist.")
    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path} does not hold `key: value` lines.")
    construct = yaml.SafeLoader("").construct_object
    values: dict[str, tuple[Any, str]] = {}
    for key, value in node.value:
        where = f"{path} line {key.start_mark.line + 1}"
        if key.value in values:
            raise UserError(f"config: {key.value} is set twice ({values[key.value][1]}, {where}).")
        values[key.value] = (construct(value, deep=True), where)
    return values


def _yaml_value(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # "Answer: use: x" is a sentence


def _check(key: str, value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or a UserError naming what is allowed."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _check(key, value, choices[0], where)
    if origin is Literal:
        if value not in choices:
            allowed = ", ".join(map(str, choices))
            raise UserError(f"config: {key}={value!r} is not one of {allowed} ({where}).")
        return value
    if origin is dict and isinstance(value, dict):
        return value
    if origin is list and isinstance(value, list):
        return [_check(key, item, choices[0], where) for item in value]
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-6 as a string
        except ValueError:
            pass
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if type(value) is hint:
        return value
    raise UserError(f"config: {key}={value!r} is not a {_type_name(hint)} ({where}).")


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def is_required(f: Any) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _default(f: Any) -> Any:
    return f.default_factory() if f.default is MISSING else f.default
