"""Writing checkpoints while training goes on.

An update waits only until what this rank writes has been copied to host memory. A thread writes it, flushes it to the
disk, reads it back and compares. Ranks communicate through files, not collectives: each writes a receipt next to
its data; rank 0 waits for all receipts, writes the manifest and publishes the folder. A checkpoint that was copied is
therefore completed even if the run fails in the meantime.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stablemoe_ds.checkpoint.reader import TABLE, Progress, moments_file, weights_file
from stablemoe_ds.checkpoint.snapshot import Snapshot
from stablemoe_ds.checkpoint.state import TrainingState
from stablemoe_ds.files import follow_umask
from stablemoe_ds.run_directory.checkpoint_files import (
    FORMAT,
    flush,
    part_of,
    publish,
    sha256_of,
    write_at_once,
    write_manifest,
)
from stablemoe_ds.tables.table import RoutingTable

GRACE_SECONDS = 10.0
"""How long rank 0 waits for the others' receipts once the run is failing: they began to write when it did."""


@dataclass(frozen=True)
class Saved:
    """The outcome of a save. path: of the checkpoint. error: why it failed; the run can continue."""

    step: int
    path: Path
    error: OSError | None = None


@dataclass(frozen=True)
class _Job:
    """What one rank's thread has to write. manifest: on rank 0, without the entries that come from receipts."""

    step: int
    final: Path
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    table: RoutingTable | None
    attached: Mapping[str, bytes]
    manifest: dict[str, Any]


class Saver:
    """One process's part in saving. At most one checkpoint is being written at a time."""

    def __init__(
        self,
        state: TrainingState,
        tokenizer: str,
        tell: Callable[[Saved], None],
        attached: Mapping[str, bytes] | None = None,
    ) -> None:
        """Host memory for the copies is set aside at the first save.

        tokenizer: fingerprint for the manifest. tell: called with each outcome, in the thread that calls us.
        attached: content of the files that every checkpoint carries, by name; see :mod:`.attached`.
        """
        self._state, self._world, self._tell = state, state.groups.world, tell
        self._run_dir, self._attached = Path(state.run.directory), attached or {}
        self._described = {
            "format": FORMAT,
            "tokenizer": tokenizer,
            "vocab_size": state.model.vocab_size,
            "run": state.run.model_dump(mode="json"),
            "started_in": os.getcwd(),
        }
        # One thread for all saves: an update would have to wait for a new one to be scheduled.
        self._writer = ThreadPoolExecutor(1, "saver")
        self._pending: Future[Saved] | None = None
        self._last: Saved | None = None
        self._breaking = threading.Event()

    @cached_property
    def _snapshot(self) -> Snapshot:
        """Collective. Pinned memory of 12 bytes a parameter: a run that saves nothing does without."""
        return Snapshot(self._state)

    def begin(self, progress: Progress, table: RoutingTable | None) -> None:
        """Copy the run's state and start to write it. Collective; waits for the save before it.

        table: the frozen routing table, where there is one.
        """
        self._collect()
        final = self._run_dir / "checkpoints" / f"step-{progress.step:06d}"
        obstacle = self._prepare(part_of(final))
        if obstacle is not None:
            self._last = Saved(progress.step, final, obstacle)
            self._tell(self._last)
            return
        weights, moments = self._snapshot.take()
        if self._world.is_main:
            job = _Job(progress.step, final, weights, moments, table, self._attached, self._manifest(progress))
        else:
            job = _Job(progress.step, final, weights, moments, None, {}, {})
        self._pending = self._writer.submit(self._work, job)

    def poll(self) -> None:
        """Report the outcome if a save has ended. Does not wait."""
        if self._pending is not None and self._pending.done():
            self._collect()

    def finish(self) -> Saved | None:
        """Wait for a save in progress; returns the outcome of the last one, the same on all ranks. Collective."""
        self._collect()
        return self._from_main(self._last)

    def close(self) -> None:
        """Wait for a save in progress to finish, as far as it can in a run that may be failing."""
        self._breaking.set()
        self._collect()
        self._writer.shutdown()

    def _collect(self) -> None:
        if self._pending is not None:
            self._last, self._pending = self._pending.result(), None
            self._tell(self._last)

    def _prepare(self, part: Path) -> OSError | None:
        """Create the folder to write into, on rank 0; if that fails, all ranks learn why."""
        if self._world.size > 1:
            dist.barrier()  # no rank may still be writing into what is removed here
        obstacle = None
        if self._world.is_main:
            try:
                _make_empty(part)
            except OSError as error:
                obstacle = error
        return self._from_main(obstacle)

    def _from_main(self, value: Any) -> Any:
        if self._world.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self._world.device)
        return box[0]

    def _manifest(self, progress: Progress) -> dict[str, Any]:
        fp16 = self._state.run.precision.dtype == "fp16"
        return self._described | {
            "progress": asdict(progress),
            "optimizer_steps": self._snapshot.optimizer_steps,
            "loss_scale": float(self._state.optimizer.loss_scaler.cur_scale) if fp16 else None,
        }

    def _work(self, job: _Job) -> Saved:
        """The thread: write this rank's share; on rank 0 make it a checkpoint when all have written theirs."""
        part = part_of(job.final)
        try:
            number = f"{self._world.rank:04d}"
            receipt = write_share(part, number, job.weights, job.moments, job.table, job.attached)
            _leave(part, self._world.rank, receipt)
            if self._world.is_main:
                receipts = self._receipts(part)
                write_manifest(part, job.manifest | _merged(receipts))
                publish(part, job.final, self._state.run.checkpoint.keep)
                if job.table is not None:
                    _copy(job.final / TABLE, self._run_dir / TABLE)
            return Saved(job.step, job.final)
        except Exception as error:
            known = error if isinstance(error, OSError) else OSError(0, f"{type(error).__name__}: {error}", str(part))
            if self._world.is_main:
                shutil.rmtree(part, ignore_errors=True)
            else:
                _give_up(part, self._world.rank, known)
            return Saved(job.step, job.final, known)

    def _receipts(self, part: Path) -> list[dict[str, Any]]:
        """The receipts of all ranks, deleted. Raises OSError if a rank has failed or stays silent."""
        found: dict[int, dict[str, Any]] = {}
        began, pause = time.monotonic(), 0.005
        while True:
            for rank in range(self._world.size):
                file = part / _receipt(rank)
                if rank not in found and file.exists():
                    found[rank] = json.loads(file.read_text())
                    if failed := found[rank].get("error"):
                        raise OSError(failed[0], f"rank {rank}: {failed[1]}", failed[2])
                    file.unlink()
            if len(found) == self._world.size:
                return [found[rank] for rank in range(self._world.size)]
            patience = GRACE_SECONDS if self._breaking.is_set() else self._world.timeout.total_seconds()
            if time.monotonic() - began > patience:
                silent = sorted(set(range(self._world.size)) - found.keys())
                raise OSError(0, f"no word from rank {', '.join(map(str, silent))}", str(part))
            time.sleep(pause)
            pause = min(0.2, 2 * pause)


