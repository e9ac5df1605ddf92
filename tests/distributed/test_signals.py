"""Requests to stop, one after the other."""

from __future__ import annotations

import signal

import pytest

from stablemoe_ds.distributed.signals import StopRequest


@pytest.mark.parametrize("before", [signal.SIGUSR1, signal.SIGTERM, None])
def test_only_the_second_ctrl_c_ends_the_run(before: signal.Signals | None) -> None:
    stop = StopRequest()
    with stop.on(signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        if before:
            signal.raise_signal(before)
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
