"""Measure one optimizer step on the same weights and batch: packed, padded, and TRL's.

    python bench/train_step.py [--compare trl] [--trl-python .venv-bench/bin/python] [--rounds 3]
    python bench/train_step.py --size 1.5b --length 4096            (on a GPU)

Each variant has its own process. On a CPU they take turns, one step each per round, so that a busy
machine slows all equally. The figures are CPU seconds of one compute thread, and peak memory above
that of the loaded model, including gradients and optimizer state. On a GPU only one process at a
time holds a model, and seconds are wall time. Every step is printed on stderr as soon as it is
measured. The last line is one JSON object.

`skipped` names variants that the device cannot measure, because it emulates bfloat16 or lacks the
memory. A round that would not end within --minutes does not start, so `rounds` may be smaller.
TRL's chunked head is a Triton kernel, which a CPU replaces by a fallback, so a CPU ratio does not
predict the ratio on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LENGTHS = (500, 460, 400, 330, 260, 205, 160, 120)
"""Tokens of the eight documents: 2,435 without padding, 4,000 with padding."""
PROMPT = 60
ADVANTAGES = (1.0, -1.0, 0.5, -0.5, 1.5, -0.7, 0.3, -0.6)
"""Their sum must not be 0, because losses are compared by their ratio."""
LEARNING_RATE = 1e-5
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "vocab_size")  # fmt: skip
SIZES = {
    "tiny": dict(zip(NAMES, (64, 128, 2, 4, 2, 512), strict=True)),
    "51m": dict(zip(NAMES, (512, 2400, 8, 8, 2, 32000), strict=True)),
    "0.5b": dict(zip(NAMES, (896, 4864, 24, 14, 2, 151936), strict=True)),
    "1.5b": dict(zip(NAMES, (1536, 8960, 28, 12, 2, 151936), strict=True)),
}
Step = Callable[[], tuple[float, float]]
"""Runs one optimizer step and returns the loss and the gradient norm before clipping."""


# ---- The compared variants: each builder runs in its own process ----


def documents(
    lengths: tuple[int, ...], vocabulary: int, branching: bool = False
) -> list[list[int]]:
    """Return random ids. Branching documents share half of all tokens with the longest one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [ids[0][: 5 * len(d) // 8] + d[5 * len(d) // 8 :] for d in ids] if branching else ids


def packed(
    folder: str, dtype: str, loss: str, lengths: tuple[int, ...], *, on_tree: bool = False
) -> Step:
    """Build the step of train_rl.py: FSDP, packed documents, chunked log-probs."""
    import torch

    from rftt import rl
    from rftt.batch import Batch
    from rftt.learner import offline
    from rftt.learner.fsdp import clip_gradients, flat_microbatches, open_world, shard
    from rftt.learner.logprobs import token_logprobs
    from rftt.learner.model import load_policy
    from rftt.learner.offline import collate_rows
    from rftt.learner.optim import build_optimizer
    from rftt.run.config import Training

    world = open_world()
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    policy = load_policy(folder, torch.float32, gradient_checkpointing=world.device.type == "cuda")
    vocabulary = policy.config.vocab_size
    shard(policy, world, param_dtype=compute)
    optimizer = build_optimizer(Training(learning_rate=LEARNING_RATE), policy, LEARNING_RATE)
    ids = documents(lengths, vocabulary, branching=loss == "branching")
    rows = [(d[:PROMPT], d[PROMPT:], [True] * (len(d) - PROMPT)) for d in ids]
    batch = collate_rows(rows)
    batch = batch.replace(advantages=batch.spread(ADVANTAGES[: len(lengths)])).to(world.device)
    batch = batch.replace(packs_prefixes=on_tree)
    groups = flat_microbatches(batch, sum(lengths) if world.device.type == "cpu" else 16384)

    def loss_of(part: Batch) -> torch.Tensor:
        logprobs, _ = token_logprobs(policy, part, 1.0, vocabulary)
        if loss == "sft":
            return offline.sft_loss(logprobs, part.action_mask)
        old, mask = logprobs.detach(), part.action_mask
        return rl.policy_loss(logprobs, old, part.advantages, mask, epsilon=0.2)[0]

    def step() -> tuple[float, float]:
        total = 0.0
        for group in groups:
            value = loss_of(batch.select(group)) / batch.n_actions
            value.backward()
            total += value.item()
        norm = clip_gradients(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total, norm

    return step


def padded(folder: str, dtype: str, loss: str, lengths: tuple[int, ...]) -> Step:
    """Build what one writes by hand: right padding, all logits, log-softmax."""
    import torch
    from torch.nn.functional import log_softmax, pad
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train().to(device)
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    ids = [torch.tensor(d, device=device) for d in documents(lengths, model.config.vocab_size)]
    x = torch.stack([pad(d, (0, max(lengths) - len(d))) for d in ids])
    real = torch.stack([pad(torch.ones_like(d), (0, max(lengths) - len(d))) for d in ids])
    mask = real[:, 1:].bool() & (torch.arange(max(lengths) - 1, device=device) >= PROMPT - 1)
    advantages = torch.tensor(ADVANTAGES[: len(lengths)], device=device)[:, None]

    def step() -> tuple[float, float]:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(input_ids=x, attention_mask=real).logits[:, :-1]
        logprobs = log_softmax(logits.float(), -1).gather(-1, x[:, 1:, None])[..., 0]
        ratio = (logprobs - logprobs.detach()).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        value = -((logprobs if loss == "sft" else surrogate) * mask).sum() / mask.sum()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item(), norm.item()

    return step


def trl(folder: str, dtype: str, loss: str, lengths: tuple[int, ...]) -> Step:
    """Build TRL's GRPOTrainer or SFTTrainer, with the batch passed to its training_step."""
    import torch
    from datasets import Dataset
    from torch.nn.functional import pad
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocabulary, n, longest = model.config.vocab_size, len(lengths), max(lengths)
    shared: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": n,
        "use_cpu": device == "cpu", "gradient_checkpointing": device == "cuda",
        "bf16": dtype == "bf16", "learning_rate": LEARNING_RATE, "adam_beta2": 0.95,
        "lr_scheduler_type": "constant", "report_to": [],
        "max_steps": 10, "optim": "adamw_torch_fused",
    }  # fmt: skip
    ids = [torch.tensor(d) for d in documents(lengths, vocabulary)]
    x = torch.stack([pad(d, (0, longest - len(d))) for d in ids])
    real = torch.stack([pad(torch.ones_like(d), (0, longest - len(d))) for d in ids])
    total = torch.tensor(sum(lengths) - PROMPT * n, device=device)
    if loss == "sft":
        rows = Dataset.from_list([{"input_ids": d.tolist()} for d in ids])
        trainer = SFTTrainer(model, SFTConfig(max_length=longest, **shared), train_dataset=rows,
                             processing_class=tokenizer)  # fmt: skip
        labels = torch.where(real.bool() & (torch.arange(longest) >= PROMPT), x, -100)
        inputs: dict[str, Any] = {"input_ids": x, "attention_mask": real, "labels": labels}
    else:
        rows = Dataset.from_list([{"prompt": "w3"}] * n)
        config = GRPOConfig(num_generations=n, beta=0.0, epsilon=0.2, loss_type="dapo", **shared)
        trainer = GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), config,
                              rows, processing_class=tokenizer)  # fmt: skip
        inputs = {
            "prompt_ids": x[:, :PROMPT], "prompt_mask": real[:, :PROMPT],
            "completion_ids": x[:, PROMPT:], "completion_mask": real[:, PROMPT:],
            "advantages": torch.tensor(ADVANTAGES[:n]), "num_items_in_batch": total,
        }  # fmt: skip
        trainer._prepare_inputs = lambda batch: batch
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    prepared, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = prepared

    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

    def step() -> tuple[float, float]:
        value = trainer.training_step(prepared, dict(inputs), total)
        norm = trainer.accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item(), norm.item()

    return step


