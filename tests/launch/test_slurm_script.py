"""The batch script, really run by bash; srun, scontrol and the question whether to start again are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.launch.tools import (
    cluster,
    one_job,
    run_script,
    seen_variables,
    seen_words,
    state_of,
    stubbed,
)
from tests.waiting import PATIENCE, wait_until

FOLDER = "runs/tiny/launch/stamp"
printable = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), max_size=30).filter(str.isprintable)
path_part = st.text(st.sampled_from("ab $`;&|<>()*?#~!{}[]=-é"), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@settings(max_examples=25, deadline=None)
@given(value=printable, option=printable.filter(bool), part=path_part)
def test_no_value_is_read_by_the_shell(value: str, option: str, part: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_dir = f"{folder}/{part}x"
        where = cluster(environment={"VALUE": value}, launcher_args=[f"--x={option}"], run_dir=run_dir)
        done = run_script(one_job(where), folder / "seen")
        assert done.returncode == 0, done.stderr
        argv = seen_words(folder / "seen" / "srun.argv")
        assert f"--x={option}" in argv
        assert argv[-4:] == ["-m", "stablemoe_ds", "train", f"{run_dir}/tiny/launch/stamp/run.yaml"]
        assert seen_variables(folder / "seen" / "srun.env")["VALUE"] == value
        assert seen_words(folder / "seen" / "asked")[2] == f"{run_dir}/tiny"


def test_ranks_learn_where_to_meet(tmp_path: Path) -> None:
    run_script(one_job(cluster()), tmp_path, RANK="3", WORLD_SIZE="9", LOCAL_RANK="1")
    variables = seen_variables(tmp_path / "srun.env")
    assert variables["MASTER_ADDR"] == "localhost"
    assert variables["MASTER_PORT"] == str(10000 + 77)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(variables)


def test_a_head_node_without_an_address_is_named(tmp_path: Path) -> None:
    environment = stubbed(tmp_path)
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/bash\necho nowhere.invalid\n")
    job = one_job(cluster())
    job.write()
    done = subprocess.run(
        ["bash", f"{FOLDER}/job.sh"], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 1
    assert "the first node, nowhere.invalid, has no address" in done.stderr
    assert not (tmp_path / "srun.argv").exists()


@pytest.mark.parametrize(("verdict", "requeued"), [("0", True), ("1", False)])
def test_is_requeued_if_it_should_be_started_again(verdict: str, requeued: bool, tmp_path: Path) -> None:
    done = run_script(one_job(cluster(restarts=5)), tmp_path, VERDICT=verdict, SRUN_DOES="exit 3")
    assert done.returncode == 3
    words = ["-m", "stablemoe_ds.launch.restart", "runs/tiny", "--exit-code", "3", "--limit", "5"]
    assert seen_words(tmp_path / "asked") == words
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 77\n"


def test_without_restarts_nothing_is_asked(tmp_path: Path) -> None:
    done = run_script(one_job(cluster(restarts=0)), tmp_path, SRUN_DOES="exit 3")
    assert done.returncode == 3
    assert not (tmp_path / "asked").exists()


def test_a_forwarded_variable_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = run_script(one_job(cluster(forward=["HF_TOKEN"])), tmp_path)
    assert done.returncode != 0
    assert "HF_TOKEN: has to be set where the job is submitted" in done.stderr


def test_a_failing_setup_line_ends_the_job(tmp_path: Path) -> None:
    done = run_script(one_job(cluster(setup=["false"])), tmp_path)
    assert done.returncode == 1
    assert not (tmp_path / "srun.argv").exists()


def test_request_to_save_reaches_the_ranks_and_their_status_is_kept(tmp_path: Path) -> None:
    """``wait`` ends early upon a signal; the script must not take that for the ranks' end."""
    does = 'trap "sleep 0.5; exit 7" USR1; touch "$SEEN/up"; while :; do sleep 0.05; done'
    job = one_job(cluster())
    job.write()
    script = subprocess.Popen(["bash", f"{FOLDER}/job.sh"], env=stubbed(tmp_path, SRUN_DOES=does))
    try:
        # The script waits, so it knows for whom.
        wait_until("both wait", lambda: (tmp_path / "up").exists() and state_of(script.pid) == "S")
        for _ in range(2):  # SLURM may send it twice
            os.kill(script.pid, signal.SIGUSR1)
            time.sleep(0.05)
        assert script.wait(PATIENCE) == 7
    finally:
        script.kill()
    assert seen_words(tmp_path / "asked")[-4:] == ["--exit-code", "7", "--limit", "3"]


