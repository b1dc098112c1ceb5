"""Check that a run will work on this machine, before it costs hours.

    python tools/doctor.py config.yaml [key=value …]

Each check prints one line: ok, warn or fail, what was found, and how to correct it. A check is a
function that returns its finding. If it raises UserError, the check has failed. The last check runs
the script itself on one problem, in a temporary folder. The exit code is 1 if a check has failed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from rftt.engines import build_engine, vocabulary_size
from rftt.engines.chat import encode_chat, eos_id, open_tokenizer, reply_ends
from rftt.engines.vocabulary import check_free
from rftt.graders.math import grade
from rftt.prompts import question_messages
from rftt.run.cli import cli, recorded_config
from rftt.run.config import (
    EvalConfig,
    RLConfig,
    SearchConfig,
    SFTConfig,
    given,
    required_keys,
    specs,
)
from rftt.run.data import lengths_of, load_problems, read_rows
from rftt.run.files import one_line, read_jsonl, write_json
from rftt.run.log import say
from rftt.run.precision import computes_in_bfloat16
from rftt.run.tables import read_table
from rftt.tokens import add_function_tokens, function_ids
from rftt.types import UserError
from tools.memory import Config, adapter_size, complaint, details, estimate, gigabytes

ROOT = Path(__file__).parents[1]
SCRIPTS: dict[type, str] = {
    SearchConfig: "search.py",
    SFTConfig: "train_sft.py",
    RLConfig: "train_rl.py",
    EvalConfig: "evaluate.py",
}
FIGURES = ("loss", "accuracy", "reward", "response_length", "mismatch_kl", "grad_norm")
"""Metrics of the first step that are printed. All of them must be finite."""
USABLE_GPU = 0.92
"""Share of a GPU's memory that tensors can fill."""
MISMATCH = 0.01
"""Nats per token between engine and trainer above which their kernels or weights differ."""


class Finding(NamedTuple):
    """The result of a check."""

    found: str
    """Text of the line."""
    level: str = "ok"
    """ok, warn or fail"""


# ---- The checks ----


