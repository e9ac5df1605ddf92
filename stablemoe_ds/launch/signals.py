"""A request to stop, as schedulers and people send it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Set by a signal, read by the training loop after each update."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def on(self, *signals: signal.Signals) -> Iterator[None]:
        """Let these signals ask; the handlers before are back afterwards. Main thread only."""
        before = {number: signal.signal(number, self._ask) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:  # the second Ctrl-C ends the run at once
            raise KeyboardInterrupt
        self.asked = True
