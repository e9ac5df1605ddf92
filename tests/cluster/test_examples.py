"""The shipped SLURM examples on a cluster of 64 nodes with eight GPUs each, as far as it goes without any GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stablemoe_ds.config.load import load_run
from stablemoe_ds.launch.cluster import ClusterConfig, load_cluster
from stablemoe_ds.launch.job import Job
from stablemoe_ds.launch.make_jobs import look_around, make_jobs
from tests.cluster.hosts import BOOT_SECONDS
from tests.cluster.slurm import Slurm, slurm

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "launch").glob("slurm*.yaml"))
RANK = """#!/bin/sh
echo "$SLURM_PROCID of $SLURM_NTASKS, GPUs $CUDA_VISIBLE_DEVICES, meets at $MASTER_ADDR: $*"
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """64 nodes, all of them on one host; named as the examples name them."""
    folder = tmp_path_factory.mktemp("large") / "slurm"
    with slurm(folder, {f"node{number:02}": "many" for number in range(1, 65)}, cpus=96) as made:
        yield made


def job_of(cluster: ClusterConfig) -> Job:
    run = load_run(ROOT / "ds_configs" / "paper-base.yaml", ["parallel.expert=1"])
    [job] = make_jobs([run], cluster, look_around())
    return job


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_slurm_would_start_the_example(path: Path, large: Slurm, tmp_path: Path) -> None:
    cluster = load_cluster(path)
    script = tmp_path / "job.sh"
    [text] = [text for name, text in job_of(cluster).all_files.items() if name.endswith("job.sh")]
    script.write_text(text)
    said = large.login.attempt("sbatch", "--test-only", str(script))
    assert said.returncode == 0, said.stderr
    assert "to start at" in said.stderr
    too_many = large.login.attempt("sbatch", "--test-only", "--nodes=65", str(script))
    assert too_many.returncode != 0, "the cluster is one that can refuse"


def test_every_rank_of_the_example_has_its_place(large: Slurm, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(RANK)
    python.chmod(0o755)
    here = {"working_directory": str(tmp_path), "python": str(python), "modules": [], "forward": [], "restarts": 0}
    job = job_of(load_cluster(ROOT / "launch" / "slurm.yaml").model_copy(update=here))
    job.write()
    number = large.login.run("sh", "-c", f"cd {tmp_path} && exec {' '.join(job.command)}").strip()
    ended = large.wait_for(number, "COMPLETED", BOOT_SECONDS)
    assert ended["NodeList"] == "node[01-02]"
    logs = [(tmp_path / job.orders[0].logs / f"rank-{rank}.attempt-0.log").read_text() for rank in range(16)]
    for rank, log in enumerate(logs):
        train = f"-m stablemoe_ds train {job.orders[0].run_file}"
        assert log == f"{rank} of 16, GPUs 0,1,2,3,4,5,6,7, meets at node01: {train}\n"
