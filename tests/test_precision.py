"""Test that `dtype: auto` is bfloat16 only if the device computes in it."""

from pathlib import Path

import pytest
import torch

from rftt.run import precision
from rftt.run.config import EvalConfig
from rftt.run.precision import computes_in_bfloat16, settle_dtype
from tests.conftest import run
from tests.small_world import make_world, settings
from tools import doctor

EMULATED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""Environment in which any x86 CPU works like one with AVX2 and no bfloat16 instructions."""


def config(dtype: str) -> EvalConfig:
    return EvalConfig(
        output_dir="o", model_name_or_path="m", eval_file="e", dtype=dtype, device="cpu"
    )


@pytest.mark.cases
@pytest.mark.parametrize(("able", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_settled_by_the_device(monkeypatch, able, expected):
    monkeypatch.setattr(precision, "computes_in_bfloat16", lambda device: able)
    assert settle_dtype(config("auto")).dtype == expected
    for chosen in ("float32", "bfloat16"):
        assert settle_dtype(config(chosen)).dtype == chosen


@pytest.mark.parametrize(("able", "level"), [(True, "ok"), (False, "warn")])
def test_the_doctor_warns_of_emulated_bfloat16(monkeypatch, able, level):
    monkeypatch.setattr(doctor, "computes_in_bfloat16", lambda device: able)
    assert doctor.device(config("bfloat16")).level == level
    assert doctor.device(config("float32")).level == "ok"


@pytest.mark.cases
def test_a_run_on_an_ordinary_cpu_says_float32_and_records_it(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    arguments = settings("evaluate", world, tmp_path / "out", "dtype=auto", "device=cpu")
    run("python", "evaluate.py", *arguments, env=EMULATED)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("weights and compute in float32") == 1
    assert "dtype: float32" in (tmp_path / "out" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("instructions", "limit", "expected"),
    [
        ({"avx512_bf16": True}, {}, True),
        ({"amx_bf16": True, "avx512_bf16": True}, {}, True),
        ({"bf16": True}, {}, True),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, {}, False),
        ({"avx512_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        ({"avx512_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, False),
        ({"avx512_bf16": True}, {"DNNL_MAX_CPU_ISA": "AVX2"}, False),
        ({"avx512_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        ({"avx512_bf16": True}, {"ATEN_CPU_CAPABILITY": "avx2"}, True),
    ],
)
def test_bfloat16_needs_instructions_that_onednn_may_use(
    instructions: dict[str, bool],
    limit: dict[str, str],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in limit.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert computes_in_bfloat16("cpu") is expected
    assert computes_in_bfloat16(torch.device("cpu")) is expected
    assert not computes_in_bfloat16("meta")


def test_a_gpu_computes_in_bfloat16_unless_it_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
    )
    assert not computes_in_bfloat16("cuda:0")


def test_a_cpu_build_without_onednn_emulates_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not computes_in_bfloat16("cpu")
