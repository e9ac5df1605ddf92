"""Speed of a run against what the machine can do."""

from __future__ import annotations

import time

import torch

DENSE_BF16_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "V100": 125e12}
"""FLOP/s of one GPU at bf16 (fp16 for V100) without sparsity, from NVIDIA's data sheets (SXM where there are two)."""


MEASURING_SECONDS = 0.25
"""How long to look for the best rate of a matrix product when a run starts."""


def peak_flops(device: torch.device, dtype: str) -> tuple[float, str]:
    """(FLOP/s, where the number comes from): the data sheet of a known GPU at 16 bit, else a measured product."""
    if device.type == "cuda" and dtype != "fp32":
        name = torch.cuda.get_device_name(device)
        for model, flops in DENSE_BF16_PEAK.items():
            if model in name:
                return flops, f"data sheet, {model}"
    return _measured_flops(device, dtype), "measured matrix product"


def _measured_flops(device: torch.device, dtype: str) -> float:
    """Best rate of a square matrix product out of a few, in FLOP/s.

    On a CPU by the time this thread ran, which other processes on the core do not lengthen.
    """
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    size = 1024 if device.type == "cpu" else 8192
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, kind)
    best, spent = float("inf"), 0.0
    while spent < MEASURING_SECONDS:
        start = clock()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = clock() - start
        best, spent = min(best, took), spent + took
    return 2 * size**3 / best
