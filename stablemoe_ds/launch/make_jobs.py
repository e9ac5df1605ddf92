"""From runs and a cluster to jobs: checked first, and nothing written."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime

from stablemoe_ds.config.rules import check
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.environment import free_port
from stablemoe_ds.errors import UserError
from stablemoe_ds.launch.cluster import ClusterConfig, Launcher
from stablemoe_ds.launch.deepspeed import deepspeed_job
from stablemoe_ds.launch.job import Facts, Job, Order, Probe
from stablemoe_ds.launch.local import local_job
from stablemoe_ds.launch.mpi import mpi_job
from stablemoe_ds.launch.slurm import slurm_job
from stablemoe_ds.launch.torchrun import torchrun_job

ONE_BY_ONE: dict[Launcher, Callable[[Order], Job]] = {
    "local": local_job,
    "deepspeed": deepspeed_job,
    "torchrun": torchrun_job,
    "mpi": mpi_job,
}


def make_jobs(runs: Sequence[RunConfig], cluster: ClusterConfig, facts: Facts) -> list[Job]:
    """The jobs that train these runs: under SLURM one, an array if there are several runs; else one after the other.

    Raises UserError if a run cannot be laid over a number of processes that the cluster may give it.
    """
    placed = [_placed(run, cluster) for run in runs]
    for run in placed:
        for world_size in cluster.world_sizes:
            check(run, world_size)
    orders = [Order(run, cluster, facts) for run in placed]
    directories = [order.run.directory for order in orders]
    for directory in directories:
        if not directory.isprintable():
            raise UserError(f"run directory {directory!r}: expected one line of printable text; rename the run")
        if directories.count(directory) > 1:
            raise UserError(f"run directory {directory}: two runs would write there; give each its own name")
    if cluster.launcher == "slurm":
        return [slurm_job(orders)]
    return [ONE_BY_ONE[cluster.launcher](order) for order in orders]


def probe_job(cluster: ClusterConfig, facts: Facts) -> Job:
    """The job in which every rank looks around and measures. It keeps what it finds under ``doctor/``, next to runs."""
    order = Order(Probe(f"{cluster.run_dir or 'runs'}/doctor"), cluster, facts)
    return slurm_job([order]) if cluster.launcher == "slurm" else ONE_BY_ONE[cluster.launcher](order)


def look_around() -> Facts:
    """The facts of this moment and machine."""
    port = free_port()
    moment = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    host, *_ = socket.gethostname().split(".")
    return Facts(
        stamp=f"{moment}-{host}",
        python=sys.executable,
        user=f"{os.getuid()}:{os.getgid()}",
        port=port,
        git=_said(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]),
        open_mpi=_open_mpi_version(),
    )


def _placed(run: RunConfig, cluster: ClusterConfig) -> RunConfig:
    if cluster.run_dir is None:
        return run
    return run.model_copy(update={"run_dir": f"{cluster.run_dir}/{run.name}"})


def _open_mpi_version() -> int:
    found = re.search(r"Open MPI\D* (\d+)", _said(["mpirun", "--version"]) or "")
    return int(found[1]) if found else 5


def _said(command: list[str]) -> str | None:
    """What a program prints; None if it is not there, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
