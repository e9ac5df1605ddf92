"""Speed of a run against what the machine can do."""

from __future__ import annotations

import time

import torch

from stablemoe_ds.training.data_sheets import DATA_SHEETS, data_sheet

MEASURING_SECONDS = 0.25
"""How long to look for the best rate of a matrix product when a run starts."""


def peak_flops(device: torch.device, dtype: str) -> tuple[float, str]:
    """(FLOP/s, where the number comes from): a data sheet if the GPU has one, else a matrix product measured here.

    dtype: fp32, bf16 or fp16. In fp32 tensor cores count only if torch is allowed to use them (TF32).
    """
    if device.type != "cuda":
        return _measured_flops(device, dtype), "a matrix product measured here"
    name = torch.cuda.get_device_name(device)
    sheet = data_sheet(name)
    tf32 = dtype == "fp32" and torch.get_float32_matmul_precision() != "highest"
    unit = "tf32" if tf32 else dtype
    tera = getattr(DATA_SHEETS[sheet], unit) if sheet else None
    if tera is not None:
        return tera * 1e12, f"the data sheet of {sheet} for {unit}"
    return _measured_flops(
        device, dtype
    ), f"a matrix product measured here, as no data sheet is known of {name} for {unit}"


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
