"""Paths in YAML files and overrides: ``~`` is a home directory, and what nobody would mean to write is refused."""

from __future__ import annotations

import getpass
import os
import pwd
from pathlib import Path

import pytest

from stablemoe_ds.comparison.suite import load_suite
from stablemoe_ds.config.load import load_run
from stablemoe_ds.config.paths import expanded
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from stablemoe_ds.launch.cluster import load_cluster
from tests.config.conftest import SMALL

ODD = {
    "": "it is empty",
    " ": "it is empty",
    " runs/a": "a space at the start or end; nearest that works: runs/a",
    "runs/a\t": "nearest that works: runs/a",
    "runs/a\nb": "the character U+000A",
    "runs/a\x1b[2J": "the character U+001B",
    "runs/\u202egpj": "the character U+202E",
    "runs/a\u2028b": "the character U+2028",
    "~nobody-of-this-name/runs": "there is no user 'nobody-of-this-name'; write it out, or ./~nobody-of-this-name",
    "$HOME/runs": "$HOME... is replaced only by a shell",
    "runs/${USER}": "$... is replaced only by a shell",
    "s3://bucket/runs": "a URL is not a path",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("HOME", str(folder))
    return folder


def quoted(text: str) -> str:
    """As a YAML file holds it, every letter by its number."""
    return '"' + "".join(f"\\U{ord(letter):08x}" for letter in text) + '"'


def test_home_directories(home: Path) -> None:
    assert expanded("~") == str(home)
    assert expanded("~/runs/a b") == f"{home}/runs/a b"
    user = getpass.getuser()
    assert expanded(f"~{user}/runs") == os.path.join(pwd.getpwnam(user).pw_dir, "runs")


@pytest.mark.parametrize("path", ["runs/a", "./~/a", "a/~b", "a$", "/a:b/c", "../é 文", "a~", "C:/x"])
def test_everything_else_stays_as_it_is(path: str) -> None:
    assert expanded(path) == path


@pytest.mark.parametrize("key", ["run_dir", "data.tokenizer", "data.train", "data.valid"])
def test_a_run_and_its_overrides(key: str, home: Path, tmp_path: Path) -> None:
    section, _, name = key.rpartition(".")
    line = f"{name}: ~/x\n" if not section else f"data: {{sequence_length: 16, {name}: ~/x}}\n"
    text = SMALL.replace("data: {sequence_length: 16}\n", "") if section else SMALL
    (tmp_path / "run.yaml").write_text(text + line)
    for run in (load_run(tmp_path / "run.yaml"), load_run(tmp_path / "run.yaml", [f"{key}=~/x"])):
        found = {"run_dir": run.run_dir, "data.tokenizer": run.data.tokenizer}
        found |= {f"data.{part}": source.path for part in ("train", "valid") for source in getattr(run.data, part)}
        assert found[key] == f"{home}/x"


@pytest.mark.parametrize("path", ODD, ids=ascii)
@pytest.mark.parametrize("key", ["run_dir", "data.tokenizer", "data.test"])
def test_what_nobody_would_mean_is_refused(key: str, path: str, small: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_run(small, [f"{key}={quoted(path)}"])
    message = str(caught.value)
    assert ODD[path] in message
    assert f": {key}" in message
    assert message.isprintable()


@pytest.mark.parametrize("name", ["~", "~/a", "", "a ", "a\nb", "$USER"])
def test_a_name_that_a_directory_is_called_by(name: str, small: Path) -> None:
    with pytest.raises(UserError, match="name: got"):
        load_run(small, [f"name={quoted(name)}"])


def test_paths_that_deepspeed_is_given(home: Path, small: Path) -> None:
    run = load_run(small, ["deepspeed={tensorboard: {output_path: ~/tb, job_name: a~}, list: [~/x]}"])
    assert run.deepspeed == {"tensorboard": {"output_path": f"{home}/tb", "job_name": "a~"}, "list": [f"{home}/x"]}


def test_a_cluster(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    (home / "hosts").write_text("n1\nn2\n")
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "{launcher: mpi, nodes: 2, hostfile: ~/hosts, working_directory: ~/w, python: ~/bin/python, run_dir: ~/runs, "
        "log_dir: ~/logs, container: {kind: apptainer, image: ~/a.sif, mounts: [~/data:/data]}}"
    )
    cluster = load_cluster(path)
    assert cluster.hosts == ["n1", "n2"]
    assert cluster.container is not None
    found = (cluster.working_directory, cluster.python, cluster.run_dir, cluster.log_dir, cluster.container.image)
    assert found == tuple(f"{home}/{name}" for name in ("w", "bin/python", "runs", "logs", "a.sif"))
    assert cluster.container.mounts == [f"{home}/data:/data"]
    path.write_text(path.read_text().replace("kind:", "workdir: ~/w, kind:"))
    with pytest.raises(UserError, match="home is another directory in the container"):
        load_cluster(path)


def test_a_suite(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    (home / "run.yaml").write_text(SMALL)
    path = tmp_path / "suite.yaml"
    path.write_text(
        "{name: s, run: ~/run.yaml, output: ~/out, seeds: [1], reference: a, overrides: [data.valid=~/v], "
        "variants: {a: [data.train=~/t]}}"
    )
    (run,) = load_suite(path).runs
    assert run.run.directory == f"{home}/out/a/seed-1"
    assert run.run.data.valid[0].path == f"{home}/v"
    assert run.run.data.train[0].path == f"{home}/t"


def test_what_an_earlier_version_recorded_is_taken_as_it_is(small: Path) -> None:
    recorded = load_run(small).model_dump() | {"run_dir": "~/runs/a ", "name": "a\nb"}
    assert RunConfig.model_validate(recorded).run_dir == "~/runs/a "
