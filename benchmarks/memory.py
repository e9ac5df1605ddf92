"""How much memory a forward and a backward pass take at their peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object], leaves: Iterable[Tensor], device: torch.device) -> int:
    """The most memory that ``step`` holds at once beyond what is held before and the gradients of ``leaves``.

    On a GPU from torch's allocator; on a CPU from the profiler's record of every tensor made and freed.
    """
    leaves = list(leaves)
    for leaf in leaves:
        leaf.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step()
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    return peak - sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
