"""What has become of a launch: its job, how far it is, what is saved."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stablemoe_ds.config.load import load_run
from stablemoe_ds.config.text_table import aligned
from stablemoe_ds.config.textfile import LARGEST_LIST, read_json
from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.lock import writer_of
from stablemoe_ds.run_directory.progress import launched_run, newest_launch, newest_saved

TAIL_BYTES = 1 << 16


def run_directories(given: str | None) -> list[Path]:
    """The run directory that a path or a run's YAML names; without one, all launched runs under ``runs/``.

    Raises UserError if there is none.
    """
    if given is None:
        found = sorted({path.parents[2] for path in Path("runs").glob("*/launch/*/job.json")})
        if not found:
            raise UserError("runs/: nothing was launched here; name a run directory or a run's YAML file")
        return found
    path = Path(given)
    folder = Path(load_run(path).directory) if path.is_file() else path
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run directory; stablemoe launch or train creates it")
    return [folder]


def logs_of(run_dir: Path) -> Path:
    """Where the ranks' logs of the latest launch are. Raises UserError if the run was never launched."""
    folder = newest_launch(run_dir)
    if folder is None:
        raise UserError(f"{run_dir}: no launch is recorded there; was it started with stablemoe launch?")
    inside = folder / "logs"  # wherever the run directory lies now, and the command is given
    job = _read_json(folder / "job.json")
    return inside if inside.is_dir() else Path(job.get("working_directory") or ".", job.get("logs", ""))


def status(run_dir: Path) -> dict[str, Any]:
    """Facts of a run for ``stablemoe status``; None where nothing is known."""
    folder, saved = newest_launch(run_dir), newest_saved(run_dir)
    job = _read_json(folder / "job.json") if folder else {}
    last = next(_newest_lines(run_dir / "metrics.jsonl", "train"), {})
    run = launched_run(run_dir) or (saved.run if saved else None)
    attempts = list(_lines(run_dir / "launch" / "attempts.jsonl"))
    state, job_ids = _state(folder, job) if folder else (None, [])
    writer = writer_of(run_dir)
    return {
        "run": job.get("run", run_dir.name),
        "run_dir": str(run_dir),
        "launcher": job.get("launcher"),
        "launch": str(folder) if folder else None,
        "job_ids": job_ids,
        "state": state,
        "step": last.get("step"),
        "steps": run.schedule.steps if run else None,
        "loss": last.get("loss"),
        "tokens_per_second": last.get("tokens_per_second"),
        "checkpoint_step": saved.step if saved else None,
        "attempts_ended": len(attempts),
        "last_exit_code": attempts[-1].get("exit_code") if attempts else None,
        "writer": str(writer) if writer else None,
    }


COLUMNS = (
    "run",
    "state",
    "launcher",
    "job",
    "step",
    "loss",
    "tokens/s",
    "checkpoint",
    "attempts",
    "in use by",
    "launch",
)
RARE = ("job", "attempts", "in use by")
"""Columns that are left out where no run has anything in them."""


def render(runs: Sequence[dict[str, Any]]) -> str:
    """The facts of runs for a person: a line for each run."""
    cells = [_cells(facts) for facts in runs]
    shown = [name for name in COLUMNS if name not in RARE or any(row[name] for row in cells)]
    numbers = {shown.index(name) for name in ("step", "loss", "tokens/s", "checkpoint")}
    return aligned([shown, *([row[name] or "–" for name in shown] for row in cells)], right=numbers)


def _cells(facts: dict[str, Any]) -> dict[str, str]:
    """What stands in each column for one run, "" where nothing is known."""
    loss, speed, attempts = facts["loss"], facts["tokens_per_second"], facts["attempts_ended"]
    return {
        "run": facts["run"],
        "state": facts["state"] or "not launched",
        "launcher": facts["launcher"] or "",
        "job": ", ".join(facts["job_ids"]),
        "step": "" if facts["step"] is None else f"{facts['step']} of {facts['steps'] or '?'}",
        "loss": "" if loss is None else f"{loss:.4f}",
        "tokens/s": f"{speed:,.0f}" if speed else "",
        "checkpoint": "" if facts["checkpoint_step"] is None else str(facts["checkpoint_step"]),
        "attempts": f"{attempts}, the last exited with {facts['last_exit_code']}" if attempts else "",
        "in use by": facts["writer"] or "",
        "launch": facts["launch"] or facts["run_dir"],
    }


def _state(folder: Path, job: dict[str, Any]) -> tuple[str, list[str]]:
    """What a launch is doing, and its job ids: asked of SLURM, or of this machine."""
    noted = _read_json(folder / "state.json")
    if job.get("launcher") == "slurm":
        job_ids = [str(job_id) for job_id in noted.get("job_ids", [])]
        state = "refused by the queue" if noted else "written, not submitted by launch"
        return (_slurm_state(job_ids) if job_ids else state), job_ids
    state = str(noted.get("state", "written, not started by launch"))
    if state == "running" and noted.get("host") != socket.gethostname():
        state = f"running on {noted.get('host')}, last it said"
    elif state == "running" and not _runs(int(noted["pid"])):
        state = "gone without a word"
    elif state == "failed":
        state = f"failed with {noted.get('exit_code')}"
    return state, []


def _slurm_state(job_ids: list[str]) -> str:
    listed = ",".join(job_ids)
    queued = said(["squeue", "--noheader", "--states=all", f"--jobs={listed}", "--format=%i %T %r %N"])
    if queued:
        return "; ".join(" ".join(line.split()) for line in queued.splitlines())
    columns = "--format=JobID,State,ExitCode"
    past = said(["sacct", "--allocations", "--noheader", "--parsable2", "--delimiter= ", f"--jobs={listed}", columns])
    return "; ".join(past.splitlines()) if past else "not in the queue any more"


def said(command: list[str]) -> str:
    """What a program prints, "" if it is not there or fails; SLURM's clients retry for minutes without their server."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except subprocess.SubprocessError:
        return ""


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "what launch has written", LARGEST_LIST)
    except UserError:
        return {}


def _newest_lines(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Lines of a history of one kind, the newest first; only the file's end is read."""
    return (line for line in reversed(list(_lines(path))) if line.get("kind") == kind)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            texts = file.read().splitlines()
    except OSError:
        return
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut off at the start of the tail, or while it is being written
        if isinstance(line, dict):
            yield line
