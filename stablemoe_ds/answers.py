"""Standard output belongs to what a command answers; whatever libraries print goes to standard error.

DeepSpeed, megatron-core and the compilers that they start all print to standard output. A script that reads ``--json``
needs it to hold nothing but the answer.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_reserved: list[tuple[TextIO, int]] = []
"""Standard output as it was before it was reserved: as a file, and as a descriptor."""


@contextmanager
def reserve_stdout() -> Iterator[None]:
    """Within this context, only :func:`stream` writes to standard output.

    ``sys.stdout`` and file descriptor 1, to which compiled code and child processes write, lead to standard error.
    """
    before = sys.stdout
    before.flush()
    original = os.dup(1)
    kept = before
    if isinstance(before, io.TextIOWrapper) and _writes_to(before, 1):
        # A terminal that lacks a letter shows its code instead.
        kept = open(os.dup(1), "w", encoding=before.encoding, errors="backslashreplace")  # noqa: SIM115
    _reserved.append((kept, original))
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        _reserved.pop()
        sys.stdout = before
        os.dup2(original, 1)
        os.close(original)
        if kept is not before:
            kept.close()


def _writes_to(file: TextIO, number: int) -> bool:
    try:
        return file.fileno() == number
    except OSError:  # a stand-in that writes to memory
        return False


def stream() -> TextIO:
    """The stream that answers are written to."""
    return _reserved[-1][0] if _reserved else sys.stdout


def descriptor() -> int | None:
    """``stdout`` for a child process whose output is the answer; None: that of this process."""
    return _reserved[-1][1] if _reserved else None


def answer(text: str, end: str = "\n") -> None:
    """Write a text to standard output and flush it."""
    print(text, end=end, file=stream(), flush=True)


def nobody_listens() -> None:
    """Discard further output, because the reader of standard output has closed it, as ``head`` does."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream().fileno())
    os.close(nowhere)
