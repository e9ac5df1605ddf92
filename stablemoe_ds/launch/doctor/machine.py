"""Whether the machine has what a run takes: cores, memory, GPUs, room to write, processes that can talk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stablemoe_ds.launch.doctor.collectives import talk
from stablemoe_ds.launch.doctor.findings import Finding

TALK_SECONDS = 90.0
MIB, GIB = 2**20, 2**30


def gpus() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError):
        return  # reported above
    if not torch.cuda.is_available():
        yield Finding("gpu", "ok", "none: runs go to the CPU, over gloo")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found = f"{torch.cuda.get_device_name(number)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        busy = free < 0.5 * total
        remedy = "another process holds half of it or more: nvidia-smi names it" if busy else ""
        yield Finding(f"gpu {number}", "warn" if busy else "ok", found, remedy)


def cores_and_memory() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    free = memory_available()
    found = f"{cores} cores, {free / GIB:.1f} GiB of memory available"
    if free < 3 * GIB:
        yield Finding("cpu", "warn", found, "the demo's two processes need about 3 GiB: end something else first")
    else:
        yield Finding("cpu", "ok", found)


def threads() -> Iterator[Finding]:
    cores, text = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    if text is None:
        yield Finding("OMP_NUM_THREADS", "ok", f"not set: a single process uses {cores} cores")
    elif not text.isdigit() or text == "0":
        yield Finding("OMP_NUM_THREADS", "fail", repr(text), "set it to a number from 1, or unset it")
    elif int(text) > cores:
        remedy = f"more threads than cores make each slower: at most {cores}, divided by the processes of the run"
        yield Finding("OMP_NUM_THREADS", "warn", f"{text}, with {cores} cores", remedy)
    else:
        yield Finding("OMP_NUM_THREADS", "ok", text)


def shared_memory() -> Iterator[Finding]:
    """Data loading processes hand batches over in /dev/shm; containers often have 64 MiB of it."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("/dev/shm", "warn", "not there", "set data.workers=0, or mount it")
        return
    free = shutil.disk_usage(folder).free
    little = free < 256 * MIB
    remedy = "run the container with --shm-size=1g, or set data.workers=0" if little else ""
    yield Finding("/dev/shm", "warn" if little else "ok", f"{free / GIB:.1f} GiB free", remedy)


def disk(folder: Path | None = None) -> Iterator[Finding]:
    """Whether a run can leave its checkpoints in a folder, or else under the working directory."""
    here = folder or Path.cwd()
    try:
        with tempfile.NamedTemporaryFile(dir=here):
            pass
    except OSError as error:
        remedy = "go to a folder of your own, or set run_dir to one"
        yield Finding("disk", "fail", f"cannot write in {here}: {error.strerror}", remedy)
        return
    free = shutil.disk_usage(here).free
    remedy = "checkpoints hold 12 bytes a parameter, and two are kept: make room, or set run_dir elsewhere"
    little = free < 2 * GIB
    yield Finding("disk", "warn" if little else "ok", f"{free / GIB:.0f} GiB free in {here}", remedy if little else "")


def stale_locks() -> Iterator[Finding]:
    """A build of a torch extension that was killed leaves a lock, and the next program that needs it waits forever."""
    default = Path.home() / ".cache" / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))
    locks = sorted(str(path) for path in root.glob("**/lock"))
    if locks:
        remedy = f"if nothing is being built now: rm {' '.join(locks)}"
        yield Finding("torch extensions", "warn", f"{len(locks)} lock(s) under {root}", remedy)
    else:
        yield Finding("torch extensions", "ok", "no lock left behind")


def loopback() -> Iterator[Finding]:
    wrong = talk(TALK_SECONDS)
    if wrong:
        remedy = "does a firewall or a proxy stand before 127.0.0.1? GLOO_SOCKET_IFNAME=lo names the interface"
        yield Finding("two processes", "fail", wrong, remedy)
    else:
        yield Finding("two processes", "ok", "all-reduce and uneven all-to-all over gloo on the loopback")


def memory_available(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that new processes can have without swapping."""
    for line in meminfo.read_text().splitlines():
        name, value = line.split(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
