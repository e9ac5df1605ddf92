"""A run that is being trained is left alone by whoever else would write into its directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.lock import LOCK, only_writer, writer_of
from tests.training.ranks import started
from tests.training.runs import STEPS, TinyData, checkpoint_of, restarted, run_file, small_run
from tests.waiting import wait_until


def content(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which a process that holds it would give up by reading it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [[], ["checkpoint.resume=false"]], ids=["goes on", "begins anew"])
def test_all_ranks_of_a_second_run_are_refused_and_change_nothing(
    settings: list[str], finished: RunConfig, tmp_path: Path
) -> None:
    run = restarted(finished, tmp_path / "run", 9)
    folder = Path(run.directory)
    argv = ["train", run_file(run, tmp_path / "run.yaml"), *settings]
    with only_writer(folder):
        before = content(folder)
        with started(tmp_path, [argv, argv], {}) as ranks:
            ranks.wait()
            assert ranks.codes == [2, 2]
            for rank in (0, 1):
                assert f"{folder} is in use: process {os.getpid()} on" in ranks.error(rank)
        assert content(folder) == before


def test_a_checkpoint_is_not_converted_into_a_run_that_is_being_trained(finished: RunConfig, tmp_path: Path) -> None:
    from stablemoe_ds.checkpoint.convert.conversion import convert
    from stablemoe_ds.checkpoint.reader import Checkpoint

    more = finished.model_copy(
        update={"run_dir": str(tmp_path / "more"), "moe": finished.moe.model_copy(update={"experts": 8})}
    )
    source = Checkpoint.open(checkpoint_of(finished, STEPS))
    with only_writer(more.directory):
        with pytest.raises(UserError, match="is in use"):
            convert(source, more)
        assert [path.name for path in Path(more.directory).iterdir()] == [LOCK]


def test_a_killed_run_is_continued_at_once(data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run", schedule={"steps": 10_000}, data={"workers": 1})
    short = ["train", run_file(run, tmp_path / "run.yaml"), "schedule.steps=8"]
    metrics = Path(run.directory) / "metrics.jsonl"
    with started(tmp_path, [short[:2]], {}) as ranks:
        wait_until("updates", lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2)
        writer = writer_of(run.directory)
        assert writer is not None
        assert writer.pid == ranks.processes[0].pid
        ranks.signal(0, signal.SIGKILL)
        ranks.wait()
        assert (Path(run.directory) / LOCK).exists()
        (tmp_path / "again").mkdir()
        with started(tmp_path / "again", [short], {}) as again:
            again.wait()
            assert again.codes == [0], again.said(0)
    assert not (Path(run.directory) / LOCK).exists()
