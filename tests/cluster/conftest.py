"""What the tests on fake clusters share, and what they need: root, namespaces, SLURM, munge, ssh and pdsh."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import NAMESPACES, PATH, Host, hosts
from tests.cluster.rehearsal import two_rank_run
from tests.cluster.slurm import Slurm, slurm
from tests.distributed.launch import run_distributed
from tests.training.runs import TinyData, history, tiny_data, train_here

PROGRAMS = ("slurmctld", "slurmd", "munged", "sshd", "pdsh", "ip", "unshare", "setpriv")


@pytest.fixture(scope="session", autouse=True)
def able() -> None:
    """Skip where no cluster can be brought up, and say why."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make hosts of namespaces")
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: run tests/cluster/install.sh")
    try_one = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True, check=False)
    if try_one.returncode:
        pytest.skip(f"needs namespaces: {try_one.stderr.strip()}")


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[dict[str, Host]]:
    """A host to log in to, and two that can be reached from it by ssh."""
    with hosts(tmp_path / "hosts", ["head", "n1", "n2"]) as made:
        yield made


@pytest.fixture
def three_nodes(tmp_path: Path) -> Iterator[Slurm]:
    """SLURM on three hosts: two for a job and one to spare."""
    with slurm(tmp_path / "slurm", {name: name for name in ("n1", "n2", "n3")}) as made:
        yield made


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return tiny_data(tmp_path_factory.getbasetemp() / "tiny-data")


@pytest.fixture(scope="session")
def uninterrupted(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The history of the run that the tests interrupt, when nobody does."""
    run = two_rank_run(data, tmp_path_factory.mktemp("uninterrupted") / "run")
    run_distributed(2, train_here, run, timeout=400)
    return history(run)
