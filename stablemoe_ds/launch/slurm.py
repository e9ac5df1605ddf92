"""A SLURM job: one batch script, rendered, and another that submits it. srun starts the ranks itself, without ssh."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from stablemoe_ds.errors import UserError
from stablemoe_ds.launch.cluster import ClusterConfig
from stablemoe_ds.launch.containers import contained, pyxis_options
from stablemoe_ds.launch.job import Job, Order, wrapped

UNSAFE = re.compile(r"[\\'\"%]")
"""sbatch reads quotes and backslashes in its own way, and %x in a path as the name of something."""
SEEN_INSIDE = ("MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID",
               "CUDA_VISIBLE_DEVICES")  # fmt: skip


def slurm_job(orders: Sequence[Order]) -> Job:
    """The job of a run, or one array whose task i trains the i-th run.

    Raises UserError if a chain is asked for several runs, or if SLURM could not take a path.
    """
    first, cluster = orders[0], orders[0].cluster
    if len(orders) > 1 and cluster.slurm.chain > 1:
        raise UserError(
            f"slurm.chain: got {cluster.slurm.chain} for {len(orders)} runs: an array is not chained; launch one run, "
            "or set slurm.chain 1 and let jobs requeue"
        )
    for path in (path for order in orders for path in (order.folder, order.logs, cluster.working_directory or "")):
        if found := UNSAFE.search(path):
            raise UserError(f"path {path}: SLURM does not take {found[0]} in a path; rename the run or its run_dir")
    script, submit = f"{first.folder}/job.sh", f"{first.folder}/submit.sh"
    slurm = cluster.slurm
    texts = {
        script: _render("job.sh.j2", **_facts(orders)),
        submit: _render("submit.sh.j2", script=script, chain=slurm.chain, dependency=slurm.dependency),
    }
    return Job(orders=tuple(orders), command=("bash", submit), files=texts, submits=True)


def _facts(orders: Sequence[Order]) -> dict[str, Any]:
    first, cluster = orders[0], orders[0].cluster
    names = dict.fromkeys((*SEEN_INSIDE, *first.variables, *cluster.forward))
    prefix, pyxis = contained(cluster, names, first.facts.user), pyxis_options(cluster)
    # The batch script is on the host; where Python is in an image only, it has to be asked there.
    asker = ["srun", "--nodes=1", "--ntasks=1", *pyxis] if pyxis else prefix
    return {
        "flags": _flags(orders),
        "modules": cluster.modules,
        "setup": cluster.setup,
        "forward": cluster.forward,
        "variables": first.variables,
        "orders": orders,
        "port": cluster.network.port,
        "srun_options": [*cluster.launcher_args, *pyxis],
        "contained": prefix,
        "program": first.program,
        "given": first.given.removeprefix(first.folder),
        "asker": asker,
        "python": first.python,
        "restarts": cluster.restarts,
        "chain": cluster.slurm.chain,
    }


def _flags(orders: Sequence[Order]) -> dict[str, str | None]:
    """Flags of sbatch in the order of the script; None: a flag without a value."""
    first, cluster, slurm = orders[0], orders[0].cluster, orders[0].cluster.slurm
    nodes = f"{cluster.min_nodes}-{cluster.nodes}" if cluster.min_nodes else str(cluster.nodes)
    flags: dict[str, str | None] = {"job-name": re.sub(r"[^\w.+-]", "_", first.run.name), "nodes": nodes}
    flags["ntasks-per-node"] = str(cluster.processes_per_node)
    flags["cpus-per-task"] = str(cluster.threads_per_process)
    if cluster.device == "gpu":
        flags["gpus-per-node"] = str(cluster.processes_per_node)
    for flag in ("partition", "account", "qos", "time", "constraint", "exclude"):
        if (value := getattr(slurm, flag)) is not None:
            flags[flag] = value
    flags |= {"signal": f"B:USR1@{slurm.signal_seconds}", _requeue(cluster): None}
    flags |= {"open-mode": "append", "output": f"{first.folder}/job.out"}
    if cluster.working_directory:
        flags["chdir"] = cluster.working_directory
    if len(orders) > 1:
        flags |= {"array": f"0-{len(orders) - 1}", "output": f"{first.folder}/job-%a.out"}
    for flag, given in slurm.options.items():
        if given is False:
            flags.pop(flag, None)
        else:
            flags[flag] = None if given is True else str(given)
    return flags


def _requeue(cluster: ClusterConfig) -> str:
    return "requeue" if cluster.restarts and cluster.slurm.chain == 1 else "no-requeue"


def _render(template: str, **facts: Any) -> str:
    environment = Environment(
        loader=PackageLoader("stablemoe_ds.launch"),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"quote": shlex.quote, "words": wrapped}
    return environment.get_template(template).render(**facts)
