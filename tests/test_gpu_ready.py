"""Try on a CPU what would break on a GPU: the smallest test of each that would catch it there."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import list_flash_attention_impls, varlen

from rftt.learner import attention, fsdp
from rftt.learner.attention import layout_of
from rftt.learner.logprobs import CHUNK_LOGITS, chunk_width
from rftt.run.cli import cli
from rftt.run.config import EvalConfig, RLConfig, SearchConfig, SFTConfig, load_config
from rftt.types import UserError
from tests.conftest import run
from tools import doctor, gpu_check

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu_ready

NEEDED = ["model_name_or_path=m", "output_dir=o"]
TRAINING = [*NEEDED, "train_file=t.jsonl", "learning_rate=1e-5"]


@pytest.mark.parametrize("kind", list(CHUNK_LOGITS))
def test_chunks_of_the_head_are_aligned(kind: str) -> None:
    """In bfloat16 a misaligned matrix product is up to 27 times slower on a GPU."""
    for n in (1, 7, 100, 4473, 15000, 10**8):
        width = chunk_width(kind, n)
        assert width % 128 == 0
        assert width >= 256
        assert width * n <= CHUNK_LOGITS[kind] or width == 256


def test_the_doctor_starts_the_ranks_of_the_run() -> None:
    assert doctor.launcher(1)[1:] == []
    assert doctor.launcher(8)[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8",
    ]  # fmt: skip


def test_the_doctor_starts_one_process_where_the_model_is_behind_a_url(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GPUS", "8")
    api = ["engine=api", "api_url=http://127.0.0.1:1", "api_model=m", "api_max_tokens=9"]
    assert doctor.ranks_of(load_config(SearchConfig, [*NEEDED, "train_file=t", *api])) == 1
    assert doctor.ranks_of(load_config(SearchConfig, [*NEEDED, "train_file=t"])) == 8


def test_the_doctor_sleeps_wakes_and_loads_as_a_run_does(tmp_path: Path) -> None:
    """The first wake has nothing to do, so one round never tries the second synchronisation."""
    cfg = load_config(RLConfig, [*TRAINING, "engine=vllm"])
    small = doctor.smallest(cfg, 8)
    assert small["max_steps"] == 2
    assert small["rollout_batch_size"] == 8
    assert small["rollout_batch_size"] * small["num_generations"] == small["train_batch_size"]
    assert doctor.smallest(load_config(RLConfig, TRAINING), 1)["max_steps"] == 1
    forks = load_config(RLConfig, [*TRAINING, "sampling_method=fork"])
    RLConfig(**vars(forks) | doctor.smallest(forks, 2))  # passes its own checks
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n" * 40)
    sft = load_config(SFTConfig, [*NEEDED, f"train_file={rows}", "learning_rate=1e-5"])
    small = doctor.smallest(sft, 8)
    assert small["train_batch_size"] == 8
    assert small["num_train_epochs"] * 40 == pytest.approx(8)


def test_what_a_gpu_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "compute capability 8.0" in str(doctor.gpu_lacks((7, 5)))
    monkeypatch.setattr("shutil.which", lambda name: None if name == "gcc" else f"/bin/{name}")
    assert doctor.gpu_lacks((9, 0)) is None  # another compiler
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "C compiler" in str(doctor.gpu_lacks((9, 0)))


def test_a_rank_without_a_gpu_of_its_own_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert fsdp.own_gpu(2) == 1
    with pytest.raises(UserError, match="rank 1 of this machine finds 1; start at most 1 ranks"):
        fsdp.own_gpu(1)


def test_vllms_memory_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: EvalConfig) -> None:
        raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62")

    with pytest.raises(SystemExit) as ended:
        cli(fail, EvalConfig, [*NEEDED, "eval_file=e", "dtype=float32"])
    assert ended.value.code == 2
    assert "gpu_memory_utilization" in capsys.readouterr().err


def test_engine_args_need_vllm() -> None:
    with pytest.raises(UserError, match="engine_args has no effect with engine=hf"):
        load_config(EvalConfig, [*NEEDED, "eval_file=e", "engine_args={enforce_eager: true}"])


# ---- Flash attention, whose kernels no CPU has ----


def flash(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, *sizes: int,
          scale: float, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:  # fmt: skip
    """What FlashAttention documents: masks are aligned at the end of queries and keys."""
    assert sizes == (queries.diff().max(), keys.diff().max())
    assert enable_gqa
    outs = []
    for (a, b), (c, d) in zip(pairwise(queries.tolist()), pairwise(keys.tolist()), strict=True):
        repeated = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        one, key, value = (x.transpose(0, 1) for x in (q[a:b], *repeated))
        scores = one @ key.mT * scale
        distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        allowed = distance >= -window_size[1]
        if window_size[0] >= 0:
            allowed &= distance <= window_size[0]
        outs.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value)
    return torch.cat(outs, 1).transpose(0, 1)


@pytest.mark.oracle
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tree", [False, True])
def test_flash_attention_is_asked_for_what_the_padded_path_computes(
    tree: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = inspect.signature(varlen.varlen_attn)

    def stand_in(*args: Any, **more: Any) -> Tensor:
        real.bind(*args, **more)
        return flash(*args, **more)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    new, shared = (7, 4, 2), (0, 3, 5) if tree else (0, 0, 0)
    path = [*range(7), *range(3), *range(7, 11), *range(5), 11, 12]  # two share the first's start
    layout = layout_of(new, shared, torch.tensor(path) if tree else None, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, 13, 8, generator=generator) for heads in (4, 2, 2))
    got = attention._flash_attention(q, k, v, layout, 0.3, window)
    expected = attention._padded_attention(q, k, v, layout, 0.3, window, None, None)
    torch.testing.assert_close(got, expected.transpose(0, 1))


def test_the_fastest_installed_flash_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    activated: list[str] = []
    assert "FA3" in list_flash_attention_impls()
    monkeypatch.setattr(attention, "activate_flash_attention_impl", activated.append)
    assert attention.use_flash_kernels((9, 0)) == "attention: torch's FlashAttention-2"
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    assert attention.use_flash_kernels((8, 0)) == "attention: torch's FlashAttention-2"
    assert activated == []
    assert "FlashAttention-3" in attention.use_flash_kernels((9, 0))
    assert activated == ["FA3"]
    monkeypatch.undo()
    monkeypatch.setattr(attention, "find_spec", lambda name: name)  # but torch does not find it
    assert "does not load: " in attention.use_flash_kernels((9, 0))


# ---- The script for a GPU ----


def test_the_gpu_check_prints_a_line_per_check_and_keeps_it(tmp_path: Path) -> None:
    command = ["bash", "runs/gpu_check.sh", "--cpu", "--out", tmp_path]
    done = run(*command, "machine", "head")
    machine, head, summary = map(json.loads, done.stdout.splitlines())
    assert (machine["ok"], machine["torch"]) == (True, torch.__version__)
    assert head["ok"] is None
    assert "needs a GPU" in head["why"]
    assert (summary["passed"], summary["skipped"]) == (["machine"], ["head"])
    kept = tmp_path / "lines/machine.json"
    kept.write_text('{"name": "machine", "ok": true, "kept": 1}')
    done = run(*command, "machine", "rounds", check=False)
    machine, rounds, summary = map(json.loads, done.stdout.splitlines())
    assert machine == json.loads(kept.read_text())
    assert "needs the files of chain" in rounds["why"]
    assert (summary["ok"], summary["failed"], done.returncode) == (False, ["rounds"], 1)


def test_a_check_that_fails_or_hangs_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = gpu_check.Place(True, tmp_path)
    with pytest.raises(gpu_check.Failed, match="prints: CUDA Error: invalid argument"):
        gpu_check.check_words("train_rl.py", "all is well\nCUDA Error: invalid argument at cumem")
    monkeypatch.setitem(gpu_check.CHECKS, "head", lambda at: gpu_check.metrics(at.folder))
    line = gpu_check.run_one("head", at)
    assert line["ok"] is False
    assert "metrics.jsonl" in line["why"]
    monkeypatch.setattr(gpu_check, "LIMIT", 0.01)
    assert gpu_check.run_apart("machine", at)["why"] == "no end within 0 s"


# ---- vLLM itself, in the CPU build ----


class Core:
    """vLLM's engine, of which only the calls are recorded."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.engine_core = self

    def wake_up(self, *tags: Any) -> None:
        self.calls.append(("wake_up", *tags))

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def asleep() -> Any:
    from rftt.engines.vllm import VLLMEngine

    engine: Any = object.__new__(VLLMEngine)
    engine._engine, engine._asleep = Core(), True
    engine.n_tokens, engine.max_model_len = 9, 99
    return engine


