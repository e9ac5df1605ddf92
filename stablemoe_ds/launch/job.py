"""What a launch consists of: files to write, a command to run, and what to know about it afterwards. All of it is made
before anything is written, so that it can be looked at first."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stablemoe_ds.config.load import dump_run
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.launch.cluster import ClusterConfig
from stablemoe_ds.launch.variables import DEFAULT_PORT, variables
from stablemoe_ds.run_directory.lock import LAUNCH

END, WIDTH = "END_OF_FILE", 110


@dataclass(frozen=True)
class Facts:
    """What a launch depends on besides its two files.

    stamp: names the launch, by moment and host (under torchrun every host launches, perhaps in the same moment).
    python: the interpreter that runs it. user: ``UID:GID``. port: a free one on this machine. git: commit of the
    working directory, None without. open_mpi: major version of the mpirun on PATH.
    """

    stamp: str
    python: str
    user: str
    port: int
    git: str | None = None
    open_mpi: int = 5


@dataclass(frozen=True)
class Probe:
    """In place of a run: every rank looks around and measures, for ``stablemoe doctor``. directory: as of a run."""

    directory: str
    name: str = "doctor"


@dataclass(frozen=True)
class Order:
    """A run that is to go to a cluster. Paths are relative to the working directory, unless absolute."""

    run: RunConfig | Probe
    cluster: ClusterConfig
    facts: Facts

    @property
    def folder(self) -> str:
        inside = "" if isinstance(self.run, Probe) else "launch/"
        return f"{self.run.directory}/{inside}{self.facts.stamp}"

    @property
    def logs(self) -> str:
        log_dir = self.cluster.log_dir
        return f"{log_dir}/{self.run.name}/{self.facts.stamp}" if log_dir else f"{self.folder}/logs"

    @property
    def run_file(self) -> str:
        return f"{self.folder}/run.yaml"

    @property
    def python(self) -> str:
        """The interpreter of the ranks."""
        return self.cluster.python or ("python" if self.cluster.container else self.facts.python)

    @property
    def program(self) -> list[str]:
        """What every rank runs, up to its last word, which is ``given``."""
        module = ["stablemoe_ds.launch.doctor.rank_probe"] if isinstance(self.run, Probe) else ["stablemoe_ds", "train"]
        return [self.python, "-m", *module]

    @property
    def given(self) -> str:
        """The folder, or a file in it."""
        return self.folder if isinstance(self.run, Probe) else self.run_file

    @property
    def command(self) -> list[str]:
        """What every rank runs."""
        return [*self.program, self.given]

    @cached_property
    def variables(self) -> dict[str, str]:
        return {LAUNCH: self.launch_name, **variables(self.cluster)}

    @property
    def launch_name(self) -> str:
        """The same for all attempts of a launch. Under torchrun each host launches; their rendezvous makes them one."""
        if self.cluster.launcher == "torchrun" and self.cluster.nodes > 1:
            return f"{self.run.name}@{(self.cluster.hosts or ['localhost'])[0]}:{self.port}"
        return self.facts.stamp

    @property
    def port(self) -> int:
        """Where ranks meet, SLURM apart."""
        return self.cluster.network.port or (self.facts.port if self.cluster.nodes == 1 else DEFAULT_PORT)

    def description(self, command: list[str]) -> str:
        """Text of ``job.json``."""
        facts: dict[str, Any] = {
            "run": self.run.name,
            "run_dir": self.run.directory,
            "cluster": self.cluster.name,
            "launcher": self.cluster.launcher,
            "world_size": self.cluster.world_size,
            "stamp": self.facts.stamp,
            "git": self.facts.git,
            "command": command,
            "environment": self.variables,
            "forward": self.cluster.forward,
            "working_directory": self.cluster.working_directory,
            "logs": self.logs,
        }
        return json.dumps(facts, indent=1) + "\n"


@dataclass(frozen=True)
class Job:
    """A launch, ready to be written and started. The first order's folder holds what the orders share.

    files: text by path. environment: set for the command, over what is there. stop: the signal that makes all ranks
    save, and whether the whole process group gets it or the command alone. tail: the command does not show what rank
    0 says. submits: the command hands the job to a queue and is done.
    """

    orders: tuple[Order, ...]
    command: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    stop: signal.Signals = signal.SIGTERM
    stop_group: bool = False
    tail: bool = False
    submits: bool = False

    @property
    def cluster(self) -> ClusterConfig:
        return self.orders[0].cluster

    @property
    def directory(self) -> str:
        """Where files are written and the command is started."""
        return self.cluster.working_directory or "."

    @property
    def folders(self) -> list[Path]:
        """Of each order, as seen from where launch is called."""
        return [Path(self.directory, order.folder) for order in self.orders]

    @property
    def all_files(self) -> dict[str, str]:
        """Text by path, those that every launch leaves included."""
        found: dict[str, str] = {}
        for order in self.orders:
            if isinstance(order.run, RunConfig):
                found[order.run_file] = dump_run(order.run)
            found[f"{order.folder}/job.json"] = order.description(list(self.command))
        return found | self.files

    def write(self) -> None:
        """Write the files. Raises FileExistsError if there is such a launch already."""
        for folder in self.folders:
            folder.mkdir(parents=True)
        for order in self.orders:
            Path(self.directory, order.logs).mkdir(parents=True, exist_ok=True)
        for path, text in self.all_files.items():
            Path(self.directory, path).write_text(text, encoding="utf-8")

    def as_shell(self, brief: bool = False) -> str:
        """The same in the words of a shell: what would be written, then what would be run.

        brief: without what every launch leaves, its ``run.yaml`` and ``job.json``.
        """
        return "\n".join(self._shell_lines(self.files if brief else self.all_files)) + "\n"

    def _shell_lines(self, files: dict[str, str]) -> Iterator[str]:
        if self.cluster.working_directory:
            yield f"cd {shlex.quote(self.directory)} || exit"
        folders = [place for order in self.orders for place in (order.folder, order.logs)]
        yield f"mkdir -p {shlex.join(folders)}"
        for path, text in files.items():
            yield f"cat > {shlex.quote(path)} <<'{END}'"
            yield f"{text}{END}"
        assigned = [f"{name}={value}" for name, value in self.environment.items()]
        yield wrapped(["env", *assigned, *self.command] if assigned else self.command)


def wrapped(words: Iterable[str], indent: int = 4) -> str:
    """A command for a shell, quoted, in lines of readable length."""
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + len(word) > WIDTH - indent:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return f" \\\n{' ' * indent}".join(lines)
