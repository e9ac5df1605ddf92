"""A suite on a cluster: its runs are launched as by ``stablemoe launch``, under SLURM as one array job."""

from __future__ import annotations

from collections.abc import Sequence

from stablemoe_ds.answers import answer
from stablemoe_ds.comparison.suite import SuiteRun
from stablemoe_ds.comparison.suite_state import state_of
from stablemoe_ds.config.load import dump_run, load_run
from stablemoe_ds.errors import UserError
from stablemoe_ds.launch.cluster import load_cluster
from stablemoe_ds.launch.make_jobs import look_around, make_jobs
from stablemoe_ds.launch.start import start


def launch_all(runs: Sequence[SuiteRun], path: str, dry_run: bool) -> int:
    """Launch what is not finished, or print it for a shell. Returns an exit status.

    path: of the cluster's YAML. Raises UserError if a run does not fit the cluster.
    """
    cluster = load_cluster(path)
    if cluster.run_dir is not None:
        raise UserError(f"{path}: run_dir: got {cluster.run_dir}: a suite decides where its runs go; leave it out")
    missing = [run for run in runs if state_of(run) != "finished"]
    if not missing:
        answer("all runs are finished: see --report")
        return 0
    if dry_run:
        answer("\n".join(job.as_shell() for job in make_jobs([one.run for one in missing], cluster, look_around())))
        return 0
    for one in missing:
        one.folder.parent.mkdir(parents=True, exist_ok=True)
        one.sibling("yaml").write_text(dump_run(one.run), encoding="utf-8")
    runs_on_disk = [load_run(one.sibling("yaml")) for one in missing]
    return start(make_jobs(runs_on_disk, cluster, look_around()))
