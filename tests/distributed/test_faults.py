"""A run that breaks says so on every rank in one line, ends in time, leaves nothing behind and can start again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from stablemoe_ds.launch.restart import decide
from stablemoe_ds.run_directory.progress import newest_saved
from tests.distributed.launch import run_distributed
from tests.distributed.worker import engine_of
from tests.tiny import tiny_run
from tests.training.ranks import started
from tests.training.runs import TinyData, command_here, run_file, small_run

SECONDS = 10.0
"""How long a collective of these runs may wait: on a busy machine ranks build the same model seconds apart."""
BROKEN = 3
"""The update in which the fault happens."""

pytestmark = pytest.mark.distributed


def in_update(number: int, act: Callable[[], None]) -> None:
    """Let this rank do something in an update, after it has sent its gradients and before it steps."""
    from stablemoe_ds.training.engine import Engine

    whole, updates = Engine.update, []

    def update(self: Engine, keep: bool = True) -> float:
        updates.append(None)
        if len(updates) == number:
            act()
        return whole(self, keep)

    Engine.update = update  # type: ignore[method-assign]


def in_read(number: int, act: Callable[[], None]) -> None:
    """Let the reader of this rank do something when it reads the sequences of an update."""
    from stablemoe_ds.data.dataset import TrainDataset

    updates = []

    def read(self: TrainDataset, windows: list[Any]) -> Any:
        updates.append(None)
        if len(updates) == number:
            act()
        return [self[window] for window in windows]

    TrainDataset.__getitems__ = read  # type: ignore[attr-defined]


def die(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def hear_them_out() -> None:
    """Let a rank that loses contact wait longer for the others' word: who has lost it, too, may be slow to say so."""
    from stablemoe_ds.distributed import faults

    faults.REPORT_SECONDS = SECONDS


def run_out_of_memory() -> None:
    raise MemoryError


def stumble() -> None:
    raise ValueError("the shelf is empty")


def arguments(data: TinyData, tmp_path: Path, ranks: int, /, *overrides: str, **sections: Any) -> list[list[str]]:
    """``stablemoe train`` for each rank; ``overrides`` are for the last one alone."""
    base: dict[str, dict[str, Any]] = {
        "parallel": {"timeout_minutes": SECONDS / 60},
        "checkpoint": {"every": 1},
        "schedule": {"tokens_per_step": 32 * 2 * ranks},
        "logging": {"probe_every": 100},
    }
    laid = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
    file = run_file(small_run(data, tmp_path / "run", **laid), tmp_path / "run.yaml")
    return [["train", file, *(overrides if rank == ranks - 1 else ())] for rank in range(ranks)]


def test_a_killed_rank_is_named_by_all_others(data: TinyData, tmp_path: Path) -> None:
    argvs = arguments(data, tmp_path, 3)
    killed = partial(in_update, BROKEN, partial(die, signal.SIGKILL))
    with started(tmp_path, argvs, {0: hear_them_out, 1: killed, 2: hear_them_out}) as ranks:
        ranks.wait()
        assert ranks.codes == [3, -9, 3]
        for rank in (0, 2):
            assert f"rank {rank} in update {BROKEN}, " in ranks.error(rank)
            assert "lost contact with other ranks in training." in ranks.error(rank)
            assert "no word from rank 1: killed, hung, or its host is gone" in ranks.error(rank)
            assert "Started again, the run goes on after step-000002" in ranks.error(rank)
            assert "Traceback" not in ranks.said(rank)
            assert "Traceback" in (tmp_path / "run" / "launch" / f"fault-{rank:04d}.txt").read_text()

    saved = newest_saved(tmp_path / "run")
    assert saved is not None
    assert saved.step == BROKEN - 1
    assert decide(tmp_path / "run", 3, limit=3, world_size=1).again
    answer = run_distributed(1, command_here, *argvs[0])[0]
    assert answer.code == 0
    assert f"continuing after update {BROKEN - 1}" in answer.out
    assert not decide(tmp_path / "run", 0, limit=3).again, "finished"


def test_a_rank_killed_while_routes_are_planned_ahead(data: TinyData, tmp_path: Path) -> None:
    argvs = arguments(data, tmp_path, 2, stages={"at_step": 1}, parallel={"expert": 2}, data={"workers": 1})
    with started(tmp_path, argvs, {1: partial(in_update, BROKEN, partial(die, signal.SIGKILL))}) as ranks:
        ranks.wait()
        assert ranks.codes == [3, -9]
        assert "no word from rank 1" in ranks.error(0)


def test_a_hung_rank_is_named_within_the_timeout(data: TinyData, tmp_path: Path) -> None:
    argvs = arguments(data, tmp_path, 2)
    with started(tmp_path, argvs, {0: partial(in_update, BROKEN, partial(die, signal.SIGSTOP))}) as ranks:
        ranks.wait(1)
        assert ranks.codes == [None, 3]
        assert f"(Timed out waiting {SECONDS * 1000:.0f}ms for" in ranks.error(1)
        assert "no word from rank 0: killed, hung, or its host is gone" in ranks.error(1)
        ranks.signal(0, signal.SIGCONT)
        ranks.wait(0)
        assert ranks.codes == [3, 3]
        assert "lost contact with other ranks" in ranks.error(0)


