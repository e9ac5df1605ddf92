"""What launchers tell the processes they start, through the environment."""

from __future__ import annotations

import os

_LAUNCHERS = (  # rank, world size, local rank; as torchrun and deepspeed, SLURM, Open MPI and MPICH name them
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
_MPI = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")


def read_launcher_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) from whichever launcher started this process; (0, 1, 0) without one."""
    for rank, size, local in _LAUNCHERS:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local, 0))
    return 0, 1, 0


def started_by_mpi() -> bool:
    """True under mpirun, of Open MPI or MPICH."""
    return any(name in os.environ for name in _MPI)
