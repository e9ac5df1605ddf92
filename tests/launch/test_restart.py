"""Which endings of a job are followed by another attempt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stablemoe_ds.checkpoints import FORMAT, write_manifest
from stablemoe_ds.launch.restart import decide, newest_saved
from tests.tiny import tiny_run

STEPS = 40


def save(run_dir: Path, step: int) -> Path:
    """What a checkpoint leaves on disk, its tensors apart."""
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "weights-0000.safetensors").write_bytes(b"12345678")
    run = tiny_run(schedule={"steps": STEPS, "tokens_per_step": 64}, stages={"at_step": 4})
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
    (tmp_path / "report.json").write_text("{}")
    assert not decide(tmp_path, 137, limit=3).again


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