def versions(_cfg: Config) -> Finding:
    """Compare the installed versions with the pins of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").lower().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    have = {d.name.lower(): d.version.split("+")[0] for d in distributions()}
    off = [f"{n} {have.get(n)} instead of {pin}" for n, pin in pins.items() if have.get(n) != pin]
    if off:
        return Finding(f"{'; '.join(off)}: pip install -r requirements.txt", "warn")
    return Finding(f"Python {sys.version.split()[0]}, torch {have['torch']}, all as tested")


def device(cfg: Config) -> Finding:
    """Check that the device exists and computes in `dtype`."""
    import torch

    n = torch.cuda.device_count() if cfg.device != "cpu" else 0
    if cfg.device == "cuda" and not n:
        raise UserError("device=cuda is not available here; use auto or cpu.")
    if n and (missing := gpu_lacks(torch.cuda.get_device_capability())):
        raise UserError(missing)
    name = f"{n} x {torch.cuda.get_device_name()}" if n else f"{os.cpu_count()} CPUs"
    if cfg.dtype == "bfloat16" and not computes_in_bfloat16("cuda" if n else "cpu"):
        return Finding(f"{name} emulate bfloat16, about 100 times slower; set dtype: auto", "warn")
    return Finding(f"{name}, {cfg.dtype}")


def model(cfg: Config) -> Finding:
    """Open the model as the script will, with every check of docs/models.md."""
    import torch

    from rftt.engines.opened import check_savable
    from rftt.learner.check import check_backbone, check_policy
    from rftt.learner.model import load_critic, load_policy
    from rftt.learner.rows import add_function_rows

    path, trust = cfg.model_name_or_path, cfg.trust_remote_code
    if cfg.skip_model_check:
        return Finding("skip_model_check: true; nothing of the model is checked", "warn")
    tokenizer = open_tokenizer(cfg)
    if isinstance(cfg, SearchConfig) and cfg.engine == "api":
        return Finding("the model is behind api_url; its tokenizer is as it should be")
    trains = isinstance(cfg, SFTConfig | RLConfig)
    if trains:
        check_savable(path)
    adds = isinstance(cfg, SFTConfig) and cfg.functional_tokens
    new = add_function_tokens(tokenizer) if adds else []
    check_free(tokenizer, new)
    n_tokens = vocabulary_size(tokenizer)
    if trains:
        policy = load_policy(path, torch.float32, trust_remote_code=trust)
        add_function_rows(policy, tokenizer, new)
        check_policy(policy, n_tokens, tree=isinstance(cfg, RLConfig) and cfg.packing == "tree")
    if isinstance(cfg, RLConfig) and cfg.advantage_estimator == "ppo":
        check_backbone(load_critic(path, torch.float32, trust_remote_code=trust).backbone)
    if not isinstance(cfg, SFTConfig):
        build_engine(cfg, path, n_tokens).close()
    ends = tokenizer.convert_ids_to_tokens(list(reply_ends(tokenizer, path)))
    return Finding(f"weights, tokenizer and log-probs are the model's own; {ends} end a reply")


def gold_answers(cfg: Config) -> Finding:
    """Check that gold answers parse and that the grader accepts each of them as an answer."""
    assert not isinstance(cfg, SFTConfig), "the table says so"
    file = cfg.eval_file if isinstance(cfg, EvalConfig) else cfg.train_file
    file = (isinstance(cfg, SearchConfig) and cfg.raw_file) or file
    problems = load_problems(
        file, keys=(cfg.prompt_key, cfg.answer_key), system_prompt=cfg.system_prompt
    )
    odd = [p for p in problems[:500] if not grade(rf"\boxed{{{p.answer}}}", str(p.answer)).correct]
    if odd:
        told = f"{len(odd)} of the first 500 gold answers are not accepted as their own answer"
        return Finding(f"{told}, first {odd[0].id}: {odd[0].answer!r}; correct them", "warn")
    hashes = "####" in str(read_table(file)[0].row)
    if hashes and isinstance(cfg, EvalConfig) and cfg.answer_format == "boxed":
        return Finding("gold answers use GSM8K's '####'; set answer_format: auto", "warn")
    return Finding(f"{len(problems)} problems, 100 % of the gold answers parse")


def training_rows(cfg: SFTConfig) -> Finding:
    """Read the rows as train_sft.py does; none may be longer than the model's positions."""
    from rftt.engines.opened import check_rows, open_config

    tokenizer = open_tokenizer(cfg)
    if cfg.functional_tokens:
        add_function_tokens(tokenizer)
    rows, held_out, left_out = read_rows(cfg, tokenizer)
    lengths = lengths_of(rows + held_out)
    if not cfg.skip_model_check:
        path = cfg.model_name_or_path
        check_rows(path, open_config(path, trust_remote_code=cfg.trust_remote_code), lengths)
    told = f"{len(rows)} rows, {len(held_out)} held out, {left_out}"
    return Finding(f"{told}; at most {max(lengths)} tokens")


def delimiters(cfg: Config) -> Finding:
    """Check that there is one EOS token and that each functional token is a single id."""
    tokenizer = open_tokenizer(cfg)
    eos_id(tokenizer)
    explores = isinstance(cfg, RLConfig) and cfg.sampling_method != "normal"
    if explores or (isinstance(cfg, EvalConfig) and cfg.simulations):
        return Finding(f"{2 * len(function_ids(tokenizer).open)} delimiters, each a single id")
    return Finding(f"{len(tokenizer)} ids; functional tokens are not needed before training")


def prompts(cfg: Config) -> Finding:
    """Check for a doubled BOS, and that prompts have the same ids as in the training before."""

    def ids(own: Config) -> list[int]:
        return encode_chat(open_tokenizer(own), question_messages("1+1?", own.system_prompt))

    ours = ids(cfg)
    run = Path(cfg.model_name_or_path).parent  # of train_sft.py, whose hf/ this may be
    if not (run / "config.yaml").is_file():
        return Finding(f"{len(ours)} ids around a short question, no doubled BOS")
    before = recorded_config(run / "config.yaml")
    model, system_prompt = before.get("model_name_or_path"), before.get("system_prompt")
    at_hand = model if model and Path(model).is_dir() else cfg.model_name_or_path
    keys = ("chat_template", "template_date")
    template = {key: before.get(key) for key in keys} | {
        "chat_template_kwargs": before.get("chat_template_kwargs") or {}
    }
    trained = replace(cfg, model_name_or_path=at_hand, system_prompt=system_prompt, **template)
    if ids(trained) != ours:
        raise UserError(
            f"this run must use the same prompts as {run}, which trained its model, but they "
            f"differ; use system_prompt {system_prompt!r} and the chat template of {model}."
        )
    return Finding(f"no doubled BOS, the same ids as in {run}")


