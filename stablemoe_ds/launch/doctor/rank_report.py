"""What one rank of a probe reports: what it sees alone, and how far it got with the others."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stablemoe_ds.distributed.environment import read_launcher_environment
from stablemoe_ds.launch.doctor import installation, machine
from stablemoe_ds.launch.doctor.findings import Finding

Stage = Literal["looking", "rendezvous", "joining", "measuring", "done"]
PATTERN = "report-*.json"


@dataclass
class Report:
    """One rank's. A rank that is killed or hangs leaves the one it wrote last.

    identity: differs for every process. folder: name of the one it writes to. size: number of ranks that it sees.
    gpus: how many it can use. findings: what is to be said of its host, by the first rank of it. stage: how far it
    came. problem: why not further, in one line. unwritable: why it could not write in the folder. unseen: hosts whose
    reports it does not find there. clock: seconds it is ahead of rank 0's. speeds: the group's, measured by rank 0.
    """

    identity: str
    folder: str
    host: str
    rank: int
    size: int
    local_rank: int
    versions: dict[str, str] = field(default_factory=dict)
    interfaces: list[str] = field(default_factory=list)
    gpus: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)
    stage: Stage = "looking"
    problem: str = ""
    unwritable: str = ""
    unseen: list[str] = field(default_factory=list)
    clock: float = 0.0
    speeds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def file(self) -> str:
        return f"report-{self.identity}.json"

    @property
    def leads(self) -> bool:
        """Whether it speaks for its host."""
        return self.local_rank == 0

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def write(self, folder: Path) -> None:
        """Leave the report in the folder; where that cannot be done, it says so itself."""
        passing = folder / f"{self.file}.new"
        try:
            passing.write_text(self.as_json(), encoding="utf-8")
            passing.replace(folder / self.file)
        except OSError as error:
            self.unwritable = f"{folder}: {error.strerror}"


def new_report(folder: Path) -> Report:
    """What a rank knows at once, without torch."""
    rank, size, local_rank = read_launcher_environment()
    report = Report(uuid.uuid4().hex, folder.resolve().name, socket.gethostname(), rank, size, local_rank)
    report.versions = dict(_versions())
    report.interfaces = [name for _, name in socket.if_nameindex()]
    return report


def look_closer(report: Report, folder: Path) -> None:
    """Add what takes a moment: the checks of ``stablemoe doctor`` that concern a node, and the GPUs torch sees."""
    if report.leads:
        report.findings = [finding.as_dict() for check in _checks(folder) for finding in check()]
    with contextlib.suppress(ImportError, OSError):  # among the findings
        import torch

        report.gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0


def read_reports(folder: Path) -> list[Report]:
    """All reports in a folder, by rank."""
    found = [_read(path) for path in folder.glob(PATTERN)]
    return sorted((report for report in found if report), key=lambda report: (report.rank, report.host))


def _read(path: Path) -> Report | None:
    try:
        return Report(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _checks(folder: Path) -> list[Callable[[], Iterator[Finding]]]:
    gpus = [] if os.environ.get("DS_ACCELERATOR") == "cpu" else [installation.torch_build, machine.gpus]
    return [
        installation.pinned_packages,
        installation.sentencepiece,
        *gpus,
        machine.threads,
        machine.shared_memory,
        partial(machine.disk, folder if folder.is_dir() else None),
        machine.stale_locks,
    ]


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", sys.version.split()[0]
    for package in ("torch", *installation.PINNED):
        yield package, installation.version_of(package) or "not installed"
    yield "stablemoe_ds", f"{installation.version_of('stablemoe_ds') or 'not installed'}, code {_code()}"


def _code() -> str:
    """Eight digits that change with any line of this package: checkouts of one version may differ."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]