@pytest.mark.vllm
def test_an_engine_wakes_before_it_closes() -> None:
    engine = asleep()
    engine.close()
    assert engine._engine.calls == [("wake_up",), "shutdown"]
    engine.close()
    assert engine._engine.calls[2:] == ["shutdown"]


@pytest.mark.vllm
def test_a_request_to_a_sleeping_engine_fails_instead_of_waiting() -> None:
    from rftt.engines.base import Sampling

    with pytest.raises(UserError, match="the engine is asleep"):
        asyncio.run(asleep().generate([1], Sampling(max_tokens=1)))


@pytest.mark.vllm
def test_building_an_engine_changes_nothing_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rftt.engines.vllm import _undone_on_exit

    monkeypatch.setenv("RFTT_KEPT", "old")
    monkeypatch.delenv("RFTT_NEW", raising=False)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(n_threads + 1)
    try:
        drawn = []
        for inside in (False, True):
            random.seed(1)
            np.random.seed(1)  # noqa: NPY002
            torch.manual_seed(1)
            if inside:
                with _undone_on_exit():
                    os.environ |= {"RFTT_KEPT": "new", "RFTT_NEW": "1"}
                    torch.set_num_threads(1)
                    torch.set_num_threads = lambda _: None  # as vLLM does
                    for draw in (random.random, np.random.random, torch.seed):
                        draw()
            drawn.append((random.random(), np.random.random(), torch.rand(1).item()))  # noqa: NPY002
        assert drawn[0] == drawn[1]
        assert torch.get_num_threads() == n_threads + 1
        assert os.environ["RFTT_KEPT"] == "old"
        assert "RFTT_NEW" not in os.environ
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.vllm
def test_engine_args_must_not_undo_what_the_engine_relies_on() -> None:
    from rftt.engines.vllm import VLLMEngine

    engine: Any = object.__new__(VLLMEngine)
    engine._gpu = True
    cfg = load_config(
        EvalConfig, [*NEEDED, "eval_file=e", "engine=vllm", "engine_args={enforce_eager: true}"]
    )
    assert engine._arguments(cfg)["enforce_eager"] is True
    for key in ("logprobs_mode", "tensor_parallel_size", "enable_sleep_mode"):
        taken = replace(cfg, engine_args={key: 2})
        with pytest.raises(UserError, match=f"engine_args must not contain {key}"):
            engine._arguments(taken)
