"""Choose the precision for `dtype: auto` by what the device supports in hardware."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

ISAS_WITHOUT_BFLOAT16 = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
)
"""Values of ONEDNN_MAX_CPU_ISA that forbid every bfloat16 instruction for matrix products."""


def computes_in_bfloat16(device: torch.device | str) -> bool:
    """Return whether `device` multiplies bfloat16 matrices in hardware.

    A CPU without such instructions still accepts bfloat16. It emulates each product and is about
    100 times slower than in float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # PyTorch leaves these products to oneDNN, which is the only library whose limit matters:
    # ATEN_CPU_CAPABILITY and MKL_ENABLE_INSTRUCTIONS do not change their speed.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    if limit.upper() in ISAS_WITHOUT_BFLOAT16:
        return False
    found = torch.cpu.get_capabilities()
    instructions = ("amx_bf16", "avx512_bf16", "bf16")  # the last one is the name on ARM
    return any(found.get(name, False) for name in instructions)


def settle_dtype(cfg: Any) -> Any:
    """Return `cfg` with `dtype: auto` replaced by the device's precision.

    bfloat16 halves memory and doubles speed if the device has instructions for it. Otherwise
    float32 is faster. The run directory records the chosen value, so that a run cannot continue in
    another precision on another machine.
    """
    if cfg.dtype != "auto":
        return cfg
    device = "cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu"
    return replace(cfg, dtype="bfloat16" if computes_in_bfloat16(device) else "float32")
