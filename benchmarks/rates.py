"""What a device can do at best, measured; and what a step cannot do without."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.common import timed
from stablemoe_ds.config.batch_plan import BatchPlan
from stablemoe_ds.config.costs import parameters
from stablemoe_ds.config.schema import RunConfig

TRIES = 10


def _fastest(action: Callable[[], object], device: torch.device) -> float:
    return min(timed(action, device)() for _ in range(TRIES))


def matrix_rate(device: torch.device, dtype: str) -> float:
    """FLOP/s of a large square matrix product, the best of a few."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    return 2 * size**3 / _fastest(lambda: a @ a, device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy within the device's memory reads and writes, the best of a few."""
    size = 2**30 if device.type == "cuda" else 2**27
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    return 2 * size / _fastest(lambda: b.copy_(a), device)


def least_bytes(run: RunConfig, plan: BatchPlan, ranks: int) -> float:
    """Bytes a rank must move for weights, gradients and optimizer state in one update; activations left out.

    A micro-batch reads each weight forward and backward and adds to its gradient in fp32. The update, which ZeRO and
    expert parallelism divide over the ranks, reads the gradient, reads and writes master weight and two moments, and
    writes the weight.
    """
    counts = parameters(run)
    here = counts.total - counts.expert + counts.expert / run.parallel.expert
    weight = 4 if run.precision.dtype == "fp32" else 2
    return here * plan.accumulation * (2 * weight + 8) + counts.total / ranks * (4 + 24 + weight)
