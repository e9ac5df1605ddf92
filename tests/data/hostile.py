"""Ways in which a file can be other than it should be."""

from __future__ import annotations

import os
import subprocess
import sys
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


DAMAGE_A_TOKENIZER = """
import random, sys
from pathlib import Path
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError

good, path, cut_every, draw = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), int(sys.argv[3]), random.Random(0)
text, refused = "def area(width):\\n\\t7: eight \\u4e2d\\U0001f600\\0<s>", 0
for number in range(400):
    cut = number % cut_every == 0
    bad = bytearray(good[: draw.randrange(len(good))] if cut else good)
    for _ in range(0 if cut else draw.randint(1, 9)):
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
    path.write_bytes(bad)
    try:
        tokenizer = Tokenizer(path)
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)
        assert all(tokenizer.piece(i) and 0 <= i < tokenizer.vocab_size for i in ids)
    except UserError as error:
        assert str(path) in str(error) and str(error).isprintable(), error
        refused += 1
print(refused)
"""


def refused_when_damaged(tokenizer: Path, cut_every: int) -> int:
    """How many of 400 damaged copies are refused in one line; the others have to work.

    One of ``cut_every`` copies is cut short, the others have some bits changed. In a process of its own, since the
    library that reads them might take it down.
    """
    bad = tokenizer.with_name(f"bad{tokenizer.suffix}")
    words = [sys.executable, "-c", DAMAGE_A_TOKENIZER, str(tokenizer), str(bad), str(cut_every)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)