VARIANTS = {
    "packed": (packed, "rl", "fp32"),
    "packed_bf16": (packed, "rl", "bf16"),
    "packed_sft": (packed, "sft", "fp32"),
    "padded": (padded, "rl", "fp32"),
    "packed_branching": (packed, "branching", "fp32"),
    "tree": (partial(packed, on_tree=True), "branching", "fp32"),
    "trl": (trl, "rl", "fp32"),
    "trl_bf16": (trl, "rl", "bf16"),
    "trl_sft": (trl, "sft", "fp32"),
}
RIVAL = {"packed": "trl", "padded": "trl", "packed_bf16": "trl_bf16", "packed_sft": "trl_sft",
         "tree": "packed_branching"}  # fmt: skip


# ---- One process per variant ----


def memory_mib(key: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise ValueError(key)


def work(variant: str, folder: str, lengths: tuple[int, ...]) -> None:
    """Build the variant, then run one step per line on stdin and print its figures."""
    import torch

    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    torch.set_num_threads(1)
    gpu = on_gpu()
    build, loss, dtype = VARIANTS[variant]
    step = build(folder, dtype, loss, lengths)
    start = torch.cuda.memory_allocated() / 2**20 if gpu else memory_mib("VmRSS")
    for _ in sys.stdin:
        begin = time.perf_counter() if gpu else time.process_time()
        value, norm = step()
        if gpu:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() if gpu else time.process_time()) - begin
        peak = torch.cuda.max_memory_allocated() / 2**20 if gpu else memory_mib("VmHWM")
        figures = {"seconds": seconds, "loss": value, "grad_norm": norm, "extra_mib": peak - start}
        ctypes.CDLL(None).malloc_trim(0)  # waiting workers must not keep freed memory
        out.write(json.dumps(figures) + "\n")
        out.flush()