def process_rewards(cfg: SearchConfig | RLConfig | EvalConfig) -> Finding:
    """Check that the process reward model ranks a right solution above a wrong one."""
    from rftt.graders import build_prm
    from rftt.graders.prm import ranking_warning

    if (prm := build_prm(cfg)) is None:
        return Finding("no process reward model")
    try:
        warning = asyncio.run(ranking_warning(prm, cfg.prm_check_file))
    finally:
        prm.close()
    return Finding(warning, "fail") if warning else Finding("ranks right steps above wrong ones")


def memory(cfg: Config) -> Finding:
    """Compare the estimated memory of each phase with the device's."""
    import torch

    from rftt.learner.logprobs import CHUNK_LOGITS, KEPT_LOGITS

    gpu = torch.cuda.is_available() and cfg.device != "cpu"
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = torch.cuda.mem_get_info()[1] if gpu else available
    ranks = ranks_of(cfg)
    kind, gpu_bytes = ("cuda", available) if gpu else ("cpu", 0)
    logits = CHUNK_LOGITS[kind], KEPT_LOGITS[kind]
    model, n = model_of(cfg)
    phases = estimate(model, n, cfg, ranks=ranks, logits=logits, gpu_bytes=gpu_bytes)
    if not phases:
        return Finding("the model is behind api_url")
    # The rest is taken by the CUDA context, libraries and holes between tensors.
    usable = USABLE_GPU * available if gpu else available
    if problem := complaint(phases, usable, "cuda:0" if gpu else "cpu"):
        raise UserError(problem)
    told = "; ".join(f"{phase}: {details(parts)}" for phase, parts in phases.items())
    return Finding(f"{told} of {gigabytes(available)}")


def disk(cfg: Config) -> Finding:
    """Check the space for all kept checkpoints and two more: weights, moments, an export."""
    needed = 1e9
    if isinstance(cfg, SFTConfig | RLConfig):
        model, n = model_of(cfg)
        n_trained = adapter_size(model, cfg) if cfg.use_peft else n
        needed += (12 * n_trained + 4 * n) * (cfg.save_total_limit + 2)
    if (free := shutil.disk_usage(_existing(cfg.output_dir)).free) < needed:
        raise UserError(
            f"output_dir {cfg.output_dir} must have {gigabytes(needed)} free for checkpoints, got "
            f"{gigabytes(free)}; use another disk or a smaller save_total_limit."
        )
    return Finding(f"{gigabytes(free)} free, at most {gigabytes(needed)} needed")


