"""What is rendered for the example clusters in ``launch/``, kept next to them in ``launch/rendered/``.

``python -m stablemoe_ds.launch.examples``, from the root of a checkout, writes them again.
"""

from __future__ import annotations

from pathlib import Path

from stablemoe_ds.config.load import load_run
from stablemoe_ds.launch.cluster import load_cluster
from stablemoe_ds.launch.job import Facts, Job
from stablemoe_ds.launch.make_jobs import make_jobs

FOLDER = Path("launch")
FACTS = Facts(stamp="20260101-120000-000-login", python="/shared/moe/.venv/bin/python", user="1000:1000", port=29500)


def example_clusters() -> list[Path]:
    """The example files. Called in the root of a checkout, as all of this is."""
    return sorted(FOLDER.glob("*.yaml"))


def example_job(path: Path) -> Job:
    """A run of the paper, or the demo on a cluster without GPUs, on an example cluster."""
    cluster = load_cluster(path)
    run = load_run(f"ds_configs/{'paper-base' if cluster.device == 'gpu' else 'demo'}.yaml")
    (job,) = make_jobs([run], cluster, FACTS)
    return job


def rendered(job: Job) -> str:
    """What is kept of a job: SLURM's batch script, or the command and the files that are its own."""
    if job.submits:
        return next(text for path, text in job.files.items() if path.endswith("/job.sh"))
    return "#!/bin/bash\n" + job.as_shell(brief=True)


def rendered_file(path: Path) -> Path:
    return path.parent / "rendered" / f"{path.stem}.sh"


if __name__ == "__main__":
    for example in example_clusters():
        rendered_file(example).parent.mkdir(exist_ok=True)
        rendered_file(example).write_text(rendered(example_job(example)), encoding="utf-8")
