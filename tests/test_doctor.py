"""Test that doctor.py finds faults before a run, and memory.py against a count of bytes."""

from __future__ import annotations

import asyncio
import json
import re
import resource
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen2Config, Qwen2ForCausalLM

from rftt.engines import build_engine
from rftt.engines.base import Sampling
from rftt.engines.chat import open_tokenizer
from rftt.engines.sampler import functional_ids
from rftt.learner.fsdp import close_world, open_world
from rftt.learner.logprobs import CHUNK_LOGITS, KEPT_LOGITS, token_logprobs
from rftt.learner.lora import attach
from rftt.learner.model import load_policy
from rftt.learner.offline import collate_rows, sft_loss
from rftt.learner.setup import load_models
from rftt.run.config import EvalConfig, RLConfig, SearchConfig, SFTConfig, load_config
from rftt.types import UserError
from rftt.update import Learner
from tests.conftest import ROOT, run
from tests.small_world import damage, make_world, settings
from tools import doctor
from tools.memory import adapter_size, complaint, estimate, gigabytes

SCHEMAS = {"search": SearchConfig, "train_sft": SFTConfig, "train_rl": RLConfig}
SCHEMAS |= {"evaluate": EvalConfig}
LOGITS = CHUNK_LOGITS["cpu"], KEPT_LOGITS["cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def config(script: str, world: Path, *more: str) -> Any:
    return load_config(SCHEMAS[script], settings(script, world, world / "out", *more))


# ---- What it finds ----


@pytest.mark.parametrize("script", SCHEMAS)
def test_it_knows_whose_config_it_reads(script: str, world: Path) -> None:
    assert doctor.schema_of(settings(script, world, world)) is SCHEMAS[script]
    assert doctor.schema_of([*settings(script, world, world), "sede=1"]) is SCHEMAS[script]


@pytest.mark.parametrize("script", ["train_rl", "search"])
def test_all_is_well_in_a_minute(script: str, world: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("python", "tools/doctor.py", *settings(script, world, world / "out"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 60  # on a machine of its own; 15 when written
    lines = done.stdout.splitlines()
    n_checks = sum(SCHEMAS[script] in kinds for _, kinds in doctor.CHECKS.values())
    assert [line.split()[0] for line in lines] == ["ok"] * n_checks
    assert lines[-1].startswith(f"ok    one step      {script}.py on one problem in")
    assert not list(world.glob(".doctor-*"))
    assert not (world / "out").exists()


FAULTS: dict[str, tuple[str, list[str], str, str]] = {
    "device": ("train_rl", ["device=cuda"], "fail", "use auto or cpu"),
    "gold": ("search", ["train_file={bad}/gold.jsonl"], "fail", "1 of 2 rows have no gold answer"),
    "odd gold": ("search", ["train_file={bad}/odd.jsonl"], "warn", "not accepted as their own"),
    "gsm8k": ("evaluate", ["eval_file={bad}/gsm8k.jsonl"], "warn", "answers use GSM8K's '####'"),
    "PRM": ("search", ["use_prm=true", "prm_url=http://127.0.0.1:9", "prm_tries=1"], "fail",
        "not reachable"),
    "tokens": ("train_rl", ["model_name_or_path={world}/base"], "fail", "'<clarify>' encodes to"),
    "no model": ("train_rl", ["model_name_or_path={bad}/nowhere"], "fail", "must be a folder"),
    "hub": ("train_rl", ["model_name_or_path={bad}/hub/hf", "system_prompt=Think."],
        "fail", "use system_prompt None"),
    "bos": ("evaluate", ["model_name_or_path={bad}/doubled"], "fail", "two BOS tokens"),
    "template": ("train_rl", ["model_name_or_path={bad}/sft/hf"], "fail", "same prompts"),
    "system prompt": ("train_rl", ["model_name_or_path={bad}/same/hf", "system_prompt=Think."],
        "fail", "use system_prompt None"),
    "memory": ("train_sft", ["max_tokens_per_microbatch=1000000000",
        "train_file={bad}/rows.jsonl"], "fail",
        "on cpu in phase learn"),
    "disk": ("train_rl", ["save_total_limit=1000000000"], "fail", "another disk"),
}  # fmt: skip
CHECK_OF = {
    "no model": "model",
    "gold": "gold answers",
    "odd gold": "gold answers",
    "gsm8k": "gold answers",
}
CHECK_OF |= {"hub": "prompts", "bos": "prompts", "template": "prompts", "system prompt": "prompts"}


@pytest.fixture(scope="module")
def bad(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    good = {"problem": "1+1?", "answer": "2"}
    golds = {"gold": "", "odd": r"\begin{", "gsm8k": "1 and 1 is 2\n#### 2"}
    for name, answer in golds.items():
        rows = [good | {"answer": answer}, good]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "rows.jsonl").write_text('{"question": "1+1?", "response": "2"}\n' * 9)
    damage(world / "speaks", path / "doubled", "doubled")
    for name, fault, trained in (("sft", "other", world / "base"), ("same", "", world / "base"),
                                 ("hub", "", "Qwen/Qwen2.5-7B-Instruct")):  # fmt: skip
        damage(world / "speaks", path / name / "hf", fault)
        before = {"model_name_or_path": str(trained), "system_prompt": None}
        (path / name / "config.yaml").write_text(json.dumps(before))
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(
    fault: str, world: Path, bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script, arguments, level, words = FAULTS[fault]
    more = [argument.format(world=world, bad=bad) for argument in arguments]
    monkeypatch.setitem(doctor.CHECKS, "one step", (lambda cfg: doctor.Finding("not tried"), ()))
    cfg = config(script, world, *more)
    if level == "fail":
        with pytest.raises(SystemExit, match="1"):
            doctor.main(cfg)
    else:
        doctor.main(cfg)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("ok ")]
    assert len(lines) == (2 if fault == "no model" else 1), lines  # + memory
    assert lines[0].startswith(f"{level:5} {CHECK_OF.get(fault, fault)}")
    assert words in lines[0]


def test_the_step_itself_finds_the_rest(world: Path, tmp_path: Path) -> None:
    damage(world / "speaks", tmp_path / "short", "short")
    for argument, words in (
        ("allow_cold_start=false", "total probability to functional tokens"),
        (f"model_name_or_path={tmp_path / 'short'}", "saved without resized embeddings"),
    ):
        with pytest.raises(UserError, match=words):
            doctor.one_step(config("train_rl", world, argument))


def test_a_failure_saves_the_step_and_sets_the_exit_code(world: Path) -> None:
    arguments = settings("train_rl", world, world / "out", "device=cuda")
    done = run("python", "tools/doctor.py", *arguments, check=False)
    assert done.returncode == 1
    assert "one step" not in done.stdout
    done = run("python", "tools/doctor.py", *arguments, "sede=1", check=False)
    assert (done.returncode, done.stdout) == (2, "")


# ---- Memory ----

MODEL = SimpleNamespace(
    hidden_size=4, intermediate_size=10, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=8,
)  # fmt: skip
NEEDED = ["output_dir=o", "model_name_or_path=m", "train_file=t", "learning_rate=1e-6"]


@pytest.mark.oracle
def test_estimate_by_hand() -> None:
    small = ["max_num_seqs=3", "max_model_len=7", "max_tokens_per_microbatch=5", "kl_coef=0.1"]
    cfg = load_config(RLConfig, [*NEEDED, *small, "advantage_estimator=ppo", "dtype=bfloat16"])
    phases = estimate(MODEL, 100, cfg, ranks=2, logits=(16, 24), gpu_bytes=0)
    gathered = 2 * (8 * 4 + 2 * (100 - 8 * 4) / 2)  # bfloat16; vocabulary, two of two layers
    weights = (2 * 4 * 100 + 2 * 100) / 2 + gathered  # policy, critic, reference on two ranks
    head = 2 * 4 * 16 + 2 * 24 + 4 * 8 * 4  # log-probs and gradient; kept; the weight's gradient
    layer, recomputed = (2 * (n * 10 + 2 * 2 + 3 * 4 + 4 * 4) + 8 * 4 for n in (2, 4))
    assert phases["learn"] == {
        "params": weights + 2 * 100,  # and the engine's
        "optimizer": (8 + 4) * 200 / 2,
        "activations": 5 * 2 * layer + head,
        "KV": 0,
    }
    assert phases["explore"] == {
        "params": weights + 2 * 100,
        "optimizer": 8 * 200 / 2,
        "activations": 0,
        "KV": 3 * 7 * 2 * 2 * 2 * 2,
    }
    asleep = replace(cfg, engine="vllm", gradient_checkpointing=True)
    phases = estimate(MODEL, 100, asleep, ranks=2, logits=(16, 24), gpu_bytes=1000)
    assert phases["learn"]["params"] == weights
    assert phases["learn"]["activations"] == 5 * (2 * 2 * 4 + recomputed) + head
    assert phases["explore"]["KV"] == 0.4 * 1000 - 200
    arguments = [*NEEDED[:2], "eval_file=e", *small[:2], "dtype=bfloat16"]
    evaluation = load_config(EvalConfig, arguments)
    phases = estimate(MODEL, 100, evaluation, ranks=1, logits=(16, 24), gpu_bytes=0)
    assert phases == {"explore": {"params": 200, "optimizer": 0, "activations": 0, "KV": 336}}


def test_checkpoints_of_an_adapter_need_less_disk(world: Path) -> None:
    """Full: 16 bytes per parameter. Adapter: 4, and 12 per trained one."""
    model, n = doctor.model_of(config("train_rl", world))
    trained = adapter_size(model, config("train_rl", world, "use_peft=true", "lora_r=1"))
    for more, size in (([], 16 * n), (["use_peft=true", "lora_r=1"], 4 * n + 12 * trained)):
        cfg = config("train_rl", world, "save_total_limit=1000000000", *more)
        with pytest.raises(UserError, match=re.escape(gigabytes(size * 1e9))):
            doctor.disk(cfg)


def test_what_does_not_fit_is_told_with_the_cure() -> None:
    parts = {"params": 14e9, "optimizer": 42e9, "activations": 9e9, "KV": 6e9}
    phases = {"explore": dict.fromkeys(parts, 0.0), "learn": parts}
    assert complaint(phases, 72e9, "cuda:0") is None
    assert complaint(phases, 24e9, "cuda:0") == (
        "estimate 71 GB > 24 GB on cuda:0 in phase learn (params 14, optimizer 42, activations 9, "
        "KV 6). Try optim: adamw_8bit or fsdp_cpu_offload: true, fsdp_cpu_offload: true or more "
        "GPUs."
    )


def size(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("dtype", "more"),
    [("float32", []), ("bfloat16", []), ("bfloat16", ["use_peft=true", "lora_r=2"])],
)
def test_estimate_against_the_bytes_of_a_run(world: Path, dtype: str, more: list[str]) -> None:
    """Weights and optimizer state to the byte; what is saved for the backward pass to 10 %."""
    cfg = config("train_rl", world, f"dtype={dtype}", "max_tokens_per_microbatch=400", *more)
    model, n = doctor.model_of(cfg)
    phases = estimate(model, n, cfg, ranks=1, logits=LOGITS, gpu_bytes=0)
    ranks = open_world("cpu")
    ids = functional_ids(open_tokenizer(cfg), required=True)
    models = load_models(cfg, ranks, model.vocab_size, ids)
    modules = models.trained()
    learner = Learner(cfg, modules, 1, ranks, world, print)
    optimizers = learner.optimizers
    for module, optimizer in zip(modules.values(), optimizers.values(), strict=True):
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    states = [x for o in optimizers.values() for s in o.state.values() for x in s.values()]
    moments = size([x.to_local() for x in states if x.ndim])
    frozen = [models.reference] if isinstance(models.reference, nn.Module) else []
    own = size([p.to_local() for each in [*modules.values(), *frozen] for p in each.parameters()])
    every = [p for module in modules.values() for p in module.parameters()]
    gradients = size([p.grad.to_local() for p in every if p.grad is not None])
    del models, modules, frozen, every, learner, optimizers, states, module, optimizer, parameter
    close_world(ranks)
    compute = 2 if dtype == "bfloat16" else 4
    vocabulary = model.vocab_size * model.hidden_size
    gathered = compute * (vocabulary + 2 * (n - vocabulary) / model.num_hidden_layers)
    assert phases["learn"]["params"] == own + compute * n + gathered
    assert phases["learn"]["optimizer"] == moments + gradients

    policy = load_policy(cfg.model_name_or_path, getattr(torch, dtype))
    if cfg.use_peft:
        attach(cfg, policy, (*ids.openers, *ids.closers), cfg.seed)
        policy.to(getattr(torch, dtype))  # as FSDP computes
    batch = collate_rows([([3] * 10, [5] * 90, [True] * 90)] * 4)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.extend([tensor] if tensor.untyped_storage().data_ptr() not in weights else [])
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        sft_loss(token_logprobs(policy, batch, 1.0, model.vocab_size)[0], batch.action_mask)
    head = 0 if cfg.use_peft else vocabulary
    extra = 4 * (2 * 400 * model.vocab_size + head)  # in the backward pass
    assert size(saved) + extra == pytest.approx(phases["learn"]["activations"], rel=0.1)


def test_estimate_holds_the_key_value_slots_of_a_run(world: Path) -> None:
    cfg = config("evaluate", world, "max_num_seqs=4", "max_model_len=64", "num_samples=4")
    model, n = doctor.model_of(cfg)
    engine: Any = build_engine(cfg, cfg.model_name_or_path, 60)
    most = 0

    async def fill() -> None:
        nonlocal most
        sampling = Sampling(max_tokens=40)
        requests = [engine.generate([3] * 24, replace(sampling, seed=i)) for i in range(8)]
        await asyncio.gather(*requests)
        most = engine._slots.kv.nbytes

    asyncio.run(fill())
    phases = estimate(model, n, cfg, ranks=1, logits=LOGITS, gpu_bytes=0)
    assert 0.5 * phases["explore"]["KV"] <= most <= phases["explore"]["KV"]
    assert phases["explore"]["params"] == size(engine.model.parameters())


# ---- Recipes for one card ----

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "vocab_size", "tie_word_embeddings")  # fmt: skip
PUBLISHED = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
}
"""Values of NAMES in the config.json of Qwen2.5's instruct models."""
RECIPES = sorted(path.name for path in ROOT.glob("configs/*gb"))


def needs(recipe: str, kind: str) -> dict[str, float]:
    """Phase -> GB on the card of a recipe, whose name ends with its memory."""
    name, card = recipe.rsplit("-", 1)
    config = Qwen2Config(**dict(zip(NAMES, PUBLISHED[name], strict=True)))  # type: ignore[arg-type]
    with torch.device("meta"):
        n_params = Qwen2ForCausalLM(config).num_parameters()
    cfg = load_config(SCHEMAS[kind], [str(ROOT / f"configs/{recipe}/{kind[6:]}.yaml")])
    size = 1e9 * int(card.removesuffix("gb"))
    logits = CHUNK_LOGITS["cuda"], KEPT_LOGITS["cuda"]
    phases = estimate(config, n_params, cfg, ranks=1, logits=logits, gpu_bytes=size)
    assert complaint(phases, doctor.USABLE_GPU * size, "cuda:0") is None
    return {phase: round(sum(parts.values()) / 1e9, 1) for phase, parts in phases.items()}


@pytest.mark.gpu_ready
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_for_one_card_fits_it_and_says_how_much_it_needs(recipe: str) -> None:
    for kind in ("train_sft", "train_rl"):
        told = ", ".join(f"{phase} {size} GB" for phase, size in needs(recipe, kind).items())
        text = (ROOT / f"configs/{recipe}/{kind[6:]}.yaml").read_text()
        assert f"# Memory by tools/memory.py: {told}.\n" in text
