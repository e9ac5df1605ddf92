"""Which endings of a job are followed by another attempt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stablemoe_ds.config.load import dump_run
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed import faults
from stablemoe_ds.errors import UserError
from stablemoe_ds.launch.restart import decide, main
from stablemoe_ds.run_directory.checkpoint_files import FORMAT, write_manifest
from stablemoe_ds.run_directory.progress import REFUSED, newest_saved, refusals
from tests.tiny import tiny_run

STEPS = 40


def forty_updates(**sections: Any) -> RunConfig:
    return tiny_run(**{"schedule": {"steps": STEPS, "tokens_per_step": 64}, "stages": {"at_step": 4}, **sections})


def save(run_dir: Path, step: int, **sections: Any) -> Path:
    """What a checkpoint leaves on disk, its tensors apart."""
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "weights-0000.safetensors").write_bytes(b"12345678")
    run = forty_updates(**sections)
    manifest = {
        "format": FORMAT,
        "files": {"weights-0000.safetensors": 8},
        "progress": {"step": step},
        "run": run.model_dump(mode="json"),
    }
    write_manifest(folder, manifest)
    (run_dir / "checkpoints" / "latest").write_text(folder.name)
    return folder


@pytest.mark.parametrize("code", [1, 3, -9, 137, 143])
def test_a_fault_is_followed_by_another_attempt(code: int, tmp_path: Path) -> None:
    save(tmp_path, 10)
    assert decide(tmp_path, code, limit=3).again


@pytest.mark.parametrize("code", [2, 130])
def test_bad_input_and_ctrl_c_are_not(code: int, tmp_path: Path) -> None:
    save(tmp_path, 10)
    assert not decide(tmp_path, code, limit=3).again


def test_a_run_that_was_asked_to_stop_goes_on_and_a_finished_one_does_not(tmp_path: Path) -> None:
    save(tmp_path, 10)
    assert decide(tmp_path, 0, limit=3).again
    save(tmp_path, STEPS)
    decision = decide(tmp_path, 0, limit=3)
    assert not decision.again
    assert decision.reason == "the run is finished: all 40 updates are made"


def test_a_run_that_died_while_it_wrote_its_report_is_not_finished(tmp_path: Path) -> None:
    save(tmp_path, STEPS)
    assert decide(tmp_path, 137, limit=3).again
    for steps, again in ((STEPS // 2, True), (STEPS, False)):  # the first report is one of an earlier, shorter run
        (tmp_path / "report.json").write_text(json.dumps({"steps": steps}))
        assert decide(tmp_path, 137, limit=9).again == again


def test_the_run_that_was_launched_decides_not_the_one_that_was_saved(tmp_path: Path) -> None:
    save(tmp_path, STEPS, parallel={"expert": 4})
    (tmp_path / "report.json").write_text(json.dumps({"steps": STEPS}))
    longer = forty_updates(schedule={"steps": 2 * STEPS, "tokens_per_step": 64}, parallel={"expert": 2})
    decision = decide(tmp_path, 137, limit=3, world_size=2, run=longer)
    assert decision.again
    assert f"{STEPS} of {2 * STEPS} updates are saved" in decision.reason


def test_the_command_finds_the_run_that_was_launched(tmp_path: Path) -> None:
    save(tmp_path, STEPS)
    launch = tmp_path / "launch" / "stamp"
    launch.mkdir(parents=True)
    (launch / "job.json").write_text("{}")
    longer = forty_updates(schedule={"steps": 2 * STEPS, "tokens_per_step": 64})
    (launch / "run.yaml").write_text(dump_run(longer))
    assert main([str(tmp_path), "--exit-code", "0"]) == 0
    (launch / "run.yaml").write_text("of: another version")
    assert main([str(tmp_path), "--exit-code", "0"]) == 1


def test_a_host_that_notes_its_own_attempts_counts_only_those(tmp_path: Path) -> None:
    decisions = [decide(tmp_path, 1, limit=2, host=host) for host in ("a", "b", "a", "b")]
    assert [decision.again for decision in decisions] == [True, True, False, False]
    assert "5 attempts in a row" in decide(tmp_path, 1, limit=2).reason, "a job that moves from host to host"


def test_a_checkpoint_that_is_deleted_meanwhile_is_passed_over(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    folder.with_name("step-000005").symlink_to("gone")  # in the list of names, and no more than that
    saved = newest_saved(tmp_path)
    assert saved is not None
    assert saved.step == 10


def test_bad_input_is_known_by_the_word_that_ranks_leave(tmp_path: Path) -> None:
    place = faults.Place(update=3)
    world = faults.World(1, 2, 1, torch.device("cpu"))
    with pytest.raises(UserError), faults.naming_faults(world, str(tmp_path), place):
        raise UserError("data.train: no such corpus")
    assert [name for name, _ in refusals(tmp_path)] == ["fault-0001.txt"]
    assert f": {REFUSED}: " in (tmp_path / "launch" / "fault-0001.txt").read_text()


def test_a_crash_loop_ends(tmp_path: Path) -> None:
    decisions = [decide(tmp_path, 137, limit=3) for _ in range(3)]
    assert [decision.again for decision in decisions] == [True, True, False]
    assert "3 attempts in a row have added none (limit 3)" in decisions[-1].reason


def test_progress_resets_the_count(tmp_path: Path) -> None:
    save(tmp_path, 10)
    assert [decide(tmp_path, 137, limit=2).again for _ in range(2)] == [True, True]
    save(tmp_path, 20)
    assert [decide(tmp_path, 137, limit=2).again for _ in range(3)] == [True, True, False]


def test_falling_back_to_an_older_checkpoint_is_no_progress(tmp_path: Path) -> None:
    save(tmp_path, 10)
    newer = save(tmp_path, 20)
    decide(tmp_path, 137, limit=1)
    (newer / "weights-0000.safetensors").unlink()
    saved = newest_saved(tmp_path)
    assert saved is not None
    assert saved.step == 10
    assert not decide(tmp_path, 137, limit=1).again


def test_a_checkpoint_that_waits_for_its_successor_counts(tmp_path: Path) -> None:
    """As a run leaves it that is killed while it writes a step again."""
    folder = save(tmp_path, 10)
    folder.rename(folder.with_name(f".{folder.name}.old"))
    saved = newest_saved(tmp_path)
    assert saved is not None
    assert saved.step == 10


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (3, "ended with exit code 3;"),
        (143, "killed by SIGTERM;"),
        (-9, "killed by SIGKILL (often for want of memory);"),
        (135, "killed by SIGBUS (a mapped file was cut short"),
        (255, "ended with exit code 255;"),
    ],
)
def test_an_ending_is_put_in_words(code: int, said: str, tmp_path: Path) -> None:
    assert decide(tmp_path, code, limit=3).reason.startswith(said)


def test_another_world_size_must_fit_the_run(tmp_path: Path) -> None:
    save(tmp_path, 10)
    assert decide(tmp_path, 3, limit=3, world_size=2).again
    refused = decide(tmp_path, 3, limit=3, world_size=3)
    assert not refused.again
    assert refused.reason.startswith("3 processes do not fit the run: schedule.tokens_per_step")


def test_half_a_line_in_the_attempts_is_passed_over(tmp_path: Path) -> None:
    decide(tmp_path, 137, limit=9)
    file = tmp_path / "launch" / "attempts.jsonl"
    file.write_text(file.read_text() + '{"step": 0, "exi\n')
    assert "2 of 9" in decide(tmp_path, 137, limit=9).reason


def test_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stablemoe_ds.launch.restart", str(tmp_path), "--limit", "1", "--exit-code"]
    save(tmp_path, 10)
    for code, status, beginning in ((-9, 0, "start again: killed"), (-9, 1, "do not start again: killed")):
        answer = subprocess.run([*command, str(code)], capture_output=True, text=True, check=False)
        assert (answer.returncode, answer.stderr) == (status, "")
        assert answer.stdout.startswith(beginning)
        assert answer.stdout.count("\n") == 1


def test_loads_no_torch() -> None:
    code = "import stablemoe_ds.launch.restart, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
