"""What a rank does in the tests of checkpoints: look for one, write one, be killed while it writes."""

from __future__ import annotations

import errno
import os
import random
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from tests.distributed.worker import engine_of
from tests.training.runs import save_here

Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Flip:
    """Changes one bit of the byte at this share of a file."""

    file: str
    at: float

    def __call__(self, folder: Path) -> None:
        data = bytearray((folder / self.file).read_bytes())
        data[int(self.at * (len(data) - 1))] ^= 1
        (folder / self.file).write_bytes(data)


@dataclass(frozen=True)
class Cut:
    """Takes the last byte from a file."""

    file: str

    def __call__(self, folder: Path) -> None:
        (folder / self.file).write_bytes((folder / self.file).read_bytes()[:-1])


@dataclass(frozen=True)
class Remove:
    file: str

    def __call__(self, folder: Path) -> None:
        (folder / self.file).unlink()


@contextmanager
def mounted(folder: Path, megabytes: float) -> Iterator[None]:
    """A file system of this size. Skips the test where this process may not mount one."""
    folder.mkdir(parents=True)
    if os.system(f"mount -t tmpfs -o size={int(megabytes * 1024)}k tmpfs {folder} 2>/dev/null"):
        pytest.skip("needs the right to mount a file system, as root has")
    try:
        yield
    finally:
        os.system(f"umount {folder}")


def make_read_only(folder: Path) -> None:
    assert os.system(f"mount -o remount,ro {folder}") == 0


@dataclass(frozen=True)
class Search:
    """What a search for a checkpoint came to: the name of what was found and the warning, or the refusal."""

    name: str | None
    said: str


def search_here(run: RunConfig, cases: dict[str, tuple[str, Damage]], folder: Path) -> dict[str, list[Search]]:
    """Damage a checkpoint of a copy of the run, and look for the newest: with ``fallback``, then without.

    cases: name to the checkpoint's name and what to do to it.
    """
    from stablemoe_ds.checkpoint.restore import find_checkpoint

    found: dict[str, list[Search]] = {}
    with engine_of(run) as engine:
        for case, (name, damage) in cases.items():
            copy = folder / case.replace(" ", "-")
            if engine.groups.world.is_main:
                shutil.copytree(Path(run.directory) / "checkpoints", copy / "checkpoints")
                damage(copy / "checkpoints" / name)
            torch.distributed.barrier()
            found[case] = []
            for fallback in (True, False):
                policy = run.checkpoint.model_copy(update={"fallback": fallback})
                try:
                    chosen = find_checkpoint(str(copy), engine.model, engine.groups, policy)
                    assert chosen is not None
                    found[case].append(Search(chosen.checkpoint.path.name, chosen.warning or ""))
                except UserError as error:
                    found[case].append(Search(None, str(error)))
    return found


def refused_here(run: RunConfig, failing_rank: int | None) -> str:
    """Save, which goes wrong: on one rank for want of space, or wherever the folder is. What this rank is told."""
    from stablemoe_ds.checkpoint import saver
    from stablemoe_ds.checkpoint.reader import Progress

    def full(*_: Any) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device", "weights")

    with engine_of(run) as engine:
        if engine.groups.world.rank == failing_rank:
            saver.write_share = full
        try:
            save_here(engine, Progress(step=7))
        except OSError as error:
            return str(error)
    return "saved"


@dataclass
class Kills:
    """Count of savers that were killed. during: while a save was under way. lost: confirmed steps that were gone."""

    tried: int = 0
    survived: int = 0
    during: int = 0
    lost: int = 0
    newest: int = 0


def kill_here(run: RunConfig, tries: int, seed: int) -> Kills:
    """Fork a process that saves over and over, kill it at a random moment, and see what it has left; many times."""
    from stablemoe_ds.checkpoint.reader import check_everything
    from stablemoe_ds.run_directory.checkpoint_files import newest_checkpoint

    kills, moments = Kills(), random.Random(seed)
    with engine_of(run) as engine:
        began = time.perf_counter()
        _save_marked(engine, 1)
        span = 3 * (time.perf_counter() - began)
        step = 1
        for _ in range(tries):
            confirmed, begun = _killed_saver(engine, step, moments.uniform(0, span))
            newest = newest_checkpoint(run.directory)
            assert newest is not None, "nothing is left"
            checkpoint = check_everything(newest)
            found = checkpoint.progress.step
            mark = checkpoint.read("embedding.word_embeddings.weight")[0, 0].item()
            assert mark == found, f"{newest.name} holds the weights of step {mark}"
            kills.tried += 1
            kills.survived += confirmed <= found <= begun
            kills.during += begun > confirmed
            kills.newest += found == begun
            kills.lost += max(0, confirmed - found)
            # Now and then the same step is written again, as a run does that was set back.
            step = max(1, found - moments.choice((0, 0, 1)))
            _save_marked(engine, step)
    return kills


def _save_marked(engine: Any, step: int) -> None:
    """Save a model that says of which step it is."""
    from stablemoe_ds.checkpoint.reader import Progress

    with torch.no_grad():
        engine.model.embedding.word_embeddings.weight[0, 0] = step
    save_here(engine, Progress(step=step))


def _killed_saver(engine: Any, step: int, seconds: float) -> tuple[int, int]:
    """Save steps after ``step`` in a process of its own until it is killed; the last one confirmed, and begun."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            step += 1
            os.write(writer, b"b")
            _save_marked(engine, step)
            os.write(writer, b"e")
    os.close(writer)
    select.select([reader], [], [])  # it has begun
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told = b""
    while piece := os.read(reader, 4096):
        told += piece
    os.close(reader)
    return step + told.count(b"e"), step + told.count(b"b")
