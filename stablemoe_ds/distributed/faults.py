"""What ends a run from outside or inside. Every rank reports it in one line: who noticed, where, why, what to do.

Each rank that fails leaves ``<run_dir>/launch/fault-<rank>.txt``: the line, and the traceback under it. The other
ranks read there why they have lost it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from stablemoe_ds.distributed.groups import World
from stablemoe_ds.errors import BAD_INPUT, CLUSTER_FAULT, OWN_FAULT, RunError, UserError
from stablemoe_ds.run_directory.checkpoint_files import newest_checkpoint
from stablemoe_ds.run_directory.lock import InUseError
from stablemoe_ds.run_directory.progress import REFUSED

LOST = "lost contact"
"""In the line of a rank that noticed only that others are gone."""
REPORT_SECONDS = 2.0
"""How long a rank that has lost contact waits for the others to say what happened to them."""
NAMED_PEERS = 4
_WORKER = "in DataLoader worker process"


@dataclass
class Place:
    """Where a run is: the update (from 1, 0 before the first) and since when."""

    update: int = 0
    since: float = field(default_factory=time.monotonic)

    def enter(self, update: int) -> None:
        self.update, self.since = update, time.monotonic()

    def __str__(self) -> str:
        when = f"in update {self.update}" if self.update else "before the first update"
        return f"{when}, {time.monotonic() - self.since:.1f} s after it began"


@contextmanager
def naming_faults(world: World, run_dir: str, place: Place) -> Iterator[None]:
    """Turn whatever ends the run into a RunError of one line, the exception itself as its cause.

    UserErrors and Ctrl-C pass. STABLEMOE_TRACEBACK=1 shows the traceback on stderr, too; errors in this program,
    which no other description fits, always do.
    """
    folder = Path(run_dir) / "launch"
    mine = folder / f"fault-{world.rank:04d}.txt"
    with suppress(OSError):
        mine.unlink()  # of an attempt before this one
    try:
        yield
    except InUseError:
        raise  # another process owns the directory, so nothing is written into it
    except UserError as error:
        line = _last_line(error) if _WORKER in str(error) else str(error)  # a reader's comes wrapped in a traceback
        if world.size > 1:  # alone there is nobody to read it, and bad input is refused before anything is written
            _leave_word(mine, f"rank {world.rank} {place}: {REFUSED}: {line}", error)
        raise UserError(line) from error
    except Exception as error:
        what, code = _describe(error)
        line = f"rank {world.rank} {place}: {what}"
        story = _leave_word(mine, line, error)
        if what.startswith(LOST):
            others = _others(folder, world)
            line += f"; {others}"
            code = BAD_INPUT if f": {REFUSED}: " in others else code
        if os.environ.get("STABLEMOE_TRACEBACK") == "1" or what.startswith("error in "):
            print(story, file=sys.stderr, flush=True)
        raise RunError(f"{line}. Started again, the run {_outlook(run_dir, code)}. Details: {mine}", code) from error


def _outlook(run_dir: str, code: int) -> str:
    if code == BAD_INPUT:
        return "fails in the same way"
    newest = newest_checkpoint(run_dir)
    return f"goes on after {newest.name}" if newest else "starts over, as nothing is saved yet"


def _leave_word(file: Path, line: str, error: Exception) -> str:
    """Write down what happened, for the other ranks and for people; returns the traceback."""
    story = "".join(traceback.format_exception(error))
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{line}\n\n{story}")
    return story


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in the main thread if the block takes longer, wherever it waits."""

    def ring(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"{what} took longer than {seconds:g} s (parallel.timeout_minutes)")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _describe(error: Exception) -> tuple[str, int]:
    """What happened in a few words, and the exit code."""
    text = str(error)
    if _WORKER in text:
        return f"reading data failed: {_last_line(error)}", OWN_FAULT
    if "DataLoader worker" in text:
        return f"reading data failed: {text.splitlines()[0].rstrip('. ')}", OWN_FAULT
    if isinstance(error, TimeoutError):
        return text, OWN_FAULT
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        advice = "a smaller parallel.micro_batch or parallel.recompute=true takes less"
        return f"out of memory in {_function(error)}; {advice}", OWN_FAULT
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
        return f"{LOST} with other ranks in {_function(error)} ({_short(text)})", CLUSTER_FAULT
    if isinstance(error, OSError):
        return f"{error.strerror or text} in {_function(error)}: {error.filename or text}", OWN_FAULT
    return f"error in {_function(error)}: {type(error).__name__}: {_last_line(error)}", OWN_FAULT


def _function(error: Exception) -> str:
    """The innermost function of this package that the exception came through, as ``room.file.function``."""
    package = Path(__file__).parents[1]
    found = "the libraries"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = Path(frame.f_code.co_filename)
        if code.is_relative_to(package):
            found = ".".join((*code.relative_to(package).with_suffix("").parts, frame.f_code.co_name))
    return found


def _others(folder: Path, world: World) -> str:
    """What the other ranks have reported: a fault of their own if there is one, otherwise who is silent."""
    ranks = [rank for rank in range(world.size) if rank != world.rank]
    end = time.monotonic() + REPORT_SECONDS
    while True:
        words = {rank: _first_line(folder / f"fault-{rank:04d}.txt") for rank in ranks}
        causes = [line for line in words.values() if line and LOST not in line]
        silent = [rank for rank, line in words.items() if not line]
        if causes or not silent or time.monotonic() > end:
            break
        time.sleep(0.05)
    if causes:
        return f"the cause is: {causes[0]}"
    if not silent:
        return "so have all the others: the network between them, or this rank, stood still"
    named = ", ".join(map(str, silent[:NAMED_PEERS])) + (" and more" if len(silent) > NAMED_PEERS else "")
    return f"no word from rank {named}: killed, hung, or its host is gone"


def _first_line(file: Path) -> str:
    try:
        return file.read_text().partition("\n")[0]
    except OSError:
        return ""


def _last_line(error: Exception) -> str:
    """The message under a traceback that torch has put into a message."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else ""


def _short(text: str) -> str:
    """First sentence of a library's message, without the source file it comes from."""
    return text.partition("] ")[2].partition(". ")[0].splitlines()[0] if text.startswith("[") else text.splitlines()[0]
