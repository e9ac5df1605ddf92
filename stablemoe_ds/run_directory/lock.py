"""One writer at a time in a run directory.

``<run_dir>/run.lock`` says who writes there: host, process, since when. It is also locked with the kernel (POSIX,
``fcntl.lockf``) for as long as that process lives, however it ends; processes that it has forked do not hold it. Where
the file system carries such locks from host to host, as NFS does unless it is mounted with ``nolock`` or
``local_lock``, two hosts see each other's. Elsewhere the text of the file has to do: it says nothing about whether a
process on another host is still there, so a file left behind by one is refused and not taken over, except by the same
job. No torch here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path

from stablemoe_ds.errors import UserError

LOCK = "run.lock"
LAUNCH = "STABLEMOE_LAUNCH"
"""Variable with the name of a launch, the same for all its attempts: they come one after the other."""
PATIENCE, PATIENCE_WITH_OWN = 3.0, 180.0
"""Seconds to wait for a kernel's lock that may be about to go. The second if an earlier attempt of the same job has it:
an NFS server keeps the locks of a lost host for 90 seconds and more."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class InUseError(UserError):
    """Another process writes into the run directory, which has to be left alone."""


@dataclass(frozen=True)
class Writer:
    """A process that writes into a run directory.

    boot: the kernel's id of the host's current boot. began: when the process began, in clock ticks after that; a
    process that is given the same number later has another. since: when it took the directory. launch: name of its
    launch, "" without one. slurm, requeued: its SLURM job, and how often that had been requeued.
    """

    host: str
    pid: int
    since: str
    boot: str = ""
    began: int = 0
    launch: str = ""
    slurm: str = ""
    requeued: int = 0

    @classmethod
    def this_process(cls) -> Writer:
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            boot=_boot(),
            began=_began(os.getpid()) or 0,
            launch=os.environ.get(LAUNCH, ""),
            slurm=os.environ.get("SLURM_JOB_ID", ""),
            requeued=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )

    @property
    def gone(self) -> bool:
        """Whether a writer that holds no lock of the kernel has certainly ended."""
        if self.boot and self.boot == _boot():
            # Under another host name it is a container on this machine, whose locks are seen from here.
            return self.host != socket.gethostname() or _began(self.pid) != self.began
        return self.host == socket.gethostname() or self.earlier_attempt

    @property
    def earlier_attempt(self) -> bool:
        """Whether it belongs to an attempt of this process's job that was over before this one began."""
        me = Writer.this_process()
        same_launch = bool(self.launch) and self.launch == me.launch
        return same_launch or (bool(self.slurm) and self.slurm == me.slurm and self.requeued < me.requeued)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextmanager
def only_writer(run_dir: str | Path) -> Iterator[None]:
    """Be the only one to write into a run directory, which is made if it is not there.

    Raises InUseError if another process is, or may be; UserError if the directory cannot be written to.
    """
    path = Path(run_dir) / LOCK
    made = not path.parent.exists()
    try:
        file = _take(path)
    except OSError as error:
        raise UserError(f"cannot write to run directory {run_dir}: {error.strerror}: {error.filename}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            if _is_at(file, path):
                path.unlink()  # before it is closed, which lets the next one in
            if made:
                path.parent.rmdir()  # which fails if anything was written
        file.close()


def writer_of(run_dir: str | Path) -> Writer | None:
    """Who writes into a run directory; None if no process does.

    Not for the writer itself: its lock goes when it closes the file.
    """
    try:
        with open(Path(run_dir) / LOCK, "rb", buffering=0) as file:
            free, writer = _lock(file, fcntl.LOCK_SH), _read(file)
    except OSError:
        return None
    return None if free and writer is not None and writer.gone else writer


def _take(path: Path) -> FileIO:
    """The lock file, opened, locked and with our name in it. Raises InUseError or OSError."""
    began = time.monotonic()
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # who had it before may have just removed what it had made
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        free = _lock(file, fcntl.LOCK_EX)
        writer = _read(file)
        if free and not _is_at(file, path):
            file.close()  # who had it before has just removed it
            continue
        if free and (writer is None or writer.gone):
            file.seek(0)
            file.truncate()
            file.write(json.dumps(asdict(Writer.this_process())).encode() + b"\n")
            os.fsync(file.fileno())
            return file
        file.close()
        # A kernel's lock on another host, or on a process that is ending, may go in a moment.
        patience = PATIENCE_WITH_OWN if writer is not None and writer.earlier_attempt else PATIENCE
        if free or time.monotonic() - began > patience:
            raise InUseError(_refusal(path, writer, free))
        time.sleep(0.1)


def _lock(file: FileIO, kind: int) -> bool:
    """Lock a file with the kernel, if no other process has; True as well where the file system has no such locks."""
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _UNSUPPORTED:
            raise
    return True


def _read(file: FileIO) -> Writer | None:
    """The writer that a lock file names; None if it is empty, or was cut off as its writer died."""
    try:
        return Writer(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _refusal(path: Path, writer: Writer | None, free: bool) -> str:
    who = f"{path.parent} is in use: {writer or 'another process'} writes there"
    if free and writer is not None and writer.boot != _boot():
        return (
            f"{who}, as {path} says; from {socket.gethostname()} it cannot be seen whether that process still runs: if "
            f"it is certainly gone, remove {path}, else name another run_dir"
        )
    return f"{who}; wait until it has ended, stop it, or name another run_dir"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _began(pid: int) -> int | None:
    """When a process of this host began, in clock ticks after the boot; None if there is none, or only its remains."""
    try:
        # The name, in brackets, may hold anything; state is field 3, the start time field 22 (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