def test_task_of_an_array_trains_its_own_run(tmp_path: Path) -> None:
    job = one_job(cluster(), "one", "two")
    run_script(job, tmp_path, SLURM_ARRAY_TASK_ID="1")
    assert seen_words(tmp_path / "srun.argv")[-1] == "runs/two/launch/stamp/run.yaml"
    assert seen_words(tmp_path / "asked")[2] == "runs/two"
    assert Path("runs/two/launch/stamp/run.yaml").exists()


def test_jobs_of_a_chain_wait_for_each_other(tmp_path: Path) -> None:
    for dependency, said in (("singleton", ["--dependency=singleton"] * 3), ("afterany", ["", 1, 2])):
        job = one_job(cluster(slurm={"chain": 3, "dependency": dependency}, run_dir=dependency))
        job.write()
        seen = tmp_path / dependency
        done = subprocess.run(
            job.command, env=stubbed(seen), capture_output=True, text=True, check=True, timeout=PATIENCE
        )
        assert done.stdout.split() == ["1", "2", "3"]
        flags = [f"--dependency=afterany:{after}" if isinstance(after, int) else after for after in said]
        lines = [" ".join(["--parsable", flag, job.command[1].replace("submit", "job")]) for flag in flags]
        assert (seen / "sbatch").read_text().splitlines() == [" ".join(line.split()) for line in lines]


def test_a_chain_ends_where_a_run_is_over(tmp_path: Path) -> None:
    job = one_job(cluster(slurm={"chain": 2}))
    run_script(job, tmp_path, VERDICT="1")
    assert Path(FOLDER, "over").exists()
    (tmp_path / "srun.argv").unlink()
    again = subprocess.run(["bash", f"{FOLDER}/job.sh"], env=stubbed(tmp_path), check=False, timeout=PATIENCE)
    assert again.returncode == 0
    assert not (tmp_path / "srun.argv").exists()


@pytest.mark.parametrize("kind", ["apptainer", "docker", "pyxis"])
def test_ranks_and_the_question_go_into_the_container(kind: str, tmp_path: Path) -> None:
    container = {"kind": kind, "image": "an image", "mounts": ["/a b:/c"], "workdir": "/work dir"}
    where = cluster(container=container, working_directory=str(tmp_path), forward=["HF_TOKEN"])
    job = one_job(where)
    prefix = {"apptainer": "apptainer", "docker": "docker", "pyxis": "srun"}[kind]
    environment = stubbed(tmp_path / "seen", HF_TOKEN="x")
    (tmp_path / "seen" / "bin" / prefix).write_text('#!/bin/bash\nprintf "%s\\0" "$0" "$@" >> "$SEEN/all"\nexit 1\n')
    (tmp_path / "seen" / "bin" / prefix).chmod(0o755)
    (tmp_path / "seen" / "bin" / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$0" "$@" >> "$SEEN/all"\nexit 1\n')
    job.write()
    subprocess.run(["bash", f"{FOLDER}/job.sh"], cwd=tmp_path, env=environment, check=False, timeout=PATIENCE)
    words = seen_words(tmp_path / "seen" / "all")
    mounts = {
        "apptainer": [f"{tmp_path}:/work dir", "/a b:/c"],
        "docker": [f"{tmp_path}:/work dir", "/a b:/c"],
        "pyxis": [f"--container-mounts={tmp_path}:/work dir,/a b:/c"],
    }[kind]
    assert [words.count(mount) for mount in mounts] == [2] * len(mounts), "once for the ranks, once for the question"
    assert sum("an image" in word for word in words) == 2
    assert "stablemoe_ds.launch.restart" in words
    if kind == "docker":
        assert {"HF_TOKEN", "SLURM_PROCID", "MASTER_ADDR"} <= set(words)
