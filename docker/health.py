"""Whether a container is in health: a run that trains in it has written something lately.

The last sign of life is the newest of three: the start of the process, a line in ``metrics.jsonl``, a checkpoint. The
run is unhealthy when that is more than STABLEMOE_STALL_MINUTES (default 30) ago. A container that trains nothing is
in health if what a run needs can be imported. Exit status 0: healthy, 1: not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from stablemoe_ds.config.load import load_run
from stablemoe_ds.errors import UserError

STALL_MINUTES = float(os.environ.get("STABLEMOE_STALL_MINUTES", "30"))
NEEDED = "import deepspeed, megatron.core, stablemoe_ds.training.trainer"


def training_here() -> Iterator[tuple[Path, float]]:
    """Directory of each run that a process of this container trains, and when that process began."""
    for process in psutil.process_iter():
        try:
            # With the host's process ids shared, other containers are in sight as well.
            if not os.path.samefile(f"/proc/{process.pid}/root", "/"):
                continue
            words, folder, began = process.cmdline(), process.cwd(), process.create_time()
        except (psutil.Error, OSError):  # it has ended, or is somebody else's
            continue
        if "train" in words and any(Path(word).name in ("stablemoe", "stablemoe_ds") for word in words):
            path, *overrides = [word for word in words[words.index("train") + 1 :] if not word.startswith("-")] or [""]
            try:
                yield Path(folder, load_run(Path(folder, path), overrides).directory), began
            except UserError:
                continue  # the process is about to say so itself


def last_sign(directory: Path, began: float) -> float:
    """Seconds since the epoch."""
    signs = (directory / "metrics.jsonl", directory / "checkpoints")
    return max([began, *(sign.stat().st_mtime for sign in signs if sign.exists())])


def main() -> int:
    runs = list(training_here())
    for directory, began in runs:
        silent = (time.time() - last_sign(directory, began)) / 60
        print(f"{directory}: last sign of life {silent:.1f} minutes ago")
        if silent > STALL_MINUTES:
            return 1
    return 0 if runs else subprocess.run([sys.executable, "-W", "ignore", "-c", NEEDED], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
