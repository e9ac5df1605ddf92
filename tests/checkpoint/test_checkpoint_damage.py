"""A damaged checkpoint is noticed before it is used, and the run goes on from the newest sound one, or refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from tests.checkpoint.savers import (
    Cut,
    Damage,
    Flip,
    Remove,
    Search,
    make_read_only,
    mounted,
    refused_here,
    search_here,
)
from tests.distributed.launch import run_distributed
from tests.training.ranks import started
from tests.training.runs import (
    STEPS,
    TinyData,
    checkpoint_of,
    command,
    differing,
    history,
    restarted,
    run_file,
    small_run,
    tensors_of,
    train_run,
)

WEIGHTS, MOMENTS, TABLE = (f"{name}.safetensors" for name in ("weights-0000", "moments-0000", "routing_table"))
CASES: dict[str, tuple[str, Damage]] = {
    "weights, first byte": (WEIGHTS, Flip(WEIGHTS, 0.0)),
    "weights, middle": (WEIGHTS, Flip(WEIGHTS, 0.5)),
    "weights, last byte": (WEIGHTS, Flip(WEIGHTS, 1.0)),
    "moments": (MOMENTS, Flip(MOMENTS, 0.7)),
    "moments cut": (f"{MOMENTS} has", Cut(MOMENTS)),
    "weights vanished": (f"{WEIGHTS} is missing", Remove(WEIGHTS)),
    "table": (TABLE, Flip(TABLE, 0.9)),
    "manifest": ("checkpoint.json", Flip("checkpoint.json", 0.3)),
    "manifest vanished": ("checkpoint.json", Remove("checkpoint.json")),
}
NEWEST, BEFORE = f"step-{STEPS:06d}", "step-000009"


@pytest.fixture(scope="module")
def searches(finished: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Search]]]:
    """What two ranks find, by rank and case."""
    damages = {case: (NEWEST, damage) for case, (_, damage) in CASES.items()}
    run = finished.model_copy(update={"parallel": finished.parallel.model_copy(update={"expert": 2})})
    return run_distributed(2, search_here, run, damages, tmp_path_factory.mktemp("damaged"), timeout=120)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_damage_is_named_and_the_newest_sound_one_taken_or_offered(
    case: str, searches: list[dict[str, list[Search]]]
) -> None:
    going_on, refusal = searches[0][case]
    assert searches[1][case] == [going_on, refusal], "all ranks find and say the same"
    named, _ = CASES[case]
    assert going_on.name == BEFORE
    assert f"continuing from {BEFORE}" in going_on.said
    assert refusal.name is None
    assert f"{BEFORE}: to continue from it" in refusal.said
    for said in (going_on.said, refusal.said):
        assert NEWEST in said
        assert named in said
        assert "\n" not in said


def test_a_run_goes_on_from_the_newest_sound_checkpoint(finished: RunConfig, tmp_path: Path) -> None:
    run = restarted(finished, tmp_path / "run", STEPS)
    (Path(run.directory) / "report.json").unlink()
    Flip(WEIGHTS, 0.5)(checkpoint_of(run, STEPS))
    said = train_run(run)
    assert "WARNING" in said
    assert "continuing after update 9" in said
    assert differing(tensors_of(checkpoint_of(run, STEPS)), tensors_of(checkpoint_of(finished, STEPS))) == []
    assert [line["step"] for line in history(run, "fault")] == [9]


def test_a_checkpoint_of_another_model_is_refused(finished: RunConfig, tmp_path: Path) -> None:
    run = restarted(finished, tmp_path / "run", 9)
    answer = command("train", run_file(run, tmp_path / "run.yaml"), "moe.experts=8")
    assert answer.code == 2
    assert "step-000009 belongs to another model" in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_evaluation_refuses_weights_that_have_changed(finished: RunConfig, tmp_path: Path) -> None:
    from stablemoe_ds.checkpoint.reader import Checkpoint

    run = restarted(finished, tmp_path / "run", STEPS)
    Flip(MOMENTS, 0.5)(checkpoint_of(run, STEPS))
    Checkpoint.open(run.directory).check_content(moments=False)
    Flip(WEIGHTS, 0.5)(checkpoint_of(run, STEPS))
    with pytest.raises(UserError, match=f"weights-0000.*changed.*newest intact one next to it is .*{BEFORE}"):
        Checkpoint.open(run.directory).check_content(moments=False)


def test_a_full_disk_costs_one_checkpoint_and_not_the_run(data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run", checkpoint={"every": 3, "keep": 9})
    first = small_run(data, tmp_path / "first", checkpoint={"every": 3, "keep": 9}, schedule={"steps": 12})
    train_run(first)
    size = sum(file.stat().st_size for file in checkpoint_of(first, 6).iterdir()) / 2**20
    folder = Path(run.directory) / "checkpoints"
    with mounted(folder, 2.6 * size), started(tmp_path, [["train", run_file(run, tmp_path / "run.yaml")]], {}) as rank:
        rank.wait()
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000003", "step-000006"]
        assert (folder / "latest").read_text() == "step-000006"
        assert differing(tensors_of(folder / "step-000006"), tensors_of(checkpoint_of(first, 6))) == []
    assert "step 9 could not be saved: No space left on device" in rank.said(0)
    assert [line["step"] for line in history(run, "train")][-1] == STEPS, "training went on"
    assert rank.codes == [1], "the last one was asked for"
    assert "No space left on device" in rank.error(0)


@pytest.mark.distributed
def test_a_read_only_folder_is_told_to_all_ranks(finished: RunConfig, tmp_path: Path) -> None:
    run = small_run_of(finished, tmp_path / "run")
    folder = Path(run.directory) / "checkpoints"
    with mounted(folder, 1):
        make_read_only(folder)
        told = run_distributed(2, refused_here, run, None)
    assert told[0] == told[1]
    assert "Read-only file system" in told[0]


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_what_goes_wrong_on_one_rank_is_told_to_all(rank: int, finished: RunConfig, tmp_path: Path) -> None:
    run = small_run_of(finished, tmp_path / "run")
    told = run_distributed(2, refused_here, run, rank)
    assert told[0] == told[1]
    assert "No space left on device" in told[0]
    assert ("rank 1" in told[0]) == (rank == 1)
    assert list((Path(run.directory) / "checkpoints").iterdir()) == []


def small_run_of(finished: RunConfig, folder: Path) -> RunConfig:
    parallel = finished.parallel.model_copy(update={"expert": 2})
    return finished.model_copy(update={"run_dir": str(folder), "parallel": parallel})
