"""Open MPI's mpirun, versions 4 and 5."""

from __future__ import annotations

import signal
from collections.abc import Iterator

from stablemoe_ds.launch.cluster import ClusterConfig
from stablemoe_ds.launch.containers import contained
from stablemoe_ds.launch.job import Job, Order

SEEN_INSIDE = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")


def mpi_job(order: Order) -> Job:
    """``mpirun`` for one run. mpirun hands USR1 on to its ranks; upon TERM it would give them no time to save."""
    cluster, hosts = order.cluster, f"{order.folder}/hostfile"
    rendezvous = {"MASTER_ADDR": (cluster.hosts or ["127.0.0.1"])[0], "MASTER_PORT": str(order.port)}
    variables = order.variables | rendezvous
    words = ["mpirun", "-n", str(cluster.world_size), "--hostfile", hosts]
    words += ["--map-by", f"ppr:{cluster.processes_per_node}:node", "--bind-to", "none"]
    words += own_mpi_options(order)
    words += [word for name, value in variables.items() for word in ("-x", f"{name}={value}")]
    words += [word for name in cluster.forward for word in ("-x", name)]
    words += [*cluster.launcher_args]
    words += [*contained(cluster, [*SEEN_INSIDE, *variables, *cluster.forward], order.facts.user), *order.command]
    return Job((order,), tuple(words), {hosts: hostfile(cluster)}, stop=signal.SIGUSR1, tail=True)


def own_mpi_options(order: Order) -> Iterator[str]:
    """Where mpirun leaves the ranks' logs, in the words of the version that is installed."""
    target = f"{order.logs}/rank"
    if order.facts.open_mpi < 5:
        yield from ("--output-filename", f"{target}:nojobid,nocopy", "--merge-stderr-to-stdout")
    else:
        yield from ("--output", f"merge,file={target}")


def hostfile(cluster: ClusterConfig) -> str:
    """The machines of a run, as DeepSpeed and Open MPI read them."""
    hosts = cluster.hosts[: cluster.nodes] or ["localhost"]
    return "".join(f"{host} slots={cluster.processes_per_node}\n" for host in hosts)
