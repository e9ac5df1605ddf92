"""What a group of ranks can do: collectives that deliver what was sent, how fast, and clocks that agree.

Imports torch; :mod:`stablemoe_ds.launch.doctor.rank_probe` imports it when it is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

MIB = 2**20
SIZES = {"cpu": (1, 16), "cuda": (1, 64)}
"""MiB that a rank holds: small, where latency shows, and large, where bandwidth does."""
ROUNDS = {"cpu": 3, "cuda": 5}
PINGS = 5


@dataclass(frozen=True)
class Speed:
    """A collective's. gb_per_second: bus bandwidth of a rank as nccl-tests define it, comparable to a network's."""

    collective: str
    backend: str
    mib: int
    gb_per_second: float


def join(store: dist.Store, rank: int, size: int, local_rank: int, gpu: bool, seconds: float) -> torch.device:
    """Make the group of all ranks, over gloo and, with GPUs, also nccl; returns this rank's device.

    seconds: how long this and each collective may take. Raises RuntimeError if ranks cannot connect.
    """
    if gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    return torch.device("cuda", local_rank) if gpu else torch.device("cpu")


def speeds(device: torch.device) -> list[Speed]:
    """All-reduce and all-to-all at each size; the same on all ranks. Raises RuntimeError if data arrive wrong."""
    _check_what_arrives(device)
    size = dist.get_world_size()
    backend = "nccl" if device.type == "cuda" else "gloo"
    found = []
    for mib in SIZES[device.type]:
        rows = torch.zeros(size, mib * MIB // 4 // size, device=device)
        arrived = torch.empty_like(rows)
        share = rows.nbytes * (size - 1) / size  # what has to leave a rank at least
        reducing = _seconds(partial(dist.all_reduce, rows), device)
        exchanging = _seconds(partial(dist.all_to_all_single, arrived, rows), device)
        found.append(Speed("all-reduce", backend, mib, 2 * share / reducing / 1e9))
        found.append(Speed("all-to-all", backend, mib, share / exchanging / 1e9))
    return found


def clock_offset() -> float:
    """Seconds this rank's clock is ahead of rank 0's, as far as the quickest of a few round trips tells."""
    rank, found = dist.get_rank(), [(0.0, 0.0)]
    for other in range(1, dist.get_world_size()):
        if rank == 0:
            for _ in range(PINGS):
                dist.recv(_now(), other)
                dist.send(_now(), other)
        elif rank == other:
            found = [_ping() for _ in range(PINGS)]
    return min(found)[1]


def _ping() -> tuple[float, float]:
    """(seconds of the round trip, seconds ahead of rank 0)."""
    there, sent = _now(), time.time()
    dist.send(_now(), 0)
    dist.recv(there, 0)
    back = time.time()
    return back - sent, (sent + back) / 2 - there.item()


def _now() -> Tensor:
    return torch.tensor([time.time()], dtype=torch.float64)


def _seconds(operate: Callable[[], object], device: torch.device) -> float:
    """Mean time of an operation on the slowest rank, after one that does not count."""
    operate()
    _in_step(device, 0.0)
    start = time.perf_counter()
    for _ in range(ROUNDS[device.type]):
        operate()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _in_step(device, time.perf_counter() - start) / ROUNDS[device.type]


def _in_step(device: torch.device, value: float) -> float:
    """Wait for all ranks; returns the largest of their values."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    largest = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def _check_what_arrives(device: torch.device) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    total = torch.full((4,), float(rank + 1), device=device)
    dist.all_reduce(total)
    arrived = torch.empty(size, device=device)
    dist.all_to_all_single(arrived, torch.full((size,), float(rank), device=device))
    if total.tolist() != [size * (size + 1) / 2] * 4 or arrived.tolist() != [float(other) for other in range(size)]:
        raise RuntimeError(f"collectives deliver something else than was sent: {total.tolist()}, {arrived.tolist()}")