def one_step(cfg: Config) -> Finding:
    """Run the script itself on one prompt: engine, grader and, in training, one step."""
    script, begin, ranks = SCRIPTS[type(cfg)], time.monotonic(), ranks_of(cfg)
    with TemporaryDirectory(dir=_existing(cfg.output_dir), prefix=".doctor-") as folder:
        small = asdict(cfg) | smallest(cfg, ranks) | {"output_dir": folder}
        write_json(f"{folder}/small.yaml", small)  # JSON is YAML
        command = [*launcher(ranks), str(ROOT / script), f"{folder}/small.yaml"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(
                f"{script} exits with {done.returncode}: {one_line(done.stderr[-300:], 300)}"
            )
        metrics = Path(folder, "metrics.jsonl")
        row = read_jsonl(metrics)[-1][1] if metrics.exists() and metrics.stat().st_size else {}
    figures = {key: row[key] for key in FIGURES if key in row}
    if None in figures.values():
        raise UserError(
            f"{script}: all metrics of the first step must be finite, got {figures}; set another "
            "dtype."
        )
    told = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
    if figures.get("mismatch_kl", 0.0) > MISMATCH:
        return Finding(f"engine and trainer disagree ({told}); try engine: hf", "warn")
    return Finding(f"{script} on one problem in {time.monotonic() - begin:.0f} s {told}")


# ---- Helpers of the checks ----


def model_of(cfg: Config) -> tuple[Any, int]:
    """Return the model's config and its number of parameters, without reading weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = cfg.trust_remote_code
    config = AutoConfig.from_pretrained(cfg.model_name_or_path, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    return config.get_text_config(), sum(parameter.numel() for parameter in model.parameters())


def gpu_lacks(capability: tuple[int, int]) -> str | None:
    """Return what this machine lacks for a GPU of this compute capability, or None."""
    if capability < (8, 0):
        found = ".".join(map(str, capability))
        return f"attention needs compute capability 8.0 (Ampere), got {found}; use device: cpu."
    if not (shutil.which("gcc") or shutil.which("cc")):
        return "Triton needs a C compiler, but neither gcc nor cc is installed; install one."
    return None


def ranks_of(cfg: Config) -> int:
    """Return the ranks of the run: WORLD_SIZE or GPUS (runs/recipe.sh), else one per GPU.

    engine=api is one process.
    """
    import torch

    if not isinstance(cfg, SFTConfig) and cfg.engine == "api":
        return 1
    gpus = torch.cuda.device_count() if cfg.device != "cpu" else 0
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("GPUS") or max(gpus, 1))


def launcher(ranks: int) -> list[str]:
    """Return the start of a command that runs a script on this number of ranks."""
    if ranks == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={ranks}"]


def smallest(cfg: Config, ranks: int) -> dict[str, Any]:
    """Return settings with which `cfg` ends after one problem or step on each rank.

    With vLLM a training takes two steps: only then does the engine sleep, wake and load weights.
    """
    once = {"save_steps": 0, "eval_steps": 0, "report_to": []}
    match cfg:
        case SFTConfig():
            n_rows, n = len(read_table(cfg.train_file)), max(4, ranks)
            return once | {"num_train_epochs": n / n_rows, "train_batch_size": n, "eval_ratio": 0.0}
        case RLConfig():
            n = min(4, cfg.num_generations)
            few = {"rollout_batch_size": ranks, "num_generations": n, "train_batch_size": ranks * n}
            if cfg.sampling_method == "fork":
                few["fork_roots"] = n
            return once | few | {"max_steps": 2 if cfg.engine == "vllm" else 1}
        case _:
            return {"max_problems": ranks}


def _existing(path: str) -> Path:
    """Return the nearest existing folder at or above `path`."""
    whole = Path(path).absolute()
    return next(folder for folder in (whole, *whole.parents) if folder.is_dir())


# ---- The command ----

EVERY, GRADED = tuple(SCRIPTS), (SearchConfig, RLConfig, EvalConfig)
CHECKS: dict[str, tuple[Callable[[Any], Finding], tuple[type, ...]]] = {
    "versions": (versions, EVERY),
    "device": (device, EVERY),
    "model": (model, EVERY),
    "gold answers": (gold_answers, GRADED),
    "rows": (training_rows, (SFTConfig,)),
    "tokens": (delimiters, EVERY),
    "prompts": (prompts, EVERY),
    "PRM": (process_rewards, GRADED),
    "memory": (memory, EVERY),
    "disk": (disk, EVERY),
    "one step": (one_step, EVERY),
}
"""Name -> the check and the configs that it supports. The last one runs only if none failed."""


def main(cfg: Config) -> None:
    """Run all checks of a config and print one line for each."""
    failed, failures = False, set[str]()
    for name, (check, kinds) in CHECKS.items():
        if not isinstance(cfg, kinds) or (failed and check is one_step):
            continue
        try:
            found, level = check(cfg)
        except (UserError, OSError, ValueError) as error:  # transformers raises the last two
            found, level = one_line(error, 1000), "fail"
        failed |= level == "fail"
        if level == "fail" and found in failures:
            continue  # several checks open the tokenizer
        failures.add(found)
        say(f"{level:5} {name:13} {found}")
    if failed:
        raise SystemExit(1)


def schema_of(argv: Sequence[str]) -> type:
    """Return the class that fits the keys best: few unknown keys, few missing ones."""
    try:
        keys = set(given(argv))
    except UserError:
        keys = set()  # `cli` reads the arguments again and reports the mistake

    def strangeness(schema: type) -> int:
        missing = set(required_keys(schema)) - keys
        return len(keys - specs(schema).keys()) + len(missing)

    return min(SCRIPTS, key=strangeness)


if __name__ == "__main__":
    cli(main, schema_of(sys.argv[1:]))
