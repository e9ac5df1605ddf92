"""From jobs to running ranks: write what they need, submit or run them."""

from __future__ import annotations

import os
import subprocess
import sys

from stablemoe_ds.answers import answer
from stablemoe_ds.errors import UserError
from stablemoe_ds.launch.job import Job
from stablemoe_ds.launch.supervise import Supervisor, note_state


def start(jobs: list[Job]) -> int:
    """Write jobs and submit or run them; returns the status of the last run that did not end well, 0 if all did.

    Raises UserError if a variable they need is not set, or if the queue does not take them.
    """
    cluster = jobs[0].cluster
    for name in cluster.forward:
        if name not in os.environ:
            raise UserError(f"forward: {name} is not set in this shell; export it, or remove it from the cluster file")
    for job in jobs:
        job.write()
        for folder in job.folders:
            print(f"wrote {folder}", file=sys.stderr, flush=True)
    return _submit(jobs[0]) if jobs[0].submits else _run_all(jobs)


def _submit(job: Job) -> int:
    """Hand a job to its queue, note the ids it got, and print them."""
    try:
        done = subprocess.run(job.command, cwd=job.directory, stdout=subprocess.PIPE, text=True, check=True)
    except subprocess.CalledProcessError as error:
        for folder in job.folders:
            note_state(folder, state="refused", exit_code=error.returncode)
        said = f"{' '.join(job.command)} ended with {error.returncode}"
        raise UserError(f"{said}: the queue did not accept the job; its message is above") from error
    for folder in job.folders:
        note_state(folder, state="submitted", job_ids=done.stdout.split())
    answer(done.stdout, end="")
    return 0


def _run_all(jobs: list[Job]) -> int:
    """One after the other, until a stop is requested; returns the last status that was not 0."""
    worst = 0
    for job in jobs:
        supervisor = Supervisor(job)
        worst = supervisor.run() or worst
        if supervisor.stopped:
            break
    return worst
