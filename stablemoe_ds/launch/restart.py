"""Whether a job that has ended should be started again. Launchers ask this after every attempt.

    python -m stablemoe_ds.launch.restart RUN_DIR --exit-code N --limit N [--world-size N]

prints one line with the reason and exits with 0 to start again, 1 to leave it. What ``stablemoe train`` exits with:

    code    meaning                                                        start again?
    0       finished, or stopped on request with a checkpoint              unless finished (under SLURM)
    1       a fault of this process: out of memory, a broken reader        yes
    2       bad input of any rank: configuration, data, checkpoint         never
    3       a fault of the cluster: a peer is lost or hangs                yes
    130     interrupted from the keyboard                                  never
    other   killed by a signal, or a launcher's own code                   yes

A launch in the foreground takes 0 for the end: the ranks were stopped on purpose, perhaps on another machine.
"Yes" ends after ``limit`` attempts in a row without a newer checkpoint. SIGUSR1 and SIGTERM are requests to stop:
the run ends after the update it is at, saves and exits with 0. A run may go on with another number of
processes, as long as its configuration allows that number. Attempts are kept in ``RUN_DIR/launch/attempts.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stablemoe_ds.config.rules import check
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import BAD_INPUT, FINISHED, INTERRUPTED, UserError
from stablemoe_ds.run_directory.progress import launched_run, newest_saved, reported_steps

KILLED_BY = {
    "SIGBUS": "a mapped file was cut short, such as a corpus's .bin, or /dev/shm is full",
    "SIGKILL": "often for want of memory",
}
"""What lies behind a signal that says nothing by itself."""


@dataclass(frozen=True)
class Decision:
    """Whether to start again, and why in one line."""

    again: bool
    reason: str


def decide(
    run_dir: str | Path,
    exit_code: int,
    limit: int,
    world_size: int | None = None,
    run: RunConfig | None = None,
    host: str | None = None,
) -> Decision:
    """Note the attempt that ended with ``exit_code``, and say whether another should follow.

    limit: attempts in a row without a newer checkpoint after which to give up.
    world_size: processes the next attempt would have; None if unknown.
    run: as it was launched; None: as the newest checkpoint has it.
    host: counts only attempts that this host has noted, where each host notes its own; None: all of them.
    """
    saved = newest_saved(run_dir)
    run = run or (saved.run if saved else None)
    stale = _note(Path(run_dir), saved.step if saved else 0, exit_code, host)
    if exit_code == BAD_INPUT:
        return Decision(False, "bad input (exit code 2) would fail in the same way again; read the error, correct it")
    if exit_code == INTERRUPTED:
        return Decision(False, "interrupted from the keyboard (exit code 130)")
    if saved and run and _finished(saved.step, run.schedule.steps, Path(run_dir), exit_code):
        return Decision(False, f"the run is finished: all {saved.step} updates are made")
    if run and world_size is not None:
        try:
            check(run, world_size)
        except UserError as error:
            first = str(error).splitlines()[0]
            return Decision(False, f"{world_size} processes do not fit the run: {first}")
    where = f"{saved.step} of {run.schedule.steps} updates are saved" if saved and run else "nothing is saved yet"
    what = "stopped on request" if exit_code == FINISHED else _ending(exit_code)
    if stale >= limit:
        return Decision(False, f"{what}; {where}, and {stale} attempts in a row have added none (limit {limit})")
    tries = f"; attempts without a newer checkpoint: {stale} of {limit}" if stale else ""
    return Decision(True, f"{what}; {where}{tries}")


def _ending(exit_code: int) -> str:
    """How an attempt ended: a shell's 128 + n, and Python's -n, are a signal."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number not in set(signal.Signals):
        return f"ended with exit code {exit_code}"
    name = signal.Signals(number).name
    hint = f" ({KILLED_BY[name]})" if name in KILLED_BY else ""
    return f"killed by {name}{hint}"


def _finished(step: int, steps: int, run_dir: Path, exit_code: int) -> bool:
    """A run that died after its last update, while it wrote its report, is not finished."""
    return step >= steps and (exit_code == FINISHED or reported_steps(run_dir) >= steps)


def _note(run_dir: Path, step: int, exit_code: int, host: str | None) -> int:
    """Add an attempt to the file; returns how many in a row, this one included, have saved nothing new."""
    file = run_dir / "launch" / "attempts.jsonl"
    steps = [int(attempt["step"]) for attempt in _read(file) if host in (None, attempt.get("host"))]
    noted = {"step": step, "exit_code": exit_code, "host": host or socket.gethostname()}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps({**noted, "time": now}) + "\n")
    before, stale = 0, 0
    for reached in [*steps, step]:
        stale = 0 if reached > before else stale + 1
        before = reached  # not the furthest ever: a run that was set back has its way before it once more
    return stale


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """Attempts so far; a line that was cut off in writing is left out."""
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            attempt = json.loads(line)
        except ValueError:
            continue
        if isinstance(attempt, dict) and "step" in attempt:
            yield attempt


def main(argv: Sequence[str] | None = None) -> int:
    """Print the reason; returns 0 to start again, 1 to leave it."""
    parser = argparse.ArgumentParser(
        prog="python -m stablemoe_ds.launch.restart", description="Should a job that has ended be started again?"
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--exit-code", type=int, required=True, help="what the attempt ended with")
    parser.add_argument("--limit", type=int, default=3, help="attempts without a newer checkpoint (default 3)")
    parser.add_argument("--world-size", type=int, help="processes of the next attempt")
    given = parser.parse_args(argv)
    run = launched_run(given.run_dir)
    decision = decide(given.run_dir, given.exit_code, given.limit, given.world_size, run)
    print(f"{'start again' if decision.again else 'do not start again'}: {decision.reason}", flush=True)
    return 0 if decision.again else 1


if __name__ == "__main__":
    sys.exit(main())
