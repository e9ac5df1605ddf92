"""The fake clusters themselves: their hosts are apart, their SLURM schedules, and they leave nothing behind."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cluster.hosts import BOOT_SECONDS, Host, hosts
from tests.cluster.slurm import Slurm, slurm
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


def test_hosts_have_everything_of_their_own_but_the_files(two_hosts: dict[str, Host]) -> None:
    head, n1 = two_hosts["head"], two_hosts["n1"]
    assert head.run("ssh", "n1", "hostname").strip() == "n1"
    n1.run("touch", "/dev/shm/segment", "/run/socket", "shared")
    seen = head.run("sh", "-c", "ls /dev/shm /run; ls shared")
    assert "segment" not in seen
    assert "socket" not in seen
    assert "shared" in seen
    n1.start("sleep", "1234", log=n1.folder / "sleep.log")
    wait_until("it sleeps", lambda: "sleep 1234" in n1.run("ps", "ax"), BOOT_SECONDS)
    assert "sleep 1234" not in head.run("ps", "ax")


def test_pdsh_reaches_all(two_hosts: dict[str, Host]) -> None:
    said = two_hosts["head"].run("pdsh", "-R", "ssh", "-w", "n[1-2]", "hostname")
    assert sorted(said.splitlines()) == ["n1: n1", "n2: n2"]


def test_unplugged_host_is_out_of_reach_until_plugged_in(two_hosts: dict[str, Host]) -> None:
    head, n2 = two_hosts["head"], two_hosts["n2"]
    ask = ("ssh", "n2", "hostname")
    assert head.run(*ask) == "n2\n"
    n2.unplug()
    assert head.attempt(*ask).returncode == 255, "what ssh ends with where it finds nobody"
    n2.plug()
    wait_until("it answers", lambda: head.attempt(*ask).stdout == "n2\n", BOOT_SECONDS)


def test_host_without_power_comes_back_empty(two_hosts: dict[str, Host]) -> None:
    n2 = two_hosts["n2"]
    sleeping = n2.start("sleep", "1234", log=n2.folder / "sleep.log")
    n2.power_off()
    assert sleeping.wait(20) != 0
    n2.power_on()
    assert "sleep" not in n2.run("ps", "ax")


def test_nothing_is_left_when_a_test_fails(tmp_path: Path) -> None:
    def outside() -> str:
        links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
        return links + Path("/etc/hosts").read_text() + "".join(sorted(map(str, Path("/run").iterdir())))

    def fail() -> None:
        with hosts(tmp_path, ["n1"]) as made:
            made["n1"].run("setsid", "--fork", "sh", "-c", f"exec {daemon} >/dev/null 2>&1")
            wait_until("the daemon runs", lambda: daemon in processes(), BOOT_SECONDS)
            raise ZeroDivisionError

    def processes() -> str:
        return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout

    before, daemon = outside(), "sleep 1234.5"
    with pytest.raises(ZeroDivisionError):
        fail()
    assert daemon not in processes()
    assert f"{tmp_path}/etc" not in processes()
    assert outside() == before


def test_slurm_gives_a_job_its_gpus(three_nodes: Slurm) -> None:
    said = three_nodes.login.run(
        "srun", "--nodes=2", "--gpus-per-node=4", "--label", "printenv", "CUDA_VISIBLE_DEVICES"
    )
    assert sorted(said.splitlines()) == ["0: 0,1,2,3", "1: 0,1,2,3"]


def test_slurm_has_no_more_gpus_than_it_has(three_nodes: Slurm) -> None:
    refused = three_nodes.login.attempt("srun", "--nodes=1", "--gpus-per-node=9", "true")
    assert "Requested node configuration is not available" in refused.stderr


def test_requeued_job_starts_again_under_its_number(three_nodes: Slurm) -> None:
    script = '#!/bin/bash\necho "restart ${SLURM_RESTART_COUNT:-0}"\nsleep 300\n'
    job = three_nodes.submit(script, "--open-mode=append", "--output=job.log")
    log = three_nodes.folder / "job.log"

    def said() -> list[str]:
        return [line for line in log.read_text().splitlines() if line.startswith("restart")] if log.exists() else []

    wait_until("it runs", lambda: said() == ["restart 0"], BOOT_SECONDS)
    three_nodes.login.run("scontrol", "requeue", job)
    wait_until("it says so", lambda: said() == ["restart 0", "restart 1"], BOOT_SECONDS, log.read_text)


def test_many_nodes_on_one_host(tmp_path: Path) -> None:
    with slurm(tmp_path / "slurm", {f"n{i}": "many" for i in range(1, 65)}, cpus=96) as large:
        assert large.login.run("sinfo", "--noheader", "--format=%D %G %T").strip() == "64 gpu:h100:8 idle"
        ranks = large.login.run("srun", "--nodes=4", "--ntasks-per-node=8", "printenv", "SLURM_PROCID")
        assert sorted(map(int, ranks.split())) == list(range(32))
