"""benchmarks/gpu.sh where there is no GPU: what it says, and what shellcheck says of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"


def called(*arguments: str | Path) -> tuple[int, list[str]]:
    """Its exit status, and the lines it said."""
    blind = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([SCRIPT, *arguments], env=blind, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.mark.parametrize("script", ["gpu.sh", "wheels.sh"])
def test_shellcheck_finds_nothing(script: str) -> None:
    tool = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if tool is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run([tool, SCRIPT.parent / script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    code, (line,) = called("correct", tmp_path, tmp_path / "out")
    assert code == 2
    assert "torch sees no GPU" in line
    assert "--cpu" in line


def test_wheels_that_cannot_be_installed(tmp_path: Path) -> None:
    (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    code, lines = called("--cpu", "fast", tmp_path, tmp_path / "out")
    assert code == 2
    assert "cannot be installed" in lines[-1]


@pytest.mark.parametrize("arguments", [(), ("one",), ("correct", "missing", "out"), ("both", ".", "out")], ids=str)
def test_a_wrong_call_shows_the_right_one(arguments: tuple[str, ...]) -> None:
    code, (line,) = called(*arguments)
    assert code == 2
    assert "usage: benchmarks/gpu.sh [--cpu] correct|fast|train WHEELS OUTPUT [DATA]" in line
