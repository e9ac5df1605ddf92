"""Where a run goes: one YAML file, one typed and strict object. A run says what to train, a cluster says where."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import AfterValidator, Field, PositiveInt, field_validator, model_validator

from stablemoe_ds.config.load import load_section
from stablemoe_ds.config.messages import cut, printable
from stablemoe_ds.config.paths import PathText, expanded, if_written
from stablemoe_ds.config.section import Section
from stablemoe_ds.config.textfile import LARGEST_LIST, read_text
from stablemoe_ds.errors import UserError

Launcher = Literal["local", "deepspeed", "torchrun", "mpi", "slurm"]
SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d\d))?(?::(?P<third>\d\d))?")
HOST = re.compile(r"[\w\[][\w.:@%\[\]-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
RENDERED = {
    "nodes": "nodes",
    "ntasks-per-node": "processes_per_node",
    "gpus-per-node": "processes_per_node and device",
    "chdir": "working_directory",
    "time": "slurm.time",
    "signal": "slurm.signal_seconds",
    "dependency": "slurm.dependency",
    "export": "environment and forward",
    "job-name": "the run's name",
    "output": "log_dir",
    "array": "the number of runs",
    "requeue": "restarts",
    "no-requeue": "restarts",
    "open-mode": "restarts",
}
"""Flags of sbatch that the script has already, and the setting each comes from."""


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected one line of printable text")
    return text


def _host(name: str) -> str:
    if not HOST.fullmatch(name):
        raise ValueError(f"'{cut(name)}' is no name or address of a machine; expected e.g. node1 or 10.0.0.1")
    return name


def _mount(mount: str) -> str:
    """``~`` on the host's side; what it is in the container, only the image knows."""
    host, colon, container = mount.partition(":")
    return expanded(host) + colon + container if host.startswith("~") else mount


def _image(image: str) -> str:
    return expanded(image) if image.startswith("~") else image


def _in_container(path: str) -> str:
    if path.startswith("~"):
        raise ValueError("home is another directory in the container: write the path out")
    return expanded(path)


Text = Annotated[str, AfterValidator(_one_line)]
Place = Annotated[PathText, AfterValidator(_one_line)]
Host = Annotated[str, AfterValidator(_host)]
Port = Annotated[int, Ge(1024), Lt(65536)]


class DeepSpeedConfig(Section):
    """How the deepspeed launcher reaches the nodes."""

    runner: Literal["pdsh", "openmpi"] = Field("pdsh", description="pdsh over ssh, or Open MPI's mpirun")
    runner_args: list[Text] = Field(default_factory=list, description="further arguments for pdsh or mpirun")


