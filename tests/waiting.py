"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 120.0
"""Seconds for what takes a moment on a machine that has nothing else to do."""


def wait_until(
    what: str, met: Callable[[], bool], seconds: float = PATIENCE, evidence: Callable[[], str] = str
) -> None:
    """Poll until ``met()``; raises AssertionError that says what was awaited, and the evidence."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}\n{evidence()}"
        time.sleep(0.02)