def test_out_of_memory_on_one_rank(data: TinyData, tmp_path: Path) -> None:
    argvs = arguments(data, tmp_path, 2)
    fault = {1: partial(in_update, BROKEN, run_out_of_memory)}
    with started(tmp_path, argvs, fault, STABLEMOE_TRACEBACK={1: "1"}) as ranks:
        ranks.wait()
        assert ranks.codes == [3, 1]
        assert f"rank 1 in update {BROKEN}, " in ranks.error(1)
        assert "out of memory in training.trainer._keep_or_drop; a smaller parallel.micro_batch" in ranks.error(1)
        assert "the cause is: rank 1 in update 3, " in ranks.error(0)
        assert "out of memory" in ranks.error(0)
        assert "Traceback" not in ranks.said(0)
        assert "\nMemoryError\n" in ranks.said(1), "asked for"


READERS: dict[str, tuple[int, Callable[[], None], str]] = {
    "raises": (1, stumble, "reading data failed: ValueError: the shelf is empty"),
    "is killed": (1, partial(die, signal.SIGKILL), "reading data failed: DataLoader worker (pid "),
    "is stuck": (0, partial(time.sleep, 1000), f"reading the next batch took longer than {SECONDS:g} s"),
}


@pytest.mark.parametrize("what", READERS)
def test_a_reader_that(what: str, data: TinyData, tmp_path: Path) -> None:
    workers, act, expected = READERS[what]
    argvs = arguments(data, tmp_path, 2, data={"workers": workers})
    with started(tmp_path, argvs, {1: partial(in_read, BROKEN + 2, act)}) as ranks:
        ranks.wait()
        assert ranks.codes == [3, 1]
        assert expected in ranks.error(1)


def test_another_configuration_on_one_rank_is_named_by_all(data: TinyData, tmp_path: Path) -> None:
    argvs = arguments(data, tmp_path, 2, "optimizer.lr=0.5", "moe.balance_weight=0.25")
    with started(tmp_path, argvs, {}) as ranks:
        ranks.wait()
        assert ranks.codes == [2, 2]
        for rank in (0, 1):
            assert "rank 1 has moe.balance_weight 0.25 (rank 0: " in ranks.error(rank)
            assert "optimizer.lr 0.5 (rank 0: 0.001)" in ranks.error(rank)
    assert not (tmp_path / "run" / "checkpoints").exists(), "nothing was built"


def test_another_world_size_on_one_rank_is_named_by_all(data: TinyData, tmp_path: Path) -> None:
    with started(tmp_path, arguments(data, tmp_path, 2), {}, WORLD_SIZE={1: "3"}) as ranks:
        ranks.wait()
        assert ranks.codes == [2, 2]
        for rank in (0, 1):
            assert "world size: rank 1 sees 3 processes, rank 0 sees 2" in ranks.error(rank)


def test_fewer_processes_than_the_launcher_meant(data: TinyData, tmp_path: Path) -> None:
    with started(tmp_path, arguments(data, tmp_path, 1), {}, STABLEMOE_WORLD_SIZE={0: "2"}) as ranks:
        ranks.wait()
        assert ranks.codes == [2]
        assert "the launcher meant to start 2 processes" in ranks.error(0)


def test_the_signal_before_a_time_limit_stops_all_ranks_alike(data: TinyData, tmp_path: Path) -> None:
    argvs = arguments(data, tmp_path, 2, checkpoint={"every": 0})
    with started(tmp_path, argvs, {1: partial(in_update, BROKEN, partial(die, signal.SIGUSR1))}) as ranks:
        ranks.wait()
        assert ranks.codes == [0, 0]
        # Rank 1 is told within update 3, after what the ranks tell each other in it: update 4 is the last.
        assert f"asked to stop: saved at step {BROKEN + 1}" in ranks.said(0)
    assert decide(tmp_path / "run", 0, limit=3).again


def test_the_signal_before_training_begins_is_not_lost(data: TinyData, tmp_path: Path) -> None:
    with started(tmp_path, arguments(data, tmp_path, 1), {0: ask_while_building}) as ranks:
        ranks.wait()
        assert ranks.codes == [0]
        assert "asked to stop: saved at step 1" in ranks.said(0)


def ask_while_building() -> None:
    from stablemoe_ds.training.engine import Engine

    whole = Engine.__init__

    def build(self: Engine, *args: Any) -> None:
        die(signal.SIGUSR1)
        whole(self, *args)

    Engine.__init__ = build  # type: ignore[method-assign]


def waiting_limits(stage: int) -> list[float]:
    """What a rank does: how long each of its groups waits, in seconds, by torch's own account."""
    run = tiny_run(parallel={"expert": 2, "zero_stage": stage}, moe={"layers": [2], "experts": 4})
    with engine_of(run):
        groups = dist.distributed_c10d._world.pg_map
        assert len(groups) > 3, "the world and megatron-core's groups at least"
        backends = [group._get_backend(dist.group.WORLD._device_types[0]) for group in groups]
        return [backend.options._timeout.total_seconds() for backend in backends]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_group_waits_as_long_as_the_run_says(stage: int) -> None:
    for limits in run_distributed(2, waiting_limits, stage):
        assert set(limits) == {60.0}, "what engine_of asks for"
