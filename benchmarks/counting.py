"""What a step does besides arithmetic, counted: collectives by kind, and reads of a tensor's value by the host."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "barrier": "barrier",
}
"""Operators of torch's process groups, by the name people use."""

VALUE_READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount"}
"""Operators whose result, or its size, the host must wait for; ``item`` and ``bool`` end in the first."""
VALUE_METHODS = {"tolist", "cpu", "numpy"}
"""Methods of a tensor that do the same and reach no operator where the tensor is on the CPU already."""


@dataclass
class Counts:
    """Of one thread. collectives: by kind. host_waits: by operator, method or, on CUDA, as one figure."""

    collectives: Counter[str] = field(default_factory=Counter)
    host_waits: Counter[str] = field(default_factory=Counter)


class _Operators(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.counts.collectives[COLLECTIVES.get(name, name)] += 1
        elif name in VALUE_READS:
            self.counts.host_waits[name] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (name := getattr(func, "__name__", "")) in VALUE_METHODS:
            self.counts.host_waits[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(device: torch.device) -> Iterator[Counts]:
    """Count what this thread does inside, backward passes included.

    Host waits on CUDA are those torch itself warns of, and calls that wait for everything given to the device. On a
    CPU nothing waits; counted are the calls that would, were the tensor on a device. Some of these tensors are on the
    host everywhere; and a copy to the host by ``to`` or ``copy_`` looks like any other copy here and is not counted.
    """
    counts = Counts()
    with _Methods(counts), _Operators(counts), _synchronizations(device) as synchronizations:
        if device.type == "cuda":
            with _warned_of() as waits:
                yield counts
            counts.host_waits = +Counter({"synchronizing operation": waits()})
        else:
            yield counts
    counts.host_waits += synchronizations


@contextmanager
def _synchronizations(device: torch.device) -> Iterator[Counter[str]]:
    """Calls that wait until the device has done all it was given, of which torch does not warn.

    On a CPU those of DeepSpeed's accelerator, through which it would make them on a GPU.
    """
    found: Counter[str] = Counter()
    places: list[Any] = [torch.cuda, torch.cuda.Stream, torch.cuda.Event]
    if device.type != "cuda":
        from deepspeed.accelerator import get_accelerator

        places.append(type(get_accelerator()))
    with ExitStack() as stack:
        for place in places:
            original = place.synchronize

            def counting(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
                found["synchronize"] += 1
                return original(*args, **kwargs)

            stack.enter_context(mock.patch.object(place, "synchronize", counting))
        yield found


@contextmanager
def _warned_of() -> Iterator[Callable[[], int]]:
    """How many times torch has warned inside that the host waits for the GPU, in any thread."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def listed(counts: Mapping[str, float]) -> str:
    """Counts by kind as text."""
    return ", ".join(f"{n:g} {kind}" for kind, n in sorted(counts.items())) or "none"