def start(variant: str, folder: str, lengths: tuple[int, ...], python: str) -> subprocess.Popen:
    """Start the process of a variant."""
    command = [python, __file__, "--worker", variant, "--folder", folder]
    command += ["--lengths", ",".join(map(str, lengths))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


class OutOfMemory(Exception):
    """A worker lacks memory, which its device cannot give."""


def ask(worker: subprocess.Popen) -> dict[str, float]:
    """Run one step in a worker and return its figures.

    Raises OutOfMemory if that is why the worker failed. Exits for another reason.
    """
    assert worker.stdin
    assert worker.stdout
    worker.stdin.write("step\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        assert worker.stderr
        told = worker.stderr.read()
        if "OutOfMemoryError" in told:
            raise OutOfMemory
        sys.exit(f"error: a worker failed:\n{told[-3000:]}")
    return json.loads(line)


# ---- The run ----


def write_model(folder: str, size: dict[str, int]) -> None:
    """Write random weights, and a tokenizer of one word per id for TRL's constructors."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**size, tie_word_embeddings=True, max_position_embeddings=32768)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, size["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
        pad_token="<pad>", eos_token="<eos>", unk_token="w2",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def on_gpu() -> bool:
    """Return whether the variants run on a GPU."""
    import torch

    return torch.cuda.is_available()


def emulates_bfloat16() -> bool:
    """Return whether this machine emulates bfloat16, which would take unreasonable time."""
    from rftt.run.precision import computes_in_bfloat16

    return not computes_in_bfloat16("cuda" if on_gpu() else "cpu")


def matmul_rate(dtype: str, *, emulated: bool = False) -> float:
    """Return FLOPs per second of a large matrix product, as the peak of the device.

    An emulated dtype uses one small product, which takes about as long as the large ones.
    """
    import torch

    device = "cuda" if on_gpu() else "cpu"
    n, repeats = (8192, 20) if device == "cuda" else (1024, 4)
    if emulated:
        n, repeats = 256, 1
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    a = torch.randn(n, n, device=device).to(kind)
    clock = time.perf_counter if device == "cuda" else time.process_time
    for _ in range(2):  # the first is warm-up
        begin = clock()
        for _ in range(repeats):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = clock() - begin
    if device == "cuda":
        del a
        torch.cuda.empty_cache()  # a worker needs the memory
    return 2 * n**3 * repeats / seconds


def model_flops(size: dict[str, int], lengths: tuple[int, ...]) -> float:
    """Return FLOPs of forward and backward over real tokens, with the head over response tokens.

    Work that a variant repeats or saves does not count, so the MFU of tree packing may exceed 1.
    """
    width, head = size["hidden_size"], size["hidden_size"] // size["num_attention_heads"]
    attention = 2 * width * width + 2 * width * head * size["num_key_value_heads"]
    layers = size["num_hidden_layers"] * (attention + 3 * width * size["intermediate_size"])
    actions = sum(lengths) - PROMPT * len(lengths)
    quadratic = size["num_hidden_layers"] * width * sum(n * n for n in lengths)
    return 6 * (layers * sum(lengths) + width * size["vocab_size"] * actions + quadratic)


def summary(
    steps: dict[str, list[dict[str, float]]],
    rates: dict[str, list[float]],
    flops: float,
    n_tokens: int,
) -> dict[str, dict[str, float]]:
    """Return each variant's figures as medians over the rounds, and ratios to TRL's if it ran.

    The first round is warm-up. It counts only if there was no time for another one.
    """
    result: dict[str, dict[str, float]] = {}
    seconds = {
        variant: [f["seconds"] for f in found[1:] or found] for variant, found in steps.items()
    }
    for variant, figures in steps.items():
        measured = rates[VARIANTS[variant][2]]
        rounds = zip(seconds[variant], measured[1:] or measured, strict=True)
        result[variant] = {
            "tokens_per_s": n_tokens / statistics.median(seconds[variant]),
            "extra_mib": figures[0]["extra_mib"],
            "mfu": statistics.median(flops / spent / rate for spent, rate in rounds),
            "first_loss": figures[0]["loss"],
            "first_grad_norm": figures[0]["grad_norm"],
        }
    for variant, rival in RIVAL.items():
        if variant in result and rival in result:
            figures, other = result[variant], result[rival]
            to = "vs_packed" if variant == "tree" else "vs_trl"
            ratios = (b / a for a, b in zip(seconds[variant], seconds[rival], strict=True))
            figures[f"tokens_{to}"] = statistics.median(ratios)
            figures[f"memory_{to}"] = figures["extra_mib"] / other["extra_mib"]
            figures[f"loss_{to}"] = figures["first_loss"] / other["first_loss"]
            figures[f"grad_norm_{to}"] = figures["first_grad_norm"] / other["first_grad_norm"]
    return result


def take_turns(
    workers: dict[str, subprocess.Popen], rounds: int, limit: float, emulated: bool
) -> tuple[dict[str, list[dict[str, float]]], dict[str, list[float]]]:
    """Return the figures of each variant's steps and each dtype's matrix products, per round.

    The first round is warm-up and provides the memory figures. A round that would end after `limit`
    does not start, and no variant starts after `limit`.
    """
    steps: dict[str, list[dict[str, float]]] = {}
    rates: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for number in range(rounds + 1):
        begin = time.monotonic()
        for variant, worker in workers.items():
            if number == 0 and steps and time.monotonic() > limit:
                worker.kill()
                continue
            figures = ask(worker)
            steps.setdefault(variant, []).append(figures)
            if number == 0 and len(steps) == 1:
                begin = time.monotonic()  # without the start of the processes
            shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            print(f"round {number}  {variant:18}{shown}", file=sys.stderr)
        for dtype, measured in rates.items():
            measured.append(matmul_rate(dtype, emulated=emulated and dtype == "bf16"))
        now = time.monotonic()
        if now + (now - begin) > limit:
            break
    for worker in workers.values():
        worker.communicate()
    return steps, rates


def one_by_one(
    begin_worker: Callable[[str], subprocess.Popen],
    variants: list[str],
    rounds: int,
    limit: float,
    skipped: dict[str, str],
) -> tuple[dict[str, list[dict[str, float]]], dict[str, list[float]]]:
    """Return the figures of `take_turns` for a GPU, whose memory belongs to one variant at a time.

    A variant does not start after `limit`. One that lacks memory is added to `skipped`.
    """
    rates = {dtype: [matmul_rate(dtype) for _ in range(rounds + 1)] for dtype in ("fp32", "bf16")}
    steps: dict[str, list[dict[str, float]]] = {}
    for variant in variants:
        if steps and time.monotonic() > limit:
            continue
        worker, found = begin_worker(variant), list[dict[str, float]]()
        try:
            for number in range(rounds + 1):
                found.append(ask(worker))
                shown = "  ".join(f"{key} {value:.4g}" for key, value in found[-1].items())
                print(f"round {number}  {variant:18}{shown}", file=sys.stderr)
            steps[variant] = found
        except OutOfMemory:
            skipped[variant] = "the GPU's memory is too small"
            print(f"{variant}: skipped, {skipped[variant]}", file=sys.stderr)
        worker.communicate()
    return steps, rates


def main() -> None:
    """Measure the variants in turns and print their figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--compare", choices=["trl"])
    parser.add_argument("--trl-python", default=str(ROOT / ".venv-bench/bin/python"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=9.0, help="wall time for all rounds")
    parser.add_argument("--size", choices=SIZES, default="51m")
    parser.add_argument(
        "--length", type=int, help="documents of this many tokens (default: skewed)"
    )
    parser.add_argument("--variants", default="packed,padded,packed_bf16,packed_sft,tree")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--lengths", help=argparse.SUPPRESS)
    args = parser.parse_args()
    begin = time.monotonic()
    if args.worker:
        work(args.worker, args.folder, tuple(map(int, args.lengths.split(","))))
        return
    lengths = (args.length,) * 8 if args.length else LENGTHS
    variants = args.variants.split(",")
    if args.compare and not Path(args.trl_python).exists():
        sys.exit(f"error: {args.trl_python} is missing; run: make bench-env")
    pairs = [name for v in variants for name in (v, RIVAL.get(v, v))]  # rivals next to each other
    variants = [v for v in dict.fromkeys(pairs) if args.compare or not v.startswith("trl")]
    emulated, skipped = emulates_bfloat16(), dict[str, str]()
    for variant in variants if emulated else ():
        if VARIANTS[variant][2] == "bf16":
            skipped[variant] = "this machine emulates bfloat16; see matmul_gflops"
            print(f"{variant}: skipped, {skipped[variant]}", file=sys.stderr)
    variants = [v for v in variants if v not in skipped]
    limit = begin + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, SIZES[args.size])

        def begin_worker(variant: str) -> subprocess.Popen:
            python = args.trl_python if variant.startswith("trl") else sys.executable
            return start(variant, folder, lengths, python)

        if on_gpu():
            steps, rates = one_by_one(begin_worker, variants, args.rounds, limit, skipped)
        else:
            workers = {variant: begin_worker(variant) for variant in variants}
            steps, rates = take_turns(workers, args.rounds, limit, emulated)
    for variant in set(variants) - steps.keys() - skipped.keys():
        skipped[variant] = "--minutes were used up before its first step"
    result = summary(steps, rates, model_flops(SIZES[args.size], lengths), sum(lengths))
    peak = {dtype: statistics.median(found) / 1e9 for dtype, found in rates.items()}
    for variant, figures in result.items():
        print(f"{variant:18}" + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    rounds = len(rates["fp32"]) - 1
    clock = "wall" if on_gpu() else "cpu"
    more = {"matmul_gflops": peak, "rounds": rounds, "skipped": skipped, "clock": clock}
    print(json.dumps(result | more))


if __name__ == "__main__":
    main()
