"""Clusters, runs and stand-ins for the programs of a cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.launch.cluster import ClusterConfig
from stablemoe_ds.launch.job import Facts, Job, Order
from stablemoe_ds.launch.make_jobs import make_jobs
from tests.tiny import tiny_run
from tests.waiting import PATIENCE

STUBS = {
    "srun": 'printf "%s\\0" "$@" > "$SEEN/srun.argv"; env -0 > "$SEEN/srun.env"; eval "${SRUN_DOES:-exit 0}"',
    "scontrol": '[ "$1" = show ] && echo localhost || echo "$*" >> "$SEEN/scontrol"',
    "sbatch": 'echo "$*" >> "$SEEN/sbatch"; wc -l < "$SEEN/sbatch"',
    "python": 'printf "%s\\0" "$@" > "$SEEN/asked"; exit "${VERDICT:-1}"',
}
"""They write down how they were called. ``python`` stands for the question whether to start again."""


def cluster(**settings: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"launcher": "slurm", "device": "cpu", "nodes": 1, **settings})


def facts(**settings: Any) -> Facts:
    return Facts(**{"stamp": "stamp", "python": "python", "user": "1:1", "port": 29500, **settings})


def one_job(where: ClusterConfig, *names: str, **sections: Any) -> Job:
    """The job of tiny runs with these names, in ``runs/`` of the working directory."""
    (job,) = make_jobs([frozen_early(name=name, **sections) for name in names or ("tiny",)], where, facts())
    return job


def frozen_early(**sections: Any) -> RunConfig:
    return tiny_run(stages={"at_step": 2}, **sections)


def order(where: ClusterConfig, **sections: Any) -> Order:
    return Order(tiny_run(**sections), where, facts())


def stubbed(folder: Path, **environment: str) -> dict[str, str]:
    """An environment in which the programs of a cluster are stand-ins; what they saw is in ``folder``."""
    programs = folder / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name, does in STUBS.items():
        path = programs / name
        path.write_text(f"#!/bin/bash\n{does}\n")
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "localhost"}
    return {**os.environ, **job, **environment, "SEEN": str(folder), "PATH": f"{programs}:{os.environ['PATH']}"}


def run_script(job: Job, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Write a SLURM job and run its batch script as SLURM would, with stand-ins."""
    job.write()
    script = next(path for path in job.files if path.endswith("job.sh"))
    return subprocess.run(
        ["bash", script],
        cwd=job.directory,
        env=stubbed(folder, **environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def seen_words(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\0")[:-1]


def seen_variables(path: Path) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in seen_words(path))


def state_of(pid: int) -> str:
    """What a process does, in the letters of ps: S where it waits; "" for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has asked for its status yet does not."""
    return state_of(pid) not in ("", "Z")
