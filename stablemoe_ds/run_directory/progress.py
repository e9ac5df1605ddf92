"""How far the run of a directory is, and what its launches have reported. No torch here."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stablemoe_ds.config.load import load_run
from stablemoe_ds.config.resolved import saved_run
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.config.textfile import LARGEST_MANIFEST, read_json
from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.checkpoint_files import check_sizes, read_manifest, saved_checkpoints

REFUSED = "bad input"
"""In the report of a rank that ends with a UserError: if its peers were restarted, they would lose it again."""


@dataclass(frozen=True)
class Saved:
    """The newest complete checkpoint: how many updates it has, and the run that wrote it."""

    step: int
    run: RunConfig


def newest_saved(run_dir: str | Path) -> Saved | None:
    """The newest checkpoint of a run directory with all its files; None if there is none."""
    for path in saved_checkpoints(run_dir):
        try:
            manifest = read_manifest(path)
            check_sizes(path, manifest)
            return Saved(int(manifest["progress"]["step"]), saved_run(manifest["run"]))
        except (UserError, ValueError, KeyError, TypeError):
            continue  # not complete, or of another version: nothing to go on from
    return None


def newest_launch(run_dir: Path) -> Path | None:
    """Folder of a run's latest launch; names of launches sort by time."""
    return max((path.parent for path in run_dir.glob("launch/*/job.json")), default=None, key=lambda path: path.name)


def launched_run(run_dir: Path) -> RunConfig | None:
    """The run as it was launched last; None if it never was, or not by this version."""
    folder = newest_launch(run_dir)
    try:
        return load_run(folder / "run.yaml") if folder else None
    except UserError:
        return None


def reported_steps(run_dir: Path) -> int:
    """Length of the run that ``report.json`` is about, which may be an earlier, shorter one; 0 without a report."""
    try:
        return int(read_json(run_dir / "report.json", "the report of a run", LARGEST_MANIFEST)["steps"])
    except (UserError, ValueError, KeyError, TypeError):
        return 0


def refusals(run_dir: Path) -> set[tuple[str, int]]:
    """Words of bad input that ranks have left: which file, and when it was written, in ns."""
    found: set[tuple[str, int]] = set()
    for path in run_dir.glob("launch/fault-*.txt"):
        with suppress(OSError):  # a rank that starts takes back its word
            if f": {REFUSED}: " in path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]:
                found.add((path.name, path.stat().st_mtime_ns))
    return found
