"""What launchers pass to the processes they start, through the environment."""

from __future__ import annotations

import os
import socket

from stablemoe_ds.errors import CLUSTER_FAULT, RunError, UserError

MEANT_SIZE = "STABLEMOE_WORLD_SIZE"
"""Set by launchers that know how many processes there should be."""
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


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Variables that a launcher sets for process ``rank`` of ``ranks`` on this machine, which connect at ``port``."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def started_by_mpi() -> bool:
    """True under mpirun, of Open MPI or MPICH."""
    return any(name in os.environ for name in _MPI)


def check_world_size(size: int) -> None:
    """Compare the number of processes with the one the launcher meant to start, if it says so in STABLEMOE_WORLD_SIZE.

    Where a launcher's variables do not arrive, every process takes itself for the only one, and all of them would
    train into the same directory. Raises UserError.
    """
    meant = os.environ.get(MEANT_SIZE)
    if meant is not None and meant != str(size):
        raise UserError(
            f"world size: the launcher meant to start {meant} processes ({MEANT_SIZE}), this one sees {size}: does it "
            f"pass {' or '.join(names[1] for names in _LAUNCHERS)} on?"
        )


def resolve(address: str) -> None:
    """Raises RunError if the host on which the ranks should meet has no address: they would retry silently."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise RunError(
            f"MASTER_ADDR={address}: {error.strerror or error}; it must be the name or the address of rank 0's host",
            CLUSTER_FAULT,
        ) from error


def free_port() -> int:
    """A TCP port that nothing listens at now, on any address of this machine; another process may take it first."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