def write_share(
    folder: Path,
    part: str,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    table: RoutingTable | None,
    attached: Mapping[str, bytes],
) -> dict[str, Any]:
    """Write one rank's share and verify it on disk; returns its receipt: sizes, hashes, names of tensors.

    part: the rank's number, in the names of its files. attached: content of other files by name. Raises OSError.
    """
    files = []
    for name, tensors in ((weights_file(part), weights), (moments_file(part), moments)):
        if tensors:
            _write_tensors(folder / name, tensors)
            files.append(folder / name)
    if table is not None:
        table.save(folder / TABLE)
        flush(folder / TABLE)
        files.append(folder / TABLE)  # reading one checks it against its own digest
    for name, content in attached.items():
        (folder / name).write_bytes(content)
        flush(folder / name)
        files.append(folder / name)
    return {
        "files": {file.name: file.stat().st_size for file in files},
        "sha256": {file.name: sha256_of(file) for file in files},
        "tensors": dict.fromkeys(weights, part),
    }


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, flush it, read it back and compare. Raises OSError."""
    try:
        save_file(tensors, str(path))
        follow_umask(path)
        flush(path)
        with safe_open(str(path), framework="pt") as file:
            for name, wanted in tensors.items():
                if not torch.equal(file.get_tensor(name).view(torch.uint8), wanted.view(torch.uint8)):
                    raise OSError(0, f"{name} was not read back as it was written", str(path))
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        reason = str(error).split("I/O error: ")[-1].partition(" (os error")[0]
        raise OSError(int(number[1]) if number else 0, reason, str(path)) from error


def _make_empty(folder: Path) -> None:
    """Create an empty folder in place of what an earlier attempt left."""
    try:
        folder.mkdir()
    except FileNotFoundError:
        folder.mkdir(parents=True)
    except FileExistsError:
        shutil.rmtree(folder)
        folder.mkdir()


def _receipt(rank: int) -> str:
    return f"receipt-{rank:04d}.json"


def _leave(part: Path, rank: int, receipt: dict[str, Any]) -> None:
    write_at_once(part / _receipt(rank), json.dumps(receipt))


def _give_up(part: Path, rank: int, error: OSError) -> None:
    """Free the disk space, then inform rank 0, which may have given up already."""
    with suppress(OSError):
        for name in (weights_file(f"{rank:04d}"), moments_file(f"{rank:04d}")):
            (part / name).unlink(missing_ok=True)
        _leave(part, rank, {"error": [error.errno or 0, error.strerror or str(error), str(error.filename or part)]})


def _merged(receipts: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("files", "sha256", "tensors")
    return {key: {name: value for receipt in receipts for name, value in receipt[key].items()} for key in keys}


def _copy(source: Path, target: Path) -> None:
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, part)
    part.replace(target)
