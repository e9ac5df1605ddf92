"""Files as any other program would leave them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def follow_umask(path: str | Path) -> None:
    """Give a file the permissions of a new one; safetensors makes its files readable for their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def open_file(path: str | Path) -> BinaryIO:
    """Open a file to read its bytes. Raises OSError, also for a pipe or a device: reading those may never end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "a pipe or device, expected a file", str(path))
    return file
