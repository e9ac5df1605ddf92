"""torchrun: one agent a machine, which starts its ranks and starts them again. On several machines the same
command is given on each."""

from __future__ import annotations

from stablemoe_ds.launch.containers import contained
from stablemoe_ds.launch.job import Job, Order

SETTINGS = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a machine that comes back hangs all until the rendezvous gives up
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "180",  # seconds for ranks to save when asked to stop; torch 2.11 gives them 30
}
"""The cluster's ``environment`` wins over them."""


def torchrun_job(order: Order) -> Job:
    """``torchrun`` for one run, and for this machine's part of it."""
    cluster = order.cluster
    nodes = f"{cluster.min_nodes}:{cluster.nodes}" if cluster.min_nodes else str(cluster.nodes)
    words = [order.python, "-m", "torch.distributed.run", "--nnodes", nodes]
    words += ["--nproc-per-node", str(cluster.processes_per_node), "--max-restarts", str(cluster.restarts)]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{(cluster.hosts or ['localhost'])[0]}:{order.port}"]
    words += ["--rdzv-id", order.run.name, "--log-dir", order.logs, "--redirects", "3", "--tee", "3"]
    words += [*cluster.launcher_args, *order.command[1:]]
    environment = SETTINGS | order.variables
    inside = contained(cluster, [*environment, *cluster.forward], order.facts.user)
    return Job((order,), (*inside, *words), environment=environment)
