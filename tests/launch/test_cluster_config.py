"""Cluster files are read strictly, and what is wrong is told in one line with what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stablemoe_ds.errors import UserError
from stablemoe_ds.launch.cluster import load_cluster, seconds_of
from stablemoe_ds.launch.cluster_reference import reference


def complaint(text: str, folder: Path) -> str:
    path = folder / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_cluster(path)
    message = str(error.value)
    assert message.startswith(str(path)) or "hostfile" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("launcher: slrum", "expected local, deepspeed, torchrun, mpi or slurm; nearest that works: slurm"),
        ("launcher: slurm\nslurm: {partion: gpu}", "slurm.partion: unknown key; did you mean slurm.partition?"),
        ("launcher: slurm\nnods: 2", "nods: unknown key; did you mean nodes?"),
        ("launcher: slurm\nnodes: 0", "nodes: got 0: expected more than 0"),
        ("nodes: 2", "launcher: missing: program that starts the ranks"),
        ("launcher: local\nnodes: 2", "nodes: got 2: launcher local is one machine; nearest that works: 1"),
        ("launcher: mpi\nnodes: 2", "needs their names: give hosts or hostfile"),
        ("launcher: mpi\nnodes: 3\nhosts: [a, b]", "nodes: got 3: there are 2 hosts; nearest that works: 2"),
        ("launcher: mpi\nhosts: [a, a]", "a name is there twice"),
        ("launcher: slurm\nhosts: [a]", "leave hosts and hostfile out"),
        ("launcher: mpi\nhosts: [a]\nmin_nodes: 1", "under torchrun or slurm only"),
        ("launcher: local\nsetup: [x]", "modules and setup are for slurm"),
        ("launcher: slurm\nenvironment: {HF_TOKEN: abc}", "looks like a secret, which would end up in files"),
        ("launcher: slurm\nenvironment: {A-B: abc}", "'A-B' is no name of a variable"),
        ("launcher: slurm\nforward: [A]\nenvironment: {A: x}", "A is both in environment and in forward"),
        ('launcher: slurm\npython: "a\\nb"', "the character U+000A is invisible"),
        ('launcher: slurm\nsetup: ["a\\nb"]', "expected one line of printable text"),
        ("launcher: slurm\nrun_dir: ~nobody-here/runs", "there is no user 'nobody-here'"),
        ("launcher: mpi\nhosts: [-oProxyCommand=x]", "is no name or address of a machine"),
        ("launcher: mpi\nhosts: [a b]", "is no name or address of a machine"),
        ("launcher: slurm\nslurm: {options: {nodes: 4}}", "--nodes follows from nodes; set that instead"),
        ("launcher: slurm\nslurm: {options: {--mem: 4}}", "write it without dashes"),
        ("launcher: slurm\nslurm: {time: soon}", "expected e.g. 24:00:00"),
        ("launcher: slurm\nslurm: {time: 5:00}", "be stopped as it starts; nearest that works: 75"),
        ("launcher: local\ncontainer: {kind: pyxis, image: x}", "nearest that works with launcher local: docker"),
        ("launcher: slurm\ncontainer: {kind: docker, image: x}", "working_directory: a container needs an absolute"),
        ("launcher: deepspeed\ncontainer: {kind: docker, image: x}", "the deepspeed launcher starts no containers"),
        ("launcher: slurm\ncontainer: {kind: docker, image: x, mounts: [data]}", "'data' is no mount"),
        ("", "expected sections such as 'launcher:' and 'nodes:' at the top, found nothing"),
    ],
)
def test_complaints(text: str, told: str, tmp_path: Path) -> None:
    assert told in complaint(text, tmp_path)


def test_hostfile_names_the_hosts(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\nnode1 slots=4\n\nnode2 slots=4 # the other\n")
    (tmp_path / "c.yaml").write_text(f"launcher: mpi\nnodes: 2\nprocesses_per_node: 4\nhostfile: {tmp_path}/hosts\n")
    assert load_cluster(tmp_path / "c.yaml").hosts == ["node1", "node2"]


@pytest.mark.parametrize(
    ("hosts", "told"),
    [
        ("node1 slots=8\nnode2 slots=4\n", "hosts:1: got 'node1 slots=8': expected 'NAME slots=4'"),
        ("node1\nnode1\n", "hosts:2: got 'node1'"),
        ("node1\n", "nodes: got 2"),
    ],
)
def test_hostfile_has_to_fit(hosts: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(hosts)
    text = f"launcher: mpi\nnodes: 2\nprocesses_per_node: 4\nhostfile: {tmp_path}/hosts\n"
    assert told in complaint(text, tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "nodes: got 2: "),
        (b"\xff\xfen\x001\x00", "UTF-16 text; expected a hostfile, one machine a line in UTF-8: save it as UTF-8"),
        (b"n1\n# caf\xe9\nn2\n", "hosts:2: byte 8 is not UTF-8 text (0xe9; Latin-1?)"),
        (b"n1\nn\x002\n", "hosts:2:2: the character U+0000 is not allowed"),
        (b"n1\nn2\x1b[2J\n", "hosts:2:3: the character U+001B is not allowed"),
        ("n1\nn\u202e2\n".encode(), "hosts:2: got 'n\\u202e2': expected 'NAME slots=4'"),
        (b"n1\n-oProxyCommand=x\n", "hosts:2: got '-oProxyCommand=x'"),
        (b"n1\n" * (1 << 21), "larger than 4194304 bytes"),
        (b"n1\n" + b"x" * 9000 + b" y\n", "hosts:2: got 'xxx"),
    ],
    ids=["empty", "utf-16", "latin-1", "nul", "escape", "right to left", "an option", "huge", "a long line"],
)
def test_hostfile_is_read_as_strictly_as_yaml(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(content)
    message = complaint(f"launcher: mpi\nnodes: 2\nprocesses_per_node: 4\nhostfile: {tmp_path}/hosts\n", tmp_path)
    assert told in message
    assert message.isprintable()
    assert len(message) < 500


def test_hostfile_with_a_mark_and_other_line_ends(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfn1 slots=4\r\nn2\r\n")
    (tmp_path / "c.yaml").write_text(f"launcher: mpi\nnodes: 2\nprocesses_per_node: 4\nhostfile: {tmp_path}/hosts\n")
    assert load_cluster(tmp_path / "c.yaml").hosts == ["n1", "n2"]


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "nothing"])
def test_hostfile_that_is_no_file(kind: str, tmp_path: Path) -> None:
    if kind == "a pipe":
        os.mkfifo(tmp_path / "hosts")
    if kind == "a folder":
        (tmp_path / "hosts").mkdir()
    message = complaint(f"launcher: mpi\nnodes: 2\nhostfile: {tmp_path}/hosts\n", tmp_path)
    assert message.startswith(f"hostfile {tmp_path}/hosts: cannot read it: ")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("5:30", 330), ("1:00:01", 3601), ("1-0", 86400), ("1-2:30", 95400), ("1-2:30:05", 95405)],
)
def test_slurms_ways_to_write_a_time(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def test_reference_is_current() -> None:
    document = Path(__file__).parents[2] / "docs" / "cluster.md"
    command = "python -m stablemoe_ds.launch.cluster_reference > docs/cluster.md"
    assert document.read_text(encoding="utf-8") == reference(), f"the schema has changed; run {command}"
