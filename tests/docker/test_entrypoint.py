"""What a container becomes: the entrypoint, with stubs in place of the programs that it hands over to."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ENTRYPOINT = Path(__file__).parents[2] / "docker" / "entrypoint.sh"
SHOWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PET_NNODES", "PET_NODE_RANK")
SHOWN += ("PET_NPROC_PER_NODE", "PET_MASTER_ADDR", "PET_MASTER_PORT")
STUB = f"""#!/bin/bash
echo "$(basename "$0") $*"
for name in {" ".join(SHOWN)}; do [[ -z "${{!name+set}}" ]] || echo "$name=${{!name}}"; done
"""
TRAIN = ["train", "run.yaml", "name=a b"]
ALONE, MANY = "stablemoe train run.yaml name=a b", "torchrun --module stablemoe_ds train run.yaml name=a b"

Environment = dict[str, str]


class Container:
    """A folder of stubs as PATH, before the shell's own tools."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("stablemoe", "torchrun", "python"):
            self.add(name, STUB)

    def add(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def start(self, words: list[str], environment: Environment) -> subprocess.CompletedProcess[str]:
        path = {"PATH": f"{self.folder}:/usr/bin:/bin"}
        return subprocess.run(
            ["bash", str(ENTRYPOINT), *words], env={**path, **environment}, capture_output=True, text=True, check=False
        )

    def became(self, words: list[str], environment: Environment) -> tuple[str, Environment]:
        """The command it ended as, and the rank variables which that command saw."""
        done = self.start(words, environment)
        assert done.returncode == 0, done.stderr
        command, *seen = done.stdout.splitlines()
        return command, dict(line.split("=", 1) for line in seen)


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["--version"], "stablemoe --version"),
        (["launch", "run.yaml", "--dry-run"], "stablemoe launch run.yaml --dry-run"),
        (["eval", "runs/demo"], "stablemoe eval runs/demo"),
        (["tarin", "run.yaml"], "stablemoe tarin run.yaml"),
        (["python", "-m", "stablemoe_ds", "train"], "python -m stablemoe_ds train"),
    ],
)
def test_a_program_is_run_and_all_else_is_a_command(container: Container, words: list[str], command: str) -> None:
    assert container.became(words, {}) == (command, {})


def test_without_a_launcher_one_process_trains(container: Container) -> None:
    assert container.became(TRAIN, {}) == (ALONE, {})


@pytest.mark.parametrize("name", ["SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "LOCAL_RANK"])
def test_a_rank_of_an_outer_launcher_is_that_rank(container: Container, name: str) -> None:
    outer = {name: "0", "RANK": "3", "WORLD_SIZE": "8", "NPROC_PER_NODE": "8"}
    command, seen = container.became(TRAIN, outer)
    assert command == ALONE
    assert (seen["RANK"], seen["WORLD_SIZE"]) == ("3", "8")


def test_several_ranks_in_one_container_are_torchruns(container: Container) -> None:
    command, seen = container.became(TRAIN, {"NPROC_PER_NODE": "8"})
    assert command == MANY
    assert seen["PET_NPROC_PER_NODE"] == "8"
    assert (seen["PET_NNODES"], seen["PET_NODE_RANK"], seen["PET_MASTER_ADDR"]) == ("1", "0", "127.0.0.1")


def test_several_containers_of_several_ranks_meet_at_the_first(container: Container) -> None:
    plain = {"NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "4", "MASTER_ADDR": "head", "MASTER_PORT": "23456"}
    command, seen = container.became(TRAIN, plain)
    assert command == MANY
    assert {name.removeprefix("PET_"): value for name, value in seen.items() if name.startswith("PET_")} == plain


def test_pods_of_one_rank_each_need_no_launcher(container: Container) -> None:
    """What PyTorchJob sets: WORLD_SIZE pods, RANK of this one."""
    pod = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "2", "RANK": "1"}
    assert container.became(TRAIN, pod) == (ALONE, {**pod, "LOCAL_RANK": "0"})


def test_torchruns_own_variables_count_first(container: Container) -> None:
    """Where PyTorchJob sets both, WORLD_SIZE counts ranks and PET_NNODES pods."""
    pod = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "16", "RANK": "1"}
    own = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8"}
    command, seen = container.became(TRAIN, {**pod, **own})
    assert command == MANY
    expected = {**own, "PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456"}
    assert {name: value for name, value in seen.items() if name.startswith("PET_")} == expected


def test_elastic_rendezvous_is_torchruns_even_with_one_rank_each(container: Container) -> None:
    elastic = {"PET_RDZV_ENDPOINT": "job-worker-0:23456", "PET_RDZV_BACKEND": "c10d", "PET_NNODES": "1:4"}
    command, seen = container.became(TRAIN, elastic)
    assert command == MANY
    assert seen["PET_NNODES"] == "1:4"


@pytest.mark.parametrize(("listed", "command"), [("", ALONE), ("GPU 0: H\n", ALONE), ("GPU 0: H\nGPU 1: H\n", MANY)])
def test_auto_is_one_rank_a_gpu_and_one_without(container: Container, listed: str, command: str) -> None:
    container.add("nvidia-smi", f"#!/bin/bash\nprintf '{listed}'\n")
    assert container.became(TRAIN, {"PET_NPROC_PER_NODE": "auto"})[0] == command


def test_several_containers_without_a_rendezvous_are_refused(container: Container) -> None:
    done = container.start(TRAIN, {"NNODES": "2"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "no MASTER_ADDR" in done.stderr


def test_the_shell_is_replaced(container: Container) -> None:
    """A shell in between would keep signals from the ranks."""
    container.add("stablemoe", '#!/bin/bash\necho "$$"\n')
    with subprocess.Popen(
        ["bash", str(ENTRYPOINT), *TRAIN],
        env={"PATH": f"{container.folder}:/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.communicate()[0].strip() == str(process.pid)
