"""``stablemoe doctor --cluster``: probes that really meet, nodes that do not come or differ, and what is said then."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stablemoe_ds.cli import main
from stablemoe_ds.distributed.environment import free_port, rank_environment
from stablemoe_ds.launch.cluster import ClusterConfig
from stablemoe_ds.launch.doctor.examine_cluster import examine_cluster
from stablemoe_ds.launch.doctor.findings import Finding
from stablemoe_ds.launch.doctor.rank_report import Report, read_reports
from stablemoe_ds.launch.doctor.verdicts import Probed, judge
from stablemoe_ds.launch.make_jobs import probe_job
from tests.launch.tools import alive, cluster, facts, stubbed
from tests.waiting import wait_until

PROBE = [sys.executable, "-m", "stablemoe_ds.launch.doctor.rank_probe"]
PROBE_AHEAD = """
import runpy, time
now = time.time
time.time = lambda: now() + 100
runpy.run_module("stablemoe_ds.launch.doctor.rank_probe", run_name="__main__")
"""
ENDS_AS_RANK_1 = """#!/bin/sh
[ "$RANK" = 0 ] && exec {python} "$@"
# When it has ended, the launcher leaves rank 0 five seconds: that one has to have reported by then.
until ls runs/doctor/*/report-*.json > /dev/null 2>&1; do sleep 0.05; done
echo no such module
exit 1
"""
HANGS = """#!/bin/sh
[ "$1" = --version ] && exit
sh -c 'echo $$ > pid; exec sleep 1000' &
wait
"""
LOCAL = {"launcher": "local", "processes_per_node": 2, "environment": {"GLOO_SOCKET_IFNAME": "lo"}}
TWO_NODES = cluster(launcher="mpi", nodes=2, hosts=["n1", "n2"])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def probes(*folders: str, commands: tuple[list[str], ...] = (PROBE, PROBE)) -> list[Report]:
    """Run a probe in each folder, each as the one rank of a node of its own. Returns the reports in the first."""
    port = free_port()
    told = {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*command, folder], env={**os.environ, **rank_environment(rank, len(folders), port), **told})
        for rank, (command, folder) in enumerate(zip(commands, folders, strict=True))
    ]
    try:
        assert [process.wait(200) for process in started] == [0] * len(started)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return read_reports(Path(folders[0]))


def report(rank: int = 0, **changed: Any) -> Report:
    """Of a rank to which nothing strange happened, alone on its node."""
    well = Report(str(rank), "stamp", f"n{rank + 1}", rank, 2, 0, versions={"torch": "2.13.0"}, stage="done")
    return replace(well, **changed)


def bad(reports: list[Report], where: ClusterConfig = TWO_NODES, **known: Any) -> list[Finding]:
    """What is not well about these reports."""
    return [found for found in judge(Probed(where, reports, where.hosts, **known)) if found.verdict != "ok"]


def one(reports: list[Report], where: ClusterConfig = TWO_NODES, **known: Any) -> Finding:
    (found,) = bad(reports, where, **known)
    assert found.remedy
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_of_this_machine_are_well(capsys: pytest.CaptureFixture[str]) -> None:
    Path("cluster.yaml").write_text(json.dumps({"device": "cpu", "network": {"interface": "lo"}, **LOCAL}))
    with pytest.raises(SystemExit) as ending:
        main(["doctor", "--cluster", "cluster.yaml", "--json"])
    findings = {found["name"]: found for found in json.loads(capsys.readouterr().out)}
    assert [found for found in findings.values() if found["verdict"] == "fail"] == []
    assert ending.value.code == 0
    wanted = {"python", "torch", "deepspeed", "megatron-core", "stablemoe_ds", "interface", "rendezvous"}
    assert wanted | {"run directory", "disk", "torch extensions", "all-reduce", "all-to-all"} <= set(findings)
    assert findings["ranks"]["found"] == "2 on 1 node have reported"
    assert "MiB a rank; gloo, 2 ranks on 1 node" in findings["all-to-all"]["found"]


@pytest.mark.slow
@pytest.mark.distributed
def test_nodes_compare_their_clocks_and_folder() -> None:
    Path("shared").mkdir()
    first, second = probes("shared", "shared", commands=(PROBE, [sys.executable, "-c", PROBE_AHEAD]))
    assert (first.stage, second.stage) == ("done", "done")
    assert (first.unseen, second.unseen) == ([], [])
    assert (first.clock, second.clock) == (0.0, pytest.approx(100, abs=1))
    findings = {found.name: found for found in judge(Probed(TWO_NODES, [first, second]))}
    assert findings["clocks"].verdict == "warn"
    assert "all-reduce" in findings


@pytest.mark.slow
@pytest.mark.distributed
def test_a_folder_that_is_not_shared_is_noticed_and_the_node_still_heard() -> None:
    for folder in ("a/stamp", "b/stamp"):
        Path(folder).mkdir(parents=True)
    first, second = probes("a/stamp", "b/stamp")
    assert first.unseen == second.unseen == [socket.gethostname()]
    assert first.stage == "done", "the rest is measured nevertheless"
    here: dict[str, Any] = {"findings": [], "speeds": []}  # how this machine is, and how fast, is of no interest
    found = one([replace(first, host="n1", unseen=["n2"], **here), replace(second, host="n2", unseen=[], **here)])
    assert (found.name, found.verdict, found.found) == ("run directory", "fail", "n1 does not see what n2 has written")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_folder_that_is_not_there_is_told_by_the_others() -> None:
    Path("a/stamp").mkdir(parents=True)
    _, second = probes("a/stamp", "nowhere/stamp")
    assert second.unwritable == "nowhere/stamp: No such file or directory"
    found = one([report(0, versions={}), replace(second, host="n2", versions={})])
    assert found.found == f"n2 cannot write {second.unwritable}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "told"),
    [
        (0, "rank 1 did not come within 2 s"),
        (1, "cannot reach the rendezvous 127.0.0.1:{port} within 2 s: Connection refused"),
    ],
)
def test_a_rank_whose_peer_never_comes_says_so(rank: int, told: str) -> None:
    Path("shared").mkdir()
    port = str(free_port())
    alone = one_probe(RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert (alone.stage, alone.problem) == ("rendezvous", told.format(port=port))
    silent, met = bad([replace(alone, host=f"n{rank + 1}")])
    assert (silent.name, silent.found) == ("ranks", f"n{2 - rank}: no report of rank {1 - rank}")
    assert (met.name, met.verdict, met.found) == ("rendezvous", "fail", f"n{rank + 1}: {alone.problem}")


@pytest.mark.slow
def test_a_name_without_an_address_is_named_at_once() -> None:
    Path("shared").mkdir()
    alone = one_probe(RANK="1", MASTER_ADDR="nowhere.invalid", MASTER_PORT="29500")
    assert alone.problem.startswith("MASTER_ADDR=nowhere.invalid: ")


def one_probe(**variables: str) -> Report:
    """One of two ranks, which waits two seconds for the other."""
    told = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [*PROBE, "shared", "--patience", "2"]
    subprocess.run(command, env={**os.environ, **told, **variables}, timeout=200, check=True)
    (found,) = read_reports(Path("shared"))
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_does_not_start_is_named_with_its_last_words() -> None:
    python = Path("python")
    python.write_text(ENDS_AS_RANK_1.format(python=sys.executable))
    python.chmod(0o755)
    findings = examine_cluster(cluster(**LOCAL, python=str(python.resolve())))
    told = {found.name: found.found for found in findings if found.verdict == "fail"}
    assert told["launcher"].startswith("local: ended with 1")
    assert told["ranks"] == f"{socket.gethostname()}: no report of rank 1; a log says: no such module"


def test_a_launcher_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", stubbed(tmp_path / "seen")["PATH"])
    mpirun = tmp_path / "seen" / "bin" / "mpirun"
    mpirun.write_text(HANGS)
    mpirun.chmod(0o755)
    start = time.monotonic()
    findings = examine_cluster(cluster(launcher="mpi"), seconds=3)
    assert time.monotonic() - start < 60
    assert findings[0].found == "mpi: had not ended after 3 s"
    assert findings[1].found.startswith("all nodes: no report of rank 0")
    wait_until("mpirun is gone", lambda: not alive(int(Path("pid").read_text())))


def test_a_launcher_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = examine_cluster(TWO_NODES)
    assert findings[0].found == "mpi: cannot start mpirun: No such file or directory"
    assert [found.found for found in findings[1:]] == ["all nodes: no report of ranks 0 to 1"]


def test_a_folder_that_cannot_be_made_is_told() -> None:
    Path("runs").touch()
    (found,) = examine_cluster(TWO_NODES)
    assert (found.name, found.verdict) == ("run directory", "fail")


def test_different_versions_name_the_odd_node(tmp_path: Path) -> None:
    where = cluster(launcher="mpi", nodes=3, hosts=["n1", "n2", "n3"])
    reports = [report(rank, size=3) for rank in range(3)]
    for each in reports:
        each.write(tmp_path)
    file = tmp_path / reports[1].file
    file.write_text(file.read_text().replace("2.13.0", "2.12.1"))
    found = one(read_reports(tmp_path), where)
    assert (found.name, found.verdict, found.found) == ("torch", "fail", "2.13.0 on n1, n3; 2.12.1 on n2")
    assert found.remedy.endswith("bring n2 to 2.13.0")


@pytest.mark.parametrize(
    ("changed", "settings", "name", "told"),
    [
        ({"interfaces": ["lo", "eth1"]}, {"network": {"interface": "eth1"}}, "interface", "n1 has no eth1"),
        ({"size": 1}, {}, "ranks", "n2: a rank counts 1 ranks of 2"),
        ({"stage": "joining"}, {}, "rendezvous", "n2: ended while connecting to all others"),
        ({"clock": 75.0}, {}, "clocks", "n2 is 75000 ms ahead of n1"),
        ({"findings": [Finding("disk", "fail", "full", "rm").as_dict()]}, {}, "disk", "n2: full"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_one_node(changed: dict[str, Any], settings: dict[str, Any], name: str, told: str) -> None:
    found = one([report(0), report(1, **changed)], TWO_NODES.model_copy(update=_network(settings)))
    assert found.name == name
    assert found.found.startswith(told)


def _network(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(cluster(**settings), name) for name in settings}


def test_a_rank_without_a_gpu_is_named() -> None:
    where = cluster(launcher="mpi", device="gpu", nodes=2, processes_per_node=2, hosts=["n1", "n2"])
    reports = [
        report(rank, size=4, host=f"n{rank // 2 + 1}", local_rank=rank % 2, gpus=2 - rank // 2) for rank in range(4)
    ]
    assert one(reports, where).found == "n2: ranks see 1 GPUs, processes_per_node is 2"


@pytest.mark.parametrize(("speed", "verdict"), [(0.01, "warn"), (1.0, "ok")])
def test_a_slow_network_is_a_warning(speed: float, verdict: str) -> None:
    speeds = [{"collective": "all-to-all", "backend": "gloo", "mib": 16, "gb_per_second": speed}]
    found = {found.name: found for found in judge(Probed(TWO_NODES, [report(0, speeds=speeds), report(1)]))}
    assert found["all-to-all"].verdict == verdict
    assert found["all-to-all"].found == f"{speed:g} GB/s with 16 MiB a rank; gloo, 2 ranks on all nodes"


def test_a_node_whose_name_is_not_known_is_counted() -> None:
    where = cluster(launcher="mpi", nodes=2, hosts=["10.0.0.1", "10.0.0.2"])
    assert one([report(0)], where).found == "node 2 of 2: no report of rank 1"


def test_a_report_cut_off_in_writing_is_left_out(tmp_path: Path) -> None:
    report(0).write(tmp_path)
    (tmp_path / "report-x.json").write_text(report(1).as_json()[:50])
    assert [each.rank for each in read_reports(tmp_path)] == [0]


@pytest.mark.parametrize("launcher", ["local", "mpi", "deepspeed", "torchrun", "slurm"])
def test_every_launcher_starts_the_probe_where_it_would_train(launcher: str) -> None:
    job = probe_job(cluster(launcher=launcher, run_dir="out", nodes=1), facts())
    words = " ".join(job.command) + "".join(text for path, text in job.files.items() if path.endswith("job.sh"))
    assert "stablemoe_ds.launch.doctor.rank_probe" in words
    assert "out/doctor/stamp" in words
    assert "run.yaml" not in words + " ".join(job.all_files)


def test_no_torch_is_needed_to_ask() -> None:
    code = "import stablemoe_ds.launch.doctor.examine_cluster, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) & {"torch", "deepspeed", "megatron", "mpi4py"} == set()


QUEUE = """#!/bin/bash
polls=$(cat polls 2> /dev/null || echo 0)
echo $((polls + 1)) > polls
case $polls in
    %s
esac
"""


@pytest.mark.parametrize(
    ("states", "minutes", "told"),
    [
        ("0) echo 'PENDING|Priority|';; *) echo 'COMPLETED|None|n1'", 2, ""),
        ("0) echo 'RUNNING|None|n1';; *) echo 'FAILED|NonZeroExitCode|n1'", 2, "job 1 FAILED (NonZeroExitCode)"),
        ("*) echo 'PENDING|Resources|'", 0.02, "job 1 is still PENDING (Resources); --wait says"),
    ],
    ids=["completed", "failed", "pending"],
)
def test_a_job_is_followed_through_the_queue_and_never_left_there(
    states: str, minutes: float, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = stubbed(tmp_path / "seen")
    monkeypatch.setenv("PATH", environment["PATH"])
    monkeypatch.setenv("SEEN", environment["SEEN"])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name, text in (("squeue", QUEUE % states), ("scancel", "#!/bin/bash\necho $1 > cancelled\n")):
        (tmp_path / "seen" / "bin" / name).write_text(text)
        (tmp_path / "seen" / "bin" / name).chmod(0o755)
    findings = examine_cluster(cluster(), queue_minutes=minutes)
    problems = [found.found for found in findings if found.name == "launcher"]
    assert [problem.startswith(f"slurm: {told}") for problem in problems] == [True] * bool(told)
    assert Path("cancelled").read_text() == "1\n"
