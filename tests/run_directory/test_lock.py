"""One writer at a time: whoever comes second is refused, and whoever comes after a crash is not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.lock import LAUNCH, LOCK, InUseError, Writer, only_writer, writer_of

HOLDS = """
import os, sys
from stablemoe_ds.run_directory import lock
lock.PATIENCE = 0.0
try:
    with lock.only_writer(sys.argv[1]):
        if "fork" in sys.argv and os.fork() == 0:
            sys.stdin.read()
            os._exit(0)
        print("holds", os.getpid(), flush=True)
        if sys.stdin.readline() == "raise\\n":
            raise KeyError
except lock.InUseError as error:
    print("refused", error, flush=True)
"""
"""Takes the lock, says so, and keeps it until something is written to it. fork: a child lives on."""


@contextmanager
def process(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLDS, str(folder), *words]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as started:
        yield started


def said(started: subprocess.Popen[str]) -> str:
    assert started.stdout is not None
    return started.stdout.readline()


def tell(started: subprocess.Popen[str], word: str) -> None:
    assert started.stdin is not None
    started.stdin.write(f"{word}\n")
    started.stdin.flush()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stablemoe_ds.run_directory.lock.PATIENCE", 0.0)
    monkeypatch.setattr("stablemoe_ds.run_directory.lock.PATIENCE_WITH_OWN", 0.0)
    for name in (LAUNCH, "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def leave(folder: Path, writer: Writer) -> None:
    """What a writer leaves that was not able to clear up."""
    (folder / LOCK).write_text(json.dumps(asdict(writer)))


@pytest.mark.parametrize("ending", ["goes on", "raise", "kill"])
def test_a_second_writer_is_refused_until_the_first_has_ended(ending: str, tmp_path: Path) -> None:
    with process(tmp_path) as first:
        assert said(first) == f"holds {first.pid}\n"
        writer = writer_of(tmp_path)
        assert writer is not None
        assert (writer.host, writer.pid) == (socket.gethostname(), first.pid)
        with pytest.raises(InUseError) as refused, only_writer(tmp_path):
            pass
        assert f"process {first.pid} on {socket.gethostname()} since {writer.since} writes there" in str(refused.value)
        assert "\n" not in str(refused.value)
        if ending == "kill":
            first.send_signal(signal.SIGKILL)
        else:
            tell(first, ending)
        first.wait()
        assert writer_of(tmp_path) is None
        assert (tmp_path / LOCK).exists() == (ending == "kill")
        with only_writer(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert not (tmp_path / LOCK).exists()


def test_a_killed_writer_is_followed_before_its_children_have_ended(tmp_path: Path) -> None:
    with process(tmp_path, "fork") as first:
        said(first)
        first.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # what is left of it, unreaped, is no writer
        with only_writer(tmp_path):
            pass
        first.communicate()  # its child reads to the end


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    with process(tmp_path) as a, process(tmp_path) as b, process(tmp_path) as c, process(tmp_path) as d:
        answers = [said(one).split()[0] for one in (a, b, c, d)]
        assert sorted(answers) == ["holds", "refused", "refused", "refused"]
        for one in (a, b, c, d):
            one.communicate("end\n")


def test_a_number_that_was_given_again_is_not_the_writer(tmp_path: Path) -> None:
    me = Writer.this_process()
    leave(tmp_path, me)
    with pytest.raises(InUseError), only_writer(tmp_path):
        pass
    leave(tmp_path, replace(me, began=me.began - 1))
    assert writer_of(tmp_path) is None
    with only_writer(tmp_path):
        pass


ELSEWHERE = replace(Writer.this_process(), host="elsewhere", boot="another", pid=1)
LEFT = {
    "on this host, since restarted": (replace(Writer.this_process(), boot="another"), {}, True),
    "in another container of this machine": (replace(Writer.this_process(), host="c0ffee"), {}, True),
    "on another host": (ELSEWHERE, {}, False),
    "on another host, of another launch": (replace(ELSEWHERE, launch="one"), {LAUNCH: "two"}, False),
    "on another host, of this launch": (replace(ELSEWHERE, launch="one"), {LAUNCH: "one"}, True),
    "on another host, of another SLURM job": (
        replace(ELSEWHERE, slurm="7"),
        {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"},
        False,
    ),
    "on another node of this SLURM job": (replace(ELSEWHERE, slurm="7"), {"SLURM_JOB_ID": "7"}, False),
    "on another node, before SLURM requeued this job": (
        replace(ELSEWHERE, slurm="7"),
        {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
        True,
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_another_machine_has_left(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, variables, gone = LEFT[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    leave(tmp_path, writer)
    assert (writer_of(tmp_path) is None) == gone
    if not gone:
        expected = rf"process 1 on elsewhere .* if it is certainly gone, remove {re.escape(str(tmp_path / LOCK))}"
        with pytest.raises(InUseError, match=expected), only_writer(tmp_path):
            pass
        (tmp_path / LOCK).unlink()
    with only_writer(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 1}', "\0\0"])
def test_a_file_cut_off_in_writing_stops_nobody(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(text)
    with only_writer(tmp_path):
        pass


def test_where_the_file_system_has_no_locks_the_text_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with process(tmp_path) as first:
        said(first)
        with pytest.raises(InUseError, match=f"process {first.pid} on"), only_writer(tmp_path):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
        with only_writer(tmp_path):
            pass


def test_what_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with only_writer(tmp_path / "runs" / "one"):
        pass
    assert not (tmp_path / "runs" / "one").exists()
    with only_writer(tmp_path / "two"):
        (tmp_path / "two" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["metrics.jsonl"]
    with only_writer(tmp_path):
        pass
    assert tmp_path.exists()


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to run directory .*file/run: Not a directory"):  # noqa: SIM117
        with only_writer(tmp_path / "file" / "run"):
            pass
