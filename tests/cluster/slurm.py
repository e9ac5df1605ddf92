"""A real SLURM with munge on the hosts of :mod:`tests.cluster.hosts`: the controller on one, nodes where one wants."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import BOOT_SECONDS, Host, hosts
from tests.waiting import wait_until

FIRST_PORT = 17800
NOTHING = os.makedev(1, 3)
"""The device behind /dev/null; SLURM asks of a GPU only that it is one."""
CONFIGURATION = """
ClusterName=rehearsal
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
SlurmdTimeout=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES
PartitionName=gpu Nodes=ALL
PartitionName=short Nodes=ALL MaxTime=4:00:00
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr={host} Port={port} "
    "CPUs={cpus} RealMemory=2000000 Gres=gpu:h100:{gpus} Feature=h100,nvlink"
)


@dataclass
class Slurm:
    """A running SLURM. ``login`` is where its commands are given; ``nodes`` says on which host each node is."""

    login: Host
    nodes: Mapping[str, Host]
    folder: Path

    def start_node(self, name: str) -> None:
        """Start the daemons of a node, on a host that has just been powered on, say."""
        for kind in ("spool", "tmp"):
            (self.folder / kind / name).mkdir(parents=True, exist_ok=True)
        _start_munge(self.nodes[name])
        self.nodes[name].run("slurmd", "-N", name)

    def submit(self, script: str, *options: str) -> str:
        """`sbatch` a script given as text; returns the job id."""
        path = self.folder / f"{secrets.token_hex(4)}.sh"
        path.write_text(script)
        return self.login.run("sbatch", "--parsable", *options, str(path)).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, NodeList, Dependency ...; {} if it says nothing.

        On a machine that is short of time the controller may hang up on its own clients.
        """
        said = self.login.attempt("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def wait_for(self, job: str, state: str, seconds: float, evidence: Callable[[], str] = str) -> dict[str, str]:
        """Wait until a job is in a state, and return all about it; raises AssertionError with the evidence."""
        last: dict[str, str] = {}

        def met() -> bool:
            last.update(self.job(job))
            return last.get("JobState") == state

        wait_until(f"job {job} {state}", met, seconds, lambda: f"{last}\n{evidence()}")
        return last


def _start_munge(host: Host) -> None:
    if "munged" in host.run("ps", "-eo", "comm"):
        return
    files = (f"--{kind}-file=/run/munge/{kind}" for kind in ("log", "seed"))
    host.run("mkdir", "--parents", "/run/munge")
    host.run("munged", *files)


@contextmanager
def slurm(folder: Path, nodes: Mapping[str, str], cpus: int = 16, gpus: int = 8) -> Iterator[Slurm]:
    """SLURM with these nodes, each on the host that ``nodes`` names; all idle. The GPUs are devices that do nothing."""
    names = list(dict.fromkeys(["head", *nodes.values()]))
    lines = [
        NODE.format(name=name, host=host, port=port, cpus=cpus, gpus=gpus)
        for port, (name, host) in enumerate(nodes.items(), start=FIRST_PORT)
    ]
    etc = {
        "slurm/slurm.conf": CONFIGURATION.format(controller=names[0], folder=folder, nodes="\n".join(lines)),
        "slurm/gres.conf": f"Name=gpu Type=h100 File={folder}/gpu[0-{gpus - 1}]\n",
        "munge/munge.key": secrets.token_hex(128),
    }
    aliases = {name: host for name, host in nodes.items() if name != host}
    with hosts(folder, names, etc, aliases) as machines:
        made = Slurm(machines["head"], {name: machines[host] for name, host in nodes.items()}, folder)
        (folder / "state").mkdir()
        for gpu in range(gpus):
            os.mknod(folder / f"gpu{gpu}", stat.S_IFCHR | 0o666, NOTHING)
        _start_munge(made.login)
        made.login.run("slurmctld", "-c")
        for name in nodes:
            made.start_node(name)
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        wait_until("all nodes idle", lambda: made.login.run(*idle).strip() == str(len(nodes)), BOOT_SECONDS)
        yield made
