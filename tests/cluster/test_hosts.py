"""Runs over several hosts without a queue: deepspeed over pdsh, mpirun, torchrun; ranks killed, a cable pulled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Host
from tests.cluster.rehearsal import END_SECONDS, EVERY, START_SECONDS, STEPS, TIMEOUT_SECONDS, Rehearsal, two_rank_run
from tests.training.runs import TinyData, history

pytestmark = pytest.mark.cluster

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
LAUNCHERS: dict[str, dict[str, Any]] = {
    "deepspeed over pdsh": {"launcher": "deepspeed"},
    "deepspeed over mpirun": {"launcher": "deepspeed", "deepspeed": {"runner": "openmpi"}},
    "mpirun": {"launcher": "mpi"},
}


def rehearse(data: TinyData, folder: Path, **cluster: Any) -> Rehearsal:
    return Rehearsal(two_rank_run(data, folder / "run"), {"hosts": ["n1", "n2"], **cluster}, folder)


@pytest.mark.parametrize("how", LAUNCHERS)
def test_trains_on_two_hosts(
    how: str, two_hosts: dict[str, Host], data: TinyData, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    tiny = rehearse(data, tmp_path, **LAUNCHERS[how])
    launched = tiny.start(two_hosts["head"], AS_ROOT)
    tiny.wait_for_update(1)
    assert [list(two_hosts[name].ranks()) for name in ("n1", "n2")] == [[0], [1]]
    assert launched.wait(END_SECONDS) == 0, tiny.evidence()
    assert history(tiny.run) == uninterrupted
    assert [two_hosts[name].ranks() for name in ("n1", "n2")] == [{}, {}]


def test_pulled_cable_is_named_and_the_run_goes_on_when_it_is_back(
    two_hosts: dict[str, Host], data: TinyData, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    tiny = rehearse(data, tmp_path, launcher="deepspeed")
    launched = tiny.start(two_hosts["head"])
    tiny.wait_for_update(EVERY + 5)
    saved = tiny.saved()
    two_hosts["n2"].unplug()
    tiny.wait_for_evidence("lost contact with other ranks", TIMEOUT_SECONDS + 60)
    tiny.wait_for_evidence("starting again", START_SECONDS)
    two_hosts["n2"].plug()
    assert launched.wait(END_SECONDS) == 0, tiny.evidence()
    assert saved <= tiny.continued() < STEPS
    assert history(tiny.run) == uninterrupted


def test_torchrun_starts_a_killed_worker_again(
    two_hosts: dict[str, Host], data: TinyData, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    tiny = rehearse(data, tmp_path, launcher="torchrun")
    agents = [tiny.start(two_hosts[name]) for name in ("n1", "n2")]
    tiny.wait_for_update(EVERY + 5)
    saved = tiny.saved()
    [(rank, _)] = two_hosts["n2"].ranks().items()  # torchrun hands out the numbers as the hosts come
    two_hosts["n2"].kill_rank(rank)
    assert [agent.wait(END_SECONDS) for agent in agents] == [0, 0], tiny.evidence()
    assert saved <= tiny.continued() < STEPS
    assert history(tiny.run) == uninterrupted