class SlurmConfig(Section):
    """What the batch script asks SLURM for."""

    partition: Text | None = Field(None, description="partition to submit to; null: the default one")
    account: Text | None = Field(None, description="account to charge; null: your default")
    qos: Text | None = Field(None, description="quality of service")
    time: Text | None = Field(None, description="time limit of a job, e.g. 24:00:00; null: the partition's")
    signal_seconds: int = Field(300, ge=10, description="seconds before the time limit at which a run is asked to "
                                "save; SLURM may be up to 60 s early")  # fmt: skip
    constraint: Text | None = Field(None, description="features the nodes must have")
    exclude: Text | None = Field(None, description="nodes that must not be used, e.g. node[07,12]")
    chain: PositiveInt = Field(
        1, description="jobs to submit at once, each waiting for the one before; for sites where jobs may not requeue"
    )
    dependency: Literal["singleton", "afterany"] = Field("singleton", description="how jobs of a chain wait")
    options: dict[Text, Text | int | bool] = Field(
        default_factory=dict, description="other options of sbatch without dashes, e.g. {exclusive: true, mem: 0}"
    )

    @model_validator(mode="after")
    def _time_to_save(self) -> SlurmConfig:
        if self.time is not None and (limit := seconds_of(self.time)) <= self.signal_seconds:
            near = max(10, limit // 4)
            raise ValueError(
                f"signal_seconds: got {self.signal_seconds}: the time limit {self.time} is {limit} s, so a run would "
                f"be stopped as it starts; nearest that works: {near}, or a longer time"
            )
        return self

    @field_validator("options")
    @classmethod
    def _other_flags(cls, options: dict[str, Any]) -> dict[str, Any]:
        for flag in options:
            if not re.fullmatch(r"[a-z][a-z0-9-]+", flag):
                raise ValueError(f"'{flag}' is no long flag of sbatch; write it without dashes, e.g. exclusive: true")
            if flag in RENDERED:
                raise ValueError(f"--{flag} follows from {RENDERED[flag]}; set that instead")
        return options


def seconds_of(time: str) -> int:
    """A time limit as SLURM reads it: MIN, MIN:SEC, H:MIN:SEC, D-H, D-H:MIN or D-H:MIN:SEC. Raises ValueError."""
    found = SLURM_TIME.fullmatch(time)
    if not found:
        raise ValueError(f"time: got '{time}': expected e.g. 24:00:00, or 2-12 for two and a half days")
    first, second, third = (int(found[part] or 0) for part in ("first", "second", "third"))
    if found["days"]:
        return int(found["days"]) * 86_400 + first * 3_600 + second * 60 + third
    return first * 3_600 + second * 60 + third if found["third"] else first * 60 + second


class ContainerConfig(Section):
    """The image in which ranks run. The working directory is mounted in it."""

    kind: Literal["docker", "apptainer", "pyxis"] = Field(
        description="container runtime; pyxis: srun --container-image"
    )
    image: Annotated[Text, if_written(_image)] = Field(description="name, file or folder of the image")
    mounts: list[Annotated[Text, if_written(_mount)]] = Field(
        default_factory=list, description="further mounts, HOST:CONTAINER"
    )
    workdir: Annotated[Text, if_written(_in_container)] | None = Field(
        None, description="path of working_directory in the container; null: the same path"
    )

    @field_validator("mounts")
    @classmethod
    def _pairs(cls, mounts: list[str]) -> list[str]:
        for mount in mounts:
            if mount.count(":") not in (1, 2) or "," in mount or not mount.startswith("/"):
                raise ValueError(f"'{mount}' is no mount; expected /HOST/PATH:/CONTAINER/PATH")
        return mounts


class NetworkConfig(Section):
    """The network to use. NCCL and gloo choose for themselves where a value is null."""

    interface: Text | None = Field(
        None, description="network interface, e.g. eth0: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
    )
    infiniband_hca: Text | None = Field(None, description="InfiniBand adapters, e.g. mlx5: NCCL_IB_HCA")
    port: Port | None = Field(
        None, description="port for the ranks; null: from the job id under SLURM, a free one on one machine, else 29500"
    )


class ClusterConfig(Section):
    """A cluster. ``load_cluster`` makes one from YAML."""

    name: Text = Field("cluster", description="name of the cluster")
    launcher: Launcher = Field(description="program that starts the ranks")
    nodes: PositiveInt = Field(1, description="number of machines")
    min_nodes: PositiveInt | None = Field(
        None, description="smallest number of nodes after a restart (torchrun, slurm); null: same as nodes"
    )
    processes_per_node: PositiveInt = Field(1, description="ranks on each machine: its GPUs, or CPU processes")
    threads_per_process: PositiveInt = Field(1, description="OMP_NUM_THREADS, and SLURM's --cpus-per-task")
    device: Literal["gpu", "cpu"] = Field("gpu", description="device of the ranks")
    hosts: list[Host] = Field(default_factory=list, description="names of the machines; those beyond nodes are spare")
    hostfile: Place | None = Field(None, description="a file with 'NAME slots=N' lines, instead of hosts")
    working_directory: Place | None = Field(
        None, description="shared folder in which ranks start; null: the directory in which launch is called"
    )
    python: Place | None = Field(
        None, description="Python on the nodes; null: the one that runs launch, or 'python' in a container"
    )
    run_dir: Place | None = Field(None, description="folder for run directories; null: run_dir of each run")
    log_dir: Place | None = Field(None, description="folder for the logs of the ranks; null: in the run directory")
    restarts: int = Field(3, ge=0, description="attempts in a row without a newer checkpoint after which the job is "
                          "not restarted; 0: never restart")  # fmt: skip
    launcher_args: list[Text] = Field(
        default_factory=list, description="further arguments for deepspeed, torchrun, mpirun or srun"
    )
    modules: list[Text] = Field(default_factory=list, description="modules to load; slurm only")
    setup: list[Text] = Field(default_factory=list, description="lines of bash to run before the ranks; slurm only")
    environment: dict[Text, Text] = Field(
        default_factory=dict, description="environment variables of the ranks; no secrets"
    )
    forward: list[Text] = Field(
        default_factory=list,
        description="names of variables to pass on from the shell that calls launch, e.g. HF_TOKEN",
    )
    network: NetworkConfig = Field(default_factory=NetworkConfig)
    container: ContainerConfig | None = Field(None, description="run the ranks in a container")
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if SECRET.search(name):
                raise ValueError(f"'{name}' looks like a secret, which would end up in files: name it under forward")
        return environment

    @field_validator("environment", "forward")
    @classmethod
    def _names(cls, names: Any) -> Any:
        for name in names:
            if not VARIABLE.fullmatch(name):
                raise ValueError(f"'{name}' is no name of a variable; expected e.g. NCCL_DEBUG")
        return names

    @model_validator(mode="after")
    def _fits_together(self) -> ClusterConfig:
        for breach in _breaches(self):
            raise ValueError(breach)
        return self

    @property
    def world_size(self) -> int:
        """Processes of a whole run."""
        return self.nodes * self.processes_per_node

    @property
    def world_sizes(self) -> list[int]:
        """Every number of processes a run may have on this cluster, the whole one first."""
        fewest = self.min_nodes or self.nodes
        return [nodes * self.processes_per_node for nodes in range(self.nodes, fewest - 1, -1)]


def _breaches(cluster: ClusterConfig) -> Iterator[str]:
    """What does not go together, each with what would."""
    c, launcher, container = cluster, cluster.launcher, cluster.container
    named = bool(c.hosts or c.hostfile)
    if launcher == "local" and c.nodes > 1:
        yield f"nodes: got {c.nodes}: launcher local is one machine; nearest that works: 1, or launcher torchrun"
    if c.hosts and c.hostfile:
        yield "hosts and hostfile are both given; keep one"
    if named and launcher in ("local", "slurm"):
        yield f"launcher {launcher} chooses its machines itself: leave hosts and hostfile out"
    if not named and c.nodes > 1 and launcher in ("deepspeed", "torchrun", "mpi"):
        yield f"launcher {launcher} on {c.nodes} nodes needs their names: give hosts or hostfile"
    if c.hosts and len(c.hosts) < c.nodes:
        yield f"nodes: got {c.nodes}: there are {len(c.hosts)} hosts; nearest that works: {len(c.hosts)}"
    if len(set(c.hosts)) < len(c.hosts):
        yield "hosts: a name is there twice; processes_per_node says how many ranks a host has"
    if c.min_nodes and (c.min_nodes > c.nodes or launcher not in ("torchrun", "slurm")):
        yield f"min_nodes: got {c.min_nodes}: at most nodes {c.nodes}, and under torchrun or slurm only"
    if (c.modules or c.setup) and launcher != "slurm":
        yield f"modules and setup are for slurm; launcher {launcher} has the environment it is called in"
    if container and launcher == "deepspeed":
        yield "container: the deepspeed launcher starts no containers; call launch inside of them, or take torchrun"
    if container and container.kind == "pyxis" and launcher != "slurm":
        yield f"container.kind: pyxis is part of slurm; nearest that works with launcher {launcher}: docker"
    if container and not (c.working_directory or "").startswith("/"):
        yield "working_directory: a container needs an absolute path, which is mounted in it"
    if both := sorted(set(c.environment) & set(c.forward)):
        yield f"{both[0]} is both in environment and in forward; keep one"


def load_cluster(path: str | Path) -> ClusterConfig:
    """Read a cluster file, and the hostfile it names. Raises UserError, one line for each thing that is wrong."""
    cluster = load_section(ClusterConfig, path, [], "'launcher:' and 'nodes:'")
    if cluster.hostfile is None:
        return cluster
    hosts = _read_hostfile(cluster.hostfile, cluster.processes_per_node)
    if len(hosts) < cluster.nodes:
        raise UserError(
            f"{printable(str(path))}: nodes: got {cluster.nodes}: {cluster.hostfile} has {len(hosts)} hosts"
        )
    return cluster.model_copy(update={"hosts": hosts, "hostfile": None})


def _read_hostfile(path: str, processes: int) -> list[str]:
    """Names of a hostfile as DeepSpeed and Open MPI write it; comments and empty lines are left out."""
    where = f"hostfile {path}"
    try:
        lines = read_text(path, "a hostfile, one machine a line", LARGEST_LIST).split("\n")
    except UserError as error:
        raise UserError(f"hostfile {error}") from error
    hosts: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        name, *slots = line.partition("#")[0].split() or [""]
        if not name:
            continue
        if slots not in ([], [f"slots={processes}"]) or name in hosts or not HOST.fullmatch(name):
            raise UserError(f"{where}:{number}: got '{cut(line.strip())}': expected 'NAME slots={processes}' once "
                            "for each machine, as processes_per_node says")  # fmt: skip
        hosts[name] = None
    return list(hosts)
