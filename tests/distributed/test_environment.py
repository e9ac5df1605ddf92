"""What launchers say in the environment, and what is wrong with it."""

from __future__ import annotations

import pytest

from stablemoe_ds.distributed.environment import check_world_size, read_launcher_environment, resolve
from stablemoe_ds.errors import CLUSTER_FAULT, RunError, UserError

VARIABLES = {
    "torchrun": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
    "SLURM": {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"},
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    "MPICH": {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"},
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in VARIABLES.values():
        for name in variables:
            monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("launcher", VARIABLES)
def test_reads_what_a_launcher_says(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_launcher_environment() == (0, 1, 0), "alone"
    for name, value in VARIABLES[launcher].items():
        monkeypatch.setenv(name, value)
    assert read_launcher_environment() == (3, 4, 1)


def test_torchrun_inside_slurm_counts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**VARIABLES["SLURM"], "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    assert read_launcher_environment() == (9, 16, 5)


def test_the_world_seen_must_be_the_world_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    check_world_size(1)
    monkeypatch.setenv("STABLEMOE_WORLD_SIZE", "4")
    check_world_size(4)
    with pytest.raises(UserError, match=r"meant to start 4 processes .* this one sees 1"):
        check_world_size(1)


def test_a_rendezvous_that_has_no_address_is_named_at_once() -> None:
    resolve("127.0.0.1")
    with pytest.raises(RunError, match=r"MASTER_ADDR=nowhere\.invalid: ") as told:
        resolve("nowhere.invalid")
    assert told.value.exit_code == CLUSTER_FAULT
