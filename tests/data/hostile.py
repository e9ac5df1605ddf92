"""Ways in which a file can be other than it should be."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import strategies as st

from stablemoe_ds.errors import UserError

SHARES = st.floats(0, 1, exclude_max=True)


@dataclass(frozen=True)
class Damage:
    """A file cut short to a share of its length, and bits changed in bytes, each named by where in the file it is."""

    keep: float = 1.0
    flips: tuple[tuple[float, int], ...] = ()

    def __call__(self, content: bytes) -> bytes:
        changed = bytearray(content[: int(self.keep * len(content))])
        for place, bits in self.flips:
            changed[int(place * len(changed))] ^= bits
        return bytes(changed)


CUTS = st.builds(Damage, keep=SHARES)
FLIPS = st.builds(Damage, flips=st.lists(st.tuples(SHARES, st.integers(1, 255)), min_size=1, max_size=9).map(tuple))
DAMAGES = CUTS | FLIPS


def empty(path: Path) -> None:
    path.write_bytes(b"")


def missing(path: Path) -> None:
    path.unlink()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    """Without a writer: to open it for reading would take for ever."""
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    """Without an end."""
    path.unlink()
    path.symlink_to("/dev/zero")


def unreadable(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.chmod(0)


STRANGE = [empty, missing, directory, pipe, device, unreadable]


def complaint(read: Callable[[], object], name: str) -> str | None:
    """What a reader has to say of a file, on one line that names it; None if it takes the file."""
    try:
        read()
    except UserError as error:
        message = str(error)
        assert name in message
        assert message.isprintable(), message
        assert len(message) < 500
        return message
    return None
