"""The ranks' logs of a launch, wherever its launcher has put them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from stablemoe_ds.errors import UserError

RANK_LOG = re.compile(
    r"""(?: rank-(\d+)(?:\.attempt-[\d.]+)?\.log          # local, SLURM
          | [^/]*_rank(\d+)\.log                          # deepspeed
          | rank\.[^/]*\.(\d+)\.(?:out|err)               # Open MPI 5
          | rank\.(\d+)/std(?:out|err)                    # Open MPI 4
          | attempt_\d+/(\d+)/std(?:out|err)\.log         # torchrun: number on its machine
        )$""",
    re.VERBOSE,
)


def rank_of(path: str) -> int | None:
    """Which rank a log is of, by its path; None for other files."""
    found = RANK_LOG.search(path)
    return next(int(number) for number in found.groups() if number) if found else None


def rank_logs(logs: Path, rank: int) -> list[Path]:
    """All logs of a rank, those of earlier attempts first."""
    folders = [path for path in logs.parent.glob(f"{logs.name}*") if path.is_dir()]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sorted((path for path in files if rank_of(str(path)) == rank), key=lambda path: path.stat().st_mtime)


def set_aside(logs: Path, attempt: int) -> None:
    """Keep the logs of an attempt under another name, and make room for the next."""
    if logs.is_dir():
        logs.rename(logs.with_name(f"{logs.name}.attempt-{attempt}"))
    logs.mkdir(parents=True)


class Tail:
    """What is new in a rank's logs since the last look. Files are known by their inode: they may be renamed."""

    def __init__(self, logs: Path, rank: int) -> None:
        self.logs, self.rank = logs, rank
        self._read: dict[int, int] = {}

    def new(self) -> Iterator[bytes]:
        """Text that was added, file by file."""
        for path in rank_logs(self.logs, self.rank):
            try:
                with path.open("rb") as file:
                    inode = path.stat().st_ino
                    file.seek(self._read.get(inode, 0))
                    text = file.read()
            except OSError:
                continue  # renamed a moment ago; found again next time
            self._read[inode] = self._read.get(inode, 0) + len(text)
            if text:
                yield text


def require_logs(logs: Path, rank: int) -> None:
    """Raise UserError unless a rank has a log."""
    if rank_logs(logs, rank):
        return
    folders = logs.parent.glob(f"{logs.name}*")
    known = sorted(
        {found for folder in folders for path in folder.rglob("*") if (found := rank_of(str(path))) is not None}
    )
    there = f"there are logs of ranks {known[0]} to {known[-1]}" if known else "no rank has started yet"
    raise UserError(f"{logs}: no log of rank {rank}: {there}")
