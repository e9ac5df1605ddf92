"""Checkpoints as folders on a disk: what is in them, whether it is sound, and how one takes its place.

    <run_dir>/checkpoints/step-000120/
        checkpoint.json              the manifest: what the checkpoint is, size and sha256 of each file, its own digest
        weights-0000.safetensors     fp32 master weights; one file for each rank that wrote
        moments-0000.safetensors     Adam's moments, named <tensor>/exp_avg and <tensor>/exp_avg_sq
        routing_table.safetensors    from stage 2 on, if the distilled router is a table
        tokenizer.model              the tokenizer's own file, under its own suffix, if the run names one
        token_counts.npy             how often each id occurs in the training text, int64 [V]
    <run_dir>/checkpoints/latest     name of the newest complete one

A folder is made as ``.step-000120.part`` and renamed when all in it is on the disk and has been read back; ``latest``
moves after that. Where a checkpoint of the same step is replaced, it waits as ``.step-000120.old`` for its successor.
No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from stablemoe_ds.config.messages import show
from stablemoe_ds.config.textfile import LARGEST_LIST, LARGEST_MANIFEST, read_json, read_text
from stablemoe_ds.errors import UserError

FORMAT = "stablemoe-checkpoint-1"
MANIFEST = "checkpoint.json"
LATEST = "latest"
CHECKPOINTS = "checkpoints"
"""Where a run directory has its checkpoints."""


class DamagedError(UserError):
    """A checkpoint is not what was written: another one may still be."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_at_once(path: Path, text: str) -> None:
    """Replace a file: a reader finds either the old text or the new one, even after a power failure."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    flush(part)
    part.replace(path)
    flush(path.parent)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_at_once(folder / MANIFEST, json.dumps({**manifest, "digest": _digest(manifest)}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What :func:`write_manifest` wrote. Raises DamagedError if it is not, UserError if it is of another format."""
    file = folder / MANIFEST
    try:
        manifest = read_json(file, "the manifest of a checkpoint", LARGEST_MANIFEST)
    except UserError as error:
        raise DamagedError(f"cannot read the manifest {error}") from error
    found, digest = manifest.get("format"), manifest.pop("digest", None)
    if found is None:
        raise DamagedError(f"cannot read the manifest {file}: it names no format")
    if digest is not None and digest != _digest(manifest):
        raise DamagedError(f"checkpoint {folder} is damaged: {MANIFEST} does not have the digest it names")
    if found != FORMAT:
        raise UserError(f"{folder} has format {found!r}, this version reads {FORMAT!r}")
    return dict(manifest)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise DamagedError if a file of a checkpoint is missing or cut short."""
    for name, size in manifest["files"].items():
        try:
            found = (folder / name).stat().st_size
        except FileNotFoundError:
            found = None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, expected {size}"
            raise DamagedError(f"checkpoint {folder} is damaged: {name} {state}")


def check_hashes(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Raise DamagedError if a byte of these files is not what was written. Reads them: about 1.5 GB/s with SHA-NI."""
    for name in names:
        wanted = manifest.get("sha256", {}).get(name)
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise DamagedError(f"checkpoint {folder} is damaged: {name}: {error.strerror}") from error
        if wanted not in (None, found):
            raise DamagedError(
                f"checkpoint {folder} is damaged: {name} has sha256 {found[:12]}, expected {wanted[:12]}: "
                "its content has changed since it was written"
            )


def is_complete(folder: Path) -> bool:
    """Whether manifest and all files are there in full size."""
    try:
        check_sizes(folder, read_manifest(folder))
    except (UserError, KeyError):
        return False
    return True


def part_of(final: Path) -> Path:
    """Where a checkpoint is made before it takes its place."""
    return final.with_name(f".{final.name}.part")


def publish(part: Path, final: Path, keep: int) -> None:
    """Move a finished folder to its place, then ``latest``, then delete all but the ``keep`` newest complete ones.

    However this is cut short, :func:`saved_checkpoints` begins with a complete checkpoint, if there was one.
    """
    folder, old = final.parent, _old_of(final)
    flush(part)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    part.rename(final)
    flush(folder)
    write_at_once(folder / LATEST, final.name)
    _prune(folder, final, keep)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Delete what is neither ``newest`` nor among the ``keep - 1`` complete ones before it."""
    others = [path for path in _newest_first(folder) if path != newest]
    kept = [path for path in others if is_complete(path)][: keep - 1]
    for path in others:
        if path not in kept:
            path.rename(_old_of(path))  # a half-deleted folder never looks like a checkpoint
    for left_over in [*folder.glob(".step-*.old"), *folder.glob(".step-*.part")]:
        shutil.rmtree(left_over, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoints by time, not by step: a run that was set back writes lower steps than the ones it has abandoned.

    The step decides where a file system's clock does not tell them apart. One that a running job deletes in this moment
    is left out.
    """
    written: dict[Path, float] = {}
    for path in folder.glob("step-*"):
        with suppress(OSError):
            written[path] = path.stat().st_mtime
    return sorted(written, key=lambda path: (written[path], path.name), reverse=True)


def _old_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def saved_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder: the one that ``latest`` names, then the others from the newest on.

    Each may be damaged; the first may be missing, if ``latest`` names one that is gone.
    """
    found = _newest_first(folder)
    try:
        latest = folder / read_text(folder / LATEST, "the name of a checkpoint", LARGEST_LIST).strip()
        if latest.parent != folder or latest.name == ".." or not latest.name.isprintable():
            raise UserError(f"{folder / LATEST}: got {show(latest.name)}: expected the name of a folder next to it")
    except UserError:  # missing or damaged: the folders speak for themselves
        return [path for path in found if is_complete(path)]
    if not latest.exists() and _old_of(latest).exists():
        latest = _old_of(latest)  # its successor was about to take its place
    return [latest, *(path for path in found if path != latest)]


def saved_checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run directory; see :func:`saved_in`."""
    return saved_in(Path(run_dir) / CHECKPOINTS)


def find_checkpoint(path: str | Path) -> Path:
    """The directory of a checkpoint: this one, or the newest of a run directory or of a folder of checkpoints.

    Raises UserError if there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    saved = saved_checkpoints(path) or saved_in(path)
    if not saved:
        raise UserError(
            f"no checkpoint at {path}: expected {MANIFEST}, or {CHECKPOINTS}/ as in a run directory, or what "
            "is in that folder"
        )
    return saved[0]


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run directory, None if it has none."""
    return next(iter(saved_checkpoints(run_dir)), None)
