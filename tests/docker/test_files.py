"""The files of docker/: what linters say, and whether what they name and pin is what the project names and pins."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.prefix) / "bin")) or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def pins(file: str) -> dict[str, Version]:
    lines = (line for line in (DOCKER / file).read_text().splitlines() if "==" in line)
    pairs = (line.split("==") for line in lines)
    return {re.sub("[-_.]+", "-", name).lower(): Version(version) for name, version in pairs}


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([tool("hadolint"), str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("build", ["cpu", "cuda13"])
def test_every_dependency_is_pinned_to_a_version_that_will_do(build: str) -> None:
    pinned = pins("constraints.txt") | pins(f"torch-{build}.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["mpi"]]]
    assert [
        str(need) for need in wanted if not need.specifier.contains(pinned[re.sub("[-_.]+", "-", need.name).lower()])
    ] == []


def test_both_images_have_the_torch_of_the_makefile() -> None:
    (version,) = re.findall(r"^TORCH .*torch==(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {pins(f"torch-{build}.txt")["torch"].public for build in ("cpu", "cuda13")} == {version}


def test_what_is_copied_is_in_the_build_context() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copies for source in line.split()}
    assert {source.split("/")[0] for source in sources} == allowed
    assert [source for source in sources if "$" not in source and not (ROOT / source).exists()] == []


def test_rehearsal_is_two_nodes_of_one_run() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    nodes = [service for name, service in services.items() if name.startswith("node")]
    assert [node["environment"]["NODE_RANK"] for node in nodes] == [0, 1]
    assert len({tuple(node["command"]) for node in nodes}) == 1
    assert {node["environment"]["NNODES"] for node in nodes} == {len(nodes)}
    assert {node["environment"]["MASTER_ADDR"] for node in nodes} <= set(services)
