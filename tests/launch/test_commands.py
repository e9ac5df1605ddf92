"""``stablemoe launch`` from the command line: what it refuses, prints, submits, and that it needs no torch for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stablemoe_ds.cli import main
from stablemoe_ds.config.load import dump_run
from tests.launch.tools import frozen_early, stubbed

SLURM = "launcher: slurm\ndevice: cpu\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        Path(f"{name}.yaml").write_text(dump_run(frozen_early(name=name)))


def launch(*words: str, cluster: str = SLURM) -> int:
    Path("cluster.yaml").write_text(cluster)
    with pytest.raises(SystemExit) as ending:
        main(["launch", *words, "--cluster", "cluster.yaml"])
    assert isinstance(ending.value.code, int)
    return ending.value.code


@pytest.mark.parametrize(
    ("words", "cluster", "told"),
    [
        (["schedule.steps=5"], SLURM, "no RUN.yaml given, only settings"),
        (["one.yaml", "--submit"], "launcher: local\n", "--submit: launcher local has no queue"),
        (["one.yaml"], SLURM + "forward: [NOT_SET_ANYWHERE]\n", "NOT_SET_ANYWHERE is not set in this shell"),
        (["one.yaml", "parallel.expert=3"], SLURM, "parallel.expert: got 3"),
        (["one.yaml"], SLURM + "processes_per_node: 3\n", "schedule.tokens_per_step: got 64"),
        (["none.yaml"], SLURM, "none.yaml: cannot read it"),
    ],
)
def test_refusals_come_before_anything_is_written(
    words: list[str], cluster: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(*words, cluster=cluster) == 2
    assert told in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_dry_run_writes_nothing_and_lays_settings_over_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("one.yaml", "two.yaml", "schedule.steps=77", "--dry-run") == 0
    shell = capsys.readouterr().out
    assert shell.count("steps: 77") == 2
    assert "#SBATCH --array=0-1" in shell
    assert not Path("runs").exists()


def test_submitting_prints_the_id_and_notes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = stubbed(tmp_path / "seen")
    monkeypatch.setenv("PATH", environment["PATH"])
    monkeypatch.setenv("SEEN", environment["SEEN"])
    assert launch("one.yaml", "two.yaml", "--submit") == 0
    assert capsys.readouterr().out == "1\n"
    for name in ("one", "two"):
        (folder,) = Path(f"runs/{name}/launch").iterdir()
        assert json.loads((folder / "state.json").read_text()) == {"state": "submitted", "job_ids": ["1"]}
        assert json.loads((folder / "job.json").read_text())["world_size"] == 1


def test_a_queue_that_refuses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", stubbed(tmp_path / "seen")["PATH"])
    (tmp_path / "seen" / "bin" / "sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2\nexit 1\n")
    assert launch("one.yaml", "--submit") == 2
    assert "the queue did not accept the job" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["status", "runs/one"])
    assert "one  refused by the queue  slurm  " in capsys.readouterr().out


def test_runs_follow_each_other_where_there_is_no_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun is a stand-in that fails for the first run only."""
    monkeypatch.setenv("PATH", stubbed(tmp_path / "seen")["PATH"])
    mpirun = tmp_path / "seen" / "bin" / "mpirun"
    mpirun.write_text(
        '#!/bin/bash\n[ "$1" = --version ] && exit\necho "${@: -1}" >> order\ncase "$*" in *runs/one*) exit 3 ;; esac\n'
    )
    mpirun.chmod(0o755)
    assert launch("one.yaml", "two.yaml", cluster="launcher: mpi\ndevice: cpu\nrestarts: 0\n") == 3
    assert [Path(line).parts[1] for line in Path("order").read_text().splitlines()] == ["one", "two"]


def test_logs_of_a_rank(capsysbinary: Any) -> None:
    folder = Path("runs/one/launch/stamp")
    (folder / "logs").mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"logs": str(folder / "logs")}))
    (folder / "logs" / "rank-1.log").write_bytes(b"from rank 1\n")
    for rank, code in (("1", 0), ("0", 2)):
        with pytest.raises(SystemExit) as ending:
            main(["logs", "runs/one", "--rank", rank])
        assert ending.value.code == code
    assert capsysbinary.readouterr().out == b"from rank 1\n"


@pytest.mark.parametrize("module", ["make_jobs", "start", "supervise", "status", "examples", "local"])
def test_no_torch_is_needed(module: str) -> None:
    code = f"import stablemoe_ds.launch.{module}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) & {"torch", "deepspeed", "megatron", "mpi4py"} == set()
