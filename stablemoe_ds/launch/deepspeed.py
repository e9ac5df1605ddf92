"""DeepSpeed's own launcher: alone on one machine, over ssh (pdsh) or Open MPI on several."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from stablemoe_ds.errors import UserError
from stablemoe_ds.launch.job import Job, Order
from stablemoe_ds.launch.mpi import hostfile, own_mpi_options

PLAIN = re.compile(r"[\w@%+=:,./-]*")
KEEP_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
"""Without it ssh does not notice that a node is gone, and the launcher waits forever."""


def deepspeed_job(order: Order) -> Job:
    """``deepspeed`` for one run. Raises UserError for paths and values that would not survive its remote shell."""
    cluster = order.cluster
    files, environment = {}, order.variables
    words = [order.python, "-m", "deepspeed.launcher.runner", "--quiet", "--no_local_rank"]
    words += ["--master_port", str(order.port)]
    if not cluster.hosts:
        words += ["--num_gpus", str(cluster.processes_per_node), "--enable_each_rank_log", order.logs]
    else:
        _refuse_what_a_shell_would_read(order)
        hosts, exported = f"{order.folder}/hostfile", f"{order.folder}/deepspeed_env"
        files = {hosts: hostfile(cluster), exported: _lines(_exported(order))}
        # DeepSpeed reads this file in the working directory, and tells the nodes what is in it.
        environment = environment | {"DS_ENV_FILE": exported}
        words += ["--hostfile", hosts, "--master_addr", cluster.hosts[0], "--force_multi"]
        words += ["--launcher", cluster.deepspeed.runner]
        if cluster.deepspeed.runner == "pdsh":
            words += ["--enable_each_rank_log", order.logs]
            environment["PDSH_SSH_ARGS_APPEND"] = " ".join([KEEP_ALIVE, *(f"-o SendEnv={n}" for n in cluster.forward)])
        if arguments := list(_runner_args(order)):
            words.append(f"--launcher_args={shlex.join(arguments)}")
    words += [*cluster.launcher_args, "--module", *order.command[2:]]
    return Job((order,), tuple(words), files, environment, stop_group=True, tail=True)


def _runner_args(order: Order) -> Iterator[str]:
    cluster = order.cluster
    if cluster.deepspeed.runner == "openmpi":
        if cluster.network.interface:  # DeepSpeed takes eth0 by default
            yield from ("--mca", "btl_tcp_if_include", cluster.network.interface)
        yield from own_mpi_options(order)
        yield from (word for name in cluster.forward for word in ("-x", name))
    yield from cluster.deepspeed.runner_args


def _exported(order: Order) -> dict[str, str]:
    """Variables for the nodes; under Open MPI also the address at which the ranks connect."""
    found = dict(order.variables)
    if order.cluster.deepspeed.runner == "openmpi":
        found |= {"MASTER_ADDR": order.cluster.hosts[0], "MASTER_PORT": str(order.port)}
    return found


def _lines(variables: dict[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in variables.items())


def _refuse_what_a_shell_would_read(order: Order) -> None:
    """DeepSpeed puts paths and values into a command line for the nodes without quotes."""
    texts = {"the run directory": order.folder, "the log directory": order.logs, "python": order.python}
    texts["working_directory"] = order.cluster.working_directory or ""
    texts |= {f"environment.{name}": value for name, value in _exported(order).items()}
    for what, text in texts.items():
        if not PLAIN.fullmatch(text):
            raise UserError(
                f"{what}: got {text!r}: the deepspeed launcher takes letters, digits and @%+=:,./- only; rename it, or "
                "take launcher mpi or torchrun"
            )
