"""Files as any other program would leave them."""

from __future__ import annotations

import os
from pathlib import Path


def follow_umask(path: str | Path) -> None:
    """Give a file the permissions of a new one; safetensors lets nobody but its owner read what it writes."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)
