"""``stablemoe doctor --cluster``: starts a probe on every rank, in the way a run would be started, and gathers what
they report. It ends by itself, whatever a node does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from stablemoe_ds.launch.cluster import ClusterConfig
from stablemoe_ds.launch.doctor.findings import Finding
from stablemoe_ds.launch.doctor.rank_probe import LIMIT_SECONDS
from stablemoe_ds.launch.doctor.rank_report import read_reports
from stablemoe_ds.launch.doctor.verdicts import Probed, judge
from stablemoe_ds.launch.job import Job
from stablemoe_ds.launch.logs import rank_logs
from stablemoe_ds.launch.make_jobs import look_around, probe_job
from stablemoe_ds.launch.status import said

START_SECONDS, SUBMIT_SECONDS, TERM_SECONDS = 90.0, 60.0, 5.0
POLL_SECONDS, PATIENT_POLLS = 1.0, 10
WAITING = ("PENDING", "CONFIGURING", "REQUEUED")
LASTING = (*WAITING, "RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED")
QUEUE_MINUTES = 10.0
COMPLAINT = re.compile(r"error|cannot|unable|denied|refused|timed out|not found|no such", re.IGNORECASE)


def examine_cluster(
    cluster: ClusterConfig, queue_minutes: float = QUEUE_MINUTES, seconds: float = START_SECONDS + LIMIT_SECONDS
) -> list[Finding]:
    """Probe all nodes; takes half a minute if all is well, and at most ``seconds`` once the probes are started.

    queue_minutes: how long a job may wait in SLURM's queue. What probes leave is kept in ``doctor/``, next to the runs.
    Raises UserError if the launcher does not support what the cluster file says.
    """
    job = probe_job(_for_a_probe(cluster), look_around())
    folder, logs = job.folders[0], Path(job.directory, job.orders[0].logs)
    try:
        job.write()
    except OSError as error:
        found = f"cannot write {error.filename}: {error.strerror}"
        return [Finding("run directory", "fail", found, "set run_dir or working_directory to a writable folder")]
    _tell(f"probing {cluster.world_size} ranks; logs in {folder}")
    hosts, output = cluster.hosts[: cluster.nodes], folder / "launcher.log"
    if cluster.launcher != "slurm":
        problem = _run(job, output, seconds)
    elif "SLURM_JOB_ID" in os.environ:
        script = next(path for path in job.files if path.endswith("/job.sh"))
        problem = _run(replace(job, command=("bash", script)), output, seconds)
        hosts = _expanded(os.environ.get("SLURM_JOB_NODELIST", ""))
    else:
        problem, hosts = _queue(job, queue_minutes * 60, seconds)
        output = folder / "job.out"
    if problem and (line := _telling_line(output)):
        problem += f"; it said: {line}"
    ranks = range(cluster.world_size)
    words = {rank: line for rank in ranks for path in rank_logs(logs, rank)[-1:] if (line := _telling_line(path))}
    return judge(Probed(cluster, read_reports(folder), hosts, problem, words, str(folder)))


def _for_a_probe(cluster: ClusterConfig) -> ClusterConfig:
    """The same cluster for something that takes a minute, and needs neither secrets nor another attempt."""
    inside = ["--nodes", str(cluster.nodes), "--ntasks", str(cluster.world_size)]  # an allocation may be larger
    arguments = [*cluster.launcher_args, *(inside if cluster.launcher == "slurm" else [])]
    slurm = cluster.slurm.model_copy(update={"time": "0:15:00", "signal_seconds": 10, "chain": 1})
    probing = {"min_nodes": None, "restarts": 0, "forward": [], "log_dir": None, "launcher_args": arguments}
    return cluster.model_copy(update={**probing, "slurm": slurm})


def _run(job: Job, output: Path, seconds: float) -> str:
    """Run a launcher here until it ends; returns what is wrong with that, "" if nothing."""
    environment = {**os.environ, **job.environment}
    with output.open("wb") as out:
        try:
            process = subprocess.Popen(
                job.command,
                cwd=job.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot start {job.command[0]}: {error.strerror}"
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"had not ended after {seconds:g} s"
    finally:
        _end(process)
    return f"ended with {code}" if code else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher and whatever it has left behind in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(TERM_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _queue(job: Job, queue_seconds: float, seconds: float) -> tuple[str, list[str]]:
    """Submit a job and wait until it has ended; returns (what went wrong, names of its nodes)."""
    try:
        done = subprocess.run(
            job.command, cwd=job.directory, capture_output=True, text=True, check=False, timeout=SUBMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"sbatch had not ended after {SUBMIT_SECONDS:g} s; is the controller there? scontrol ping", []
    if done.returncode:
        return f"the queue did not take the job: {' '.join(done.stderr.split())}", []
    job_id = done.stdout.strip()
    try:
        return _await(job_id, queue_seconds, seconds)
    finally:
        said(["scancel", job_id])  # which does nothing to a job that has ended


def _await(job_id: str, queue_seconds: float, seconds: float) -> tuple[str, list[str]]:
    state, reason, nodes, shown, unheard = "PENDING", "", "", "", 0
    end, started = time.monotonic() + queue_seconds, False
    while state in LASTING and time.monotonic() < end and unheard < PATIENT_POLLS:
        line = said(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T|%r|%N"])
        unheard = 0 if line else unheard + 1  # SLURM forgets a job that has ended, sooner or later
        state, reason, nodes = line.split("|") if line else (state, reason, nodes)
        if state == "RUNNING" and not started:
            started, end = True, time.monotonic() + seconds
        if line not in ("", shown):
            shown = line
            _tell(f"job {job_id} {state} {nodes or reason}")
        time.sleep(POLL_SECONDS)
    if state in WAITING:
        problem = f"job {job_id} is still {state} ({reason}); --wait says how many minutes it may wait"
    elif state in LASTING and not unheard:
        problem = f"job {job_id} had not ended after {seconds:g} s"
    else:
        problem = "" if state in (*LASTING, "COMPLETED") else f"job {job_id} {state} ({reason})"
    return problem, _expanded(nodes)


def _expanded(nodes: str) -> list[str]:
    """Names of the nodes that SLURM writes as node[01-02]."""
    return said(["scontrol", "show", "hostnames", nodes]).split() if nodes else []


def _telling_line(path: Path) -> str:
    """The last line of a log that sounds like an error, else its last line."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").split("\n")]
    except OSError:
        return ""
    lines = [line for line in lines if line]
    return next((line for line in reversed(lines) if COMPLAINT.search(line)), lines[-1] if lines else "")


def _tell(text: str) -> None:
    print(f"stablemoe doctor: {text}", file=sys.stderr, flush=True)
