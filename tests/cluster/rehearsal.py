"""A tiny run and a cluster file, `stablemoe launch` on the two, and what has to have come out of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.run_directory.metrics import MetricsLog
from tests.cluster.hosts import Host
from tests.cluster.slurm import Slurm
from tests.training.runs import TinyData, run_file, small_run
from tests.waiting import wait_until

STEPS, SWITCH, EVERY = 240, 200, 20
TIMEOUT_SECONDS = 12.0
START_SECONDS, END_SECONDS = 120.0, 360.0
"""From a start to the first update: libraries are imported, on however busy a machine; and from there to the end."""
STABLEMOE = [sys.executable, "-m", "stablemoe_ds"]


def two_rank_run(data: TinyData, folder: Path, steps: int = STEPS) -> RunConfig:
    """A few seconds of training on two ranks that cannot do without each other: each holds half of the experts."""
    return small_run(
        data,
        folder,
        parallel={"expert": 2, "timeout_minutes": TIMEOUT_SECONDS / 60},
        schedule={"steps": steps},
        stages={"at_step": SWITCH},
        checkpoint={"every": EVERY},
        logging={"probe_every": steps},
    )


@dataclass
class Rehearsal:
    """One run on one cluster. ``folder`` takes both files, the run directory and what `launch` prints."""

    run: RunConfig
    cluster: dict[str, Any]
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump({"device": "cpu", "nodes": 2, **self.cluster}))
        run_file(self.run, self.folder / "run.yaml")

    def command(self, *more: str) -> list[str]:
        """`stablemoe launch`; further runs and options may follow."""
        return [
            *STABLEMOE,
            "launch",
            "--cluster",
            str(self.folder / "cluster.yaml"),
            str(self.folder / "run.yaml"),
            *more,
        ]

    def start(self, host: Host, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """`stablemoe launch` in the foreground of a host."""
        return host.start(*self.command(), log=self.folder / f"{host.name}.txt", environment=environment)

    def submit(self, slurm: Slurm, *more_runs: str) -> list[str]:
        """`stablemoe launch --submit`; returns the job ids."""
        return slurm.login.run(*self.command(*more_runs, "--submit")).split()

    def steps(self) -> list[int]:
        """Updates in the history, in the order written."""
        lines = MetricsLog(Path(self.run.directory) / "metrics.jsonl").read()
        return [line["step"] for line in lines if line["kind"] == "train"]

    def wait_for_update(self, step: int, seconds: float = START_SECONDS) -> None:
        wait_until(f"update {step}", lambda: step in self.steps(), seconds, self.evidence)

    def wait_for_evidence(self, text: str, seconds: float) -> None:
        wait_until(text, lambda: text in self.evidence(), seconds, self.evidence)

    def saved(self) -> int:
        """The update that the newest checkpoint was made after; waits for the first, which a run does not."""
        latest = Path(self.run.directory) / "checkpoints" / "latest"
        wait_until("a checkpoint", latest.exists, START_SECONDS, self.evidence)
        return int(latest.read_text().removeprefix("step-"))

    def continued(self) -> int:
        """The update after which the latest attempt went on."""
        found = re.findall(r"continuing after update (\d+)", self.evidence())
        assert found, self.evidence()
        return max(map(int, found))

    def evidence(self) -> str:
        """All that was printed by `launch`, the batch script and the ranks."""
        launches = os.walk(Path(self.run.directory) / "launch")
        files = [*self.folder.glob("*.txt"), *sorted(Path(at, name) for at, _, names in launches for name in names)]
        found = []
        for path in files:
            if path.suffix not in (".yaml", ".json", ".sh"):
                with suppress(FileNotFoundError):  # put aside, or written anew, in this moment
                    found.append(f"--- {path}\n{path.read_text(errors='replace')}")
        return "\n".join(found)
