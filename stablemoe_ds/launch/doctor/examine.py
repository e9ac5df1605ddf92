"""``stablemoe doctor``: what this machine has, and what would fail on it. It reads and tries, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stablemoe_ds.launch.doctor import installation, machine
from stablemoe_ds.launch.doctor.findings import Finding, render

__all__ = ["CHECKS", "Finding", "examine", "render"]

CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    installation.python,
    installation.torch_build,
    installation.pinned_packages,
    installation.sentencepiece,
    installation.mpi,
    installation.launchers,
    machine.gpus,
    machine.cores_and_memory,
    machine.threads,
    machine.shared_memory,
    machine.disk,
    machine.stale_locks,
    machine.loopback,
)
"""In the order in which a person would put things right."""


def examine() -> list[Finding]:
    """Look at everything; takes as long as a few imports of torch."""
    return [finding for check in CHECKS for finding in check()]
