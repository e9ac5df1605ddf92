"""A request to stop, as schedulers and people send it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def handling(handler: Handler, *signals: signal.Signals) -> Iterator[None]:
    """Let ``handler`` take these signals; those before it are back afterwards. Main thread only."""
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class StopRequest:
    """Set by a signal, read by the training loop after each update."""

    def __init__(self) -> None:
        self.asked = False
        self._interrupted = False

    def on(self, *signals: signal.Signals) -> AbstractContextManager[None]:
        """Let these signals ask; see :func:`handling`."""
        return handling(self._ask, *signals)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:  # the second Ctrl-C ends the run at once, whatever else has asked before
                raise KeyboardInterrupt
            self._interrupted = True
        self.asked = True
