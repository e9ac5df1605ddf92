"""One rank of ``stablemoe doctor --cluster``: looks around, meets the others, measures, and reports.

    python -m stablemoe_ds.launch.doctor.rank_probe FOLDER

under any launcher. Every rank reports twice: as a file in the folder, which works even if it cannot connect, and to the
other ranks once they are connected, which write down reports that do not reach the folder otherwise. It exits with 0
whatever it finds: that is in its report.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from stablemoe_ds.distributed.environment import check_world_size, resolve
from stablemoe_ds.errors import CLUSTER_FAULT, RunError
from stablemoe_ds.launch.doctor.rank_report import Report, look_closer, new_report

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE_SECONDS, STEP_SECONDS, CONNECT_SECONDS, SEEING_SECONDS = 60.0, 30.0, 3.0, 5.0
LIMIT_SECONDS = PATIENCE_SECONDS + 5 * STEP_SECONDS
"""A probe does not live longer than this, whatever hangs."""
MARGIN_SECONDS = 0.01


def probe(folder: Path, patience: float = PATIENCE_SECONDS) -> Report:
    """A rank's whole part; returns what it has to report. patience: seconds in which all ranks have to meet."""
    report = new_report(folder)
    report.write(folder)
    look_closer(report, folder)
    try:
        check_world_size(report.size)
        if report.size > 1:
            _meet(report, folder, patience)
        else:
            report.stage = "done"
    except Exception as error:  # whatever it is, it belongs into the table
        report.problem = report.problem or _first_line(error)
    report.write(folder)
    return report


def _meet(report: Report, folder: Path, patience: float) -> None:
    """Connect to the others, exchange reports, measure together; once connected, errors are reported to them as well.

    Raises RunError if they cannot be found, RuntimeError if rank 0 goes away.
    """
    report.stage = "rendezvous"
    report.write(folder)
    end = time.monotonic() + patience
    store = _store(report.rank, patience)
    came = _exchange(store, "first", report, range(report.size), end)
    try:
        if missing := [str(rank) for rank in range(report.size) if rank not in came]:
            raise RunError(f"rank {', '.join(missing)} did not come within {patience:g} s", CLUSTER_FAULT)
        report.unseen = _unseen(report, came.values(), folder)
        _measure(report, store, all(other.gpus > other.local_rank for other in came.values()))
        report.stage = "done"
    except Exception as error:
        report.problem = _first_line(error)
    report.write(folder)
    end = time.monotonic() + 2 * STEP_SECONDS
    heard = came | _exchange(store, "last", report, came, end)
    for other in heard.values():
        if not (folder / other.file).exists():
            other.write(folder)
    _leave(store, report.rank, len(came), end)


def _store(rank: int, patience: float) -> Store:
    """Where ranks meet: rank 0 keeps it. Raises RunError if it cannot be reached."""
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    resolve(address)
    try:
        return dist.TCPStore(
            address,
            port,
            is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            wait_for_workers=False,
            timeout=timedelta(seconds=patience),
        )
    except RuntimeError as error:
        why = _first_line(error) if rank == 0 else _refusal(address, port)
        verb = "cannot keep" if rank == 0 else "cannot reach"
        text = f"{verb} the rendezvous {address}:{port} within {patience:g} s: {why}"
        raise RunError(text, CLUSTER_FAULT) from error


def _refusal(address: str, port: int) -> str:
    """What the network itself says to a connection; torch says only that it took too long."""
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return "it was there too late"


def _exchange(store: Store, name: str, mine: Report, ranks: Iterable[int], end: float) -> dict[int, Report]:
    """Send a report to the others and collect those that arrive before ``end``; a rank's own is always among them."""
    store.set(f"{name}/{mine.rank}", mine.as_json())
    heard = {}
    for rank in ranks:
        if rank == mine.rank:
            heard[rank] = mine
            continue
        key, left = f"{name}/{rank}", max(MARGIN_SECONDS, end - time.monotonic())
        try:
            store.wait([key], timedelta(seconds=left))
            heard[rank] = Report(**json.loads(store.get(key)))
        except RuntimeError:
            continue
    return heard


def _unseen(report: Report, others: Iterable[Report], folder: Path) -> list[str]:
    """Hosts whose first report does not come to this rank's folder. Only the first rank of a host looks."""
    if not report.leads:
        return []
    # Not in this folder but next to it: under torchrun each machine's command has one of its own.
    parent = folder.resolve().parent
    awaited = [(other.host, parent / other.folder / other.file) for other in others if other.leads]
    end = time.monotonic() + SEEING_SECONDS
    while (unseen := [host for host, path in awaited if not path.exists()]) and time.monotonic() < end:
        time.sleep(0.2)
    return unseen


def _measure(report: Report, store: Store, gpu: bool) -> None:
    import torch.distributed as dist

    from stablemoe_ds.launch.doctor.measure import clock_offset, join, speeds

    report.stage = "joining"
    device = join(store, report.rank, report.size, report.local_rank, gpu, STEP_SECONDS)
    report.stage = "measuring"
    report.clock = clock_offset()
    measured = speeds(device)
    if report.rank == 0:
        report.speeds = [asdict(speed) for speed in measured]
    dist.destroy_process_group()


def _leave(store: Store, rank: int, ranks: int, end: float) -> None:
    """Leave the store; rank 0, which keeps it, leaves last."""
    left = store.add("left", 1)
    while rank == 0 and left < ranks and time.monotonic() < end:
        time.sleep(0.05)
        left = store.add("left", 0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0: a launcher that sees one rank fail would end the others before they have spoken."""
    parser = argparse.ArgumentParser(
        prog="python -m stablemoe_ds.launch.doctor.rank_probe", description="One rank of the doctor."
    )
    parser.add_argument("folder", type=Path, help="shared by all ranks; takes the reports")
    parser.add_argument("--patience", type=float, default=PATIENCE_SECONDS, help="seconds in which all have to meet")
    given = parser.parse_args(argv)
    signal.alarm(int(given.patience + LIMIT_SECONDS - PATIENCE_SECONDS))
    report = probe(given.folder, given.patience)
    print(f"rank {report.rank} on {report.host}: {report.problem or report.stage}", flush=True)
    return 0


if __name__ == "__main__":
    os._exit(main())  # threads of a group that broke may wait for ranks that are gone
