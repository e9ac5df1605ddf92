"""However often a run is killed while it saves, what it leaves is a checkpoint, and no step is lost that was saved.

python -m tests.checkpoint.test_kill --tries 500
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.checkpoint.savers import Kills, kill_here
from tests.distributed.launch import run_distributed
from tests.tiny import tiny_run
from tests.training.ranks import started
from tests.training.runs import TinyData, command, run_file, small_run
from tests.waiting import PATIENCE

TRIES = 60


def kill_savers(folder: Path, tries: int, seed: int = 0) -> Kills:
    run = tiny_run(run_dir=str(folder), parallel={"zero_stage": 0}, checkpoint={"keep": 2})
    (kills,) = run_distributed(1, kill_here, run, tries, seed, timeout=60 + 4 * tries)
    return kills


@pytest.mark.timeout(900)
def test_kill_at_any_moment_leaves_a_checkpoint(tmp_path: Path) -> None:
    kills = kill_savers(tmp_path, TRIES)
    print(kills)
    assert (kills.tried, kills.survived, kills.lost) == (TRIES, TRIES, 0)
    assert kills.during > TRIES // 2, "most must be killed while they write"


@pytest.mark.distributed
@pytest.mark.parametrize(("updates", "stage", "dtype"), [(3, 1, "fp32"), (5, 3, "bf16")])
def test_killed_ranks_leave_a_checkpoint(updates: int, stage: int, dtype: str, data: TinyData, tmp_path: Path) -> None:
    run = small_run(
        data,
        tmp_path / "run",
        schedule={"steps": 10_000},
        stages={"at_step": 4},
        parallel={"expert": 2, "timeout_minutes": 0.2, "zero_stage": stage},
        precision={"dtype": dtype},
        checkpoint={"every": 1, "keep": 2},
    )
    argv = ["train", run_file(run, tmp_path / "run.yaml")]
    checkpoints = Path(run.directory) / "checkpoints"
    with started(tmp_path, [argv, argv], {}) as ranks:
        end = time.monotonic() + PATIENCE
        while not (checkpoints / f"step-{updates:06d}").exists() and time.monotonic() < end:
            time.sleep(0.001)
        for rank in (0, 1):
            ranks.signal(rank, signal.SIGKILL)
        ranks.wait()
    verified = command("checkpoint", "verify", run.directory, "--json")
    assert verified.code == 0, verified.err
    assert verified.json["step"] >= updates - 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=TRIES)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(asdict(kill_savers(Path(name), given.tries, given.seed))))
