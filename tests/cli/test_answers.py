"""Standard output has the answer and nothing else, whatever libraries print and however they do it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stablemoe_ds.answers import answer, descriptor, reserve_stdout
from stablemoe_ds.config.schema import RunConfig
from tests.training.runs import TinyData, run_file

NOISY = """
import os, subprocess, sys

class Noise:
    def find_spec(self, name, path=None, target=None):
        if name in os.environ["NOISY"].split():
            print("from Python", name)
            os.write(1, b"from descriptor 1\\n")
            subprocess.run(["echo", "from a process"])
            sys.stdout.write("unfinished")

sys.meta_path.insert(0, Noise())
"""
"""Makes libraries print as they are imported, in every process that is started."""


@pytest.fixture
def noisy(tmp_path: Path) -> dict[str, str]:
    """An environment in which torch, numpy, pydantic, sentencepiece, DeepSpeed and its operators are noisy."""
    (tmp_path / "noisy").mkdir()
    (tmp_path / "noisy" / "sitecustomize.py").write_text(NOISY)
    path = os.pathsep.join([str(tmp_path / "noisy"), os.environ.get("PYTHONPATH", "")])
    names = "pydantic numpy torch sentencepiece deepspeed deepspeed.ops megatron.core"
    return {**os.environ, "PYTHONPATH": path, "NOISY": names, "PYTHONDONTWRITEBYTECODE": "1"}


def said(environment: dict[str, str], *argv: str | Path) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "stablemoe_ds", *argv], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for way in ("from Python", "from descriptor 1", "from a process"):
        assert way in done.stderr
    return done.stdout, done.stderr


def test_json_of_a_command_without_torch(noisy: dict[str, str], finished: RunConfig, tmp_path: Path) -> None:
    out, _ = said(noisy, "config", "check", run_file(finished, tmp_path / "run.yaml"), "--json")
    assert json.loads(out)["parameters"]


def test_text_of_a_command_that_trains_a_tokenizer(noisy: dict[str, str], data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    out, _ = said(
        noisy, "data", "tokenizer", tmp_path / "text.txt", "--output", tmp_path / "t.model", "--vocab-size", "290"
    )
    assert out.startswith("wrote ")
    assert out.count("\n") == 1


@pytest.mark.parametrize("words", [("eval",), ("generate", "--prompt", "def ", "--tokens", "4")], ids=lambda w: w[0])
def test_json_of_a_command_with_every_library(
    noisy: dict[str, str], finished: RunConfig, words: tuple[str, ...]
) -> None:
    name, *options = words
    out, _ = said(noisy, name, finished.directory, *options, "--json")
    json.loads(out)


def test_whatever_is_started_or_prints_inside_does_not_reach_it(capfd: pytest.CaptureFixture[str]) -> None:
    with reserve_stdout():
        print("a library")
        subprocess.run(["echo", "a compiler"], check=True)
        answer("the answer")
        subprocess.run(["echo", "its process"], stdout=descriptor(), check=True)
    print("after")
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["after", "its process", "the answer"]
    assert "a library" in err
    assert "a compiler" in err


def test_a_reader_that_has_seen_enough_is_no_error(finished: RunConfig, tmp_path: Path) -> None:
    command = f"{sys.executable} -m stablemoe_ds config show {run_file(finished, tmp_path / 'run.yaml')} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
