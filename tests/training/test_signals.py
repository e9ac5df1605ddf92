"""A run that is asked to stop leaves a checkpoint, ends well, and goes on when started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.training.ranks import ENDING
from tests.training.runs import TinyData, history, run_file, small_run, train_run
from tests.waiting import PATIENCE

STEPS = 200
"""Updates enough that a run which is asked to stop in the fifth is still there to hear it."""
ALONE = ["-m", "stablemoe_ds", "train"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "stablemoe_ds", "train"]


@dataclass
class Started:
    """A command, and a mark in its environment that all its descendants carry."""

    command: list[str]
    log: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        environment = {**os.environ, "STABLEMOE_TEST_MARK": self.mark}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def alive(self) -> dict[int, dict[str, str]]:
        """Environment by process id of everything the command has started that still runs."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            if environment.get("STABLEMOE_TEST_MARK") == self.mark:
                found[int(entry.name)] = environment
        return found

    def rank(self, number: int) -> int:
        """Process id of a rank: the eldest of the processes that carry its number."""
        of_it = [pid for pid, environment in self.alive().items() if environment.get("RANK") == str(number)]
        return min(of_it, key=lambda pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]))

    def wait_for_update(self, folder: Path, step: int) -> None:
        metrics, end = folder / "metrics.jsonl", time.monotonic() + PATIENCE
        while f'"step": {step}, "kind": "train"' not in (metrics.read_text() if metrics.exists() else ""):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)

    def end(self) -> str:
        """Wait for a good end without orphans; returns what was printed."""
        code = self.process.wait(PATIENCE)
        printed = self.log.read_text()
        assert code == 0, printed
        deadline = time.monotonic() + ENDING
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.alive() == {}
        return printed


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Started]]:
    """What a test has started; whatever is left of it afterwards is killed."""
    commands: list[Started] = []
    yield commands
    for command in commands:
        for pid in command.alive():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("how", ["SIGINT to the group, alone, in stage 2", "SIGTERM to one rank of two, in stage 1"])
def test_stops_and_continues(how: str, data: TinyData, tmp_path: Path, started: list[Started]) -> None:
    two = how.startswith("SIGTERM")
    folder = tmp_path / "run"
    run = small_run(
        data,
        folder,
        data={"workers": 1},
        schedule={"steps": STEPS},
        stages={"at_step": STEPS - 1 if two else 3},
        parallel={"expert": 2 if two else 1},
        logging={"probe_every": STEPS},
    )
    command = [*(TWO if two else ALONE), run_file(run, tmp_path / "run.yaml")]

    first = Started(command, tmp_path / "first.txt")
    started.append(first)
    first.wait_for_update(folder, 1)
    target = first.rank(1) if two else first.process.pid
    first.wait_for_update(folder, 5)
    if two:
        os.kill(target, signal.SIGTERM)
    else:
        os.killpg(target, signal.SIGINT)  # as a terminal does: the loader's worker gets it, too
    stopped = re.search(r"asked to stop: saved at step (\d+)", first.end())
    assert stopped, "it said where it stopped"
    step = int(stopped[1])
    assert 5 <= step < STEPS
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{step:06d}"
    assert history(run)[-1]["step"] == step

    if two:  # the launcher has done its part; the same run goes on in processes that start at once
        inline = run.model_copy(update={"data": run.data.model_copy(update={"workers": 0})})
        said = train_run(inline, ranks=2)
    else:
        started.append(Started(command, tmp_path / "second.txt"))
        said = started[-1].end()
    assert f"continuing after update {step}, in stage {1 if two else 2}" in said
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{STEPS:06d}"
    assert [line["step"] for line in history(run, "train")] == list(range(1, STEPS + 1))
