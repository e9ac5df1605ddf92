"""A checkpoint that is not what it should be is refused in one line; which are kept; nothing in it is executed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stablemoe_ds
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.checkpoint_files import publish, read_manifest, saved_checkpoints, write_manifest
from tests.training.ranks import started
from tests.training.runs import (
    STEPS,
    TinyData,
    checkpoint_of,
    command,
    restarted,
    run_file,
    small_run,
    tiny_data,
    train_run,
)


@pytest.fixture
def checkpoint(finished: RunConfig, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint_of(finished, STEPS), tmp_path / "checkpoint"))


def _edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A manifest as another version of this program might have written it."""

    def damage(folder: Path) -> None:
        manifest = read_manifest(folder)
        change(manifest)
        write_manifest(folder, manifest)

    return damage


def _cut(folder: Path) -> None:
    file = folder / "weights-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _flip(folder: Path) -> None:
    file = folder / "checkpoint.json"
    file.write_bytes(file.read_bytes().replace(b'"step": 12', b'"step": 13'))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "file missing": (lambda folder: (folder / "moments-0000.safetensors").unlink(), "moments-0000.* is missing"),
    "file cut": (_cut, r"weights-0000.safetensors has \d+ bytes, expected \d+"),
    "manifest of another format": (_edit(lambda m: m.update(format="other-3")), "format 'other-3', this version reads"),
    "manifest of another program": (lambda folder: (folder / "checkpoint.json").write_text("[1, 2]"), "cannot read"),
    "manifest cut": (lambda folder: (folder / "checkpoint.json").write_text('{"format": '), "cannot read"),
    "manifest changed": (_flip, "checkpoint.json does not have the digest it names"),
    "manifest without a key": (_edit(lambda m: m.pop("tokenizer")), "tokenizer"),
    "settings unknown here": (_edit(lambda m: m["run"].update(flavour="sour")), "flavour: unknown key"),
    "progress unknown here": (_edit(lambda m: m["progress"].update(epoch=3)), "epoch"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_in_one_line(name: str, checkpoint: Path) -> None:
    from stablemoe_ds.checkpoint.reader import Checkpoint

    damage, expected = DAMAGE[name]
    assert Checkpoint.open(checkpoint).progress.step == STEPS
    damage(checkpoint)
    with pytest.raises(UserError, match=expected) as told:
        Checkpoint.open(checkpoint)
    assert str(checkpoint) in str(told.value)
    assert "\n" not in str(told.value)


def test_latest_names_a_missing_directory(finished: RunConfig, tmp_path: Path) -> None:
    from stablemoe_ds.checkpoint.reader import Checkpoint

    copy = restarted(finished, tmp_path / "run", 77)
    with pytest.raises(UserError, match=r"step-000077.*the newest intact one next to it is .*step-000012") as told:
        Checkpoint.open(copy.directory)
    assert "\n" not in str(told.value)


def test_nothing_to_open(tmp_path: Path) -> None:
    from stablemoe_ds.checkpoint.reader import Checkpoint

    with pytest.raises(UserError, match=r"no checkpoint at .*: expected checkpoint\.json"):
        Checkpoint.open(tmp_path)


def _poison(run: RunConfig, step: int, part: str) -> None:
    """Put one NaN into the first weight whose name has this part; the file's size stays what it was."""
    file = checkpoint_of(run, step) / "weights-0000.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if part in name)].view(-1)[-1] = torch.nan
    save_file(tensors, file)


def test_nan_in_weights_stops_a_resume(finished: RunConfig, tmp_path: Path) -> None:
    run = restarted(finished, tmp_path / "run", 9)
    _poison(run, 9, "embedding.word_embeddings")
    answer = command("train", run_file(run, tmp_path / "run.yaml"), "checkpoint.verify=size")
    assert answer.code == 2
    assert re.search(r"step-000009: embedding\S+ \(weight\) holds NaN or infinity; use an older", answer.err)
    assert len(answer.err.strip().splitlines()) == 1


@pytest.mark.distributed
def test_what_one_rank_refuses_no_rank_tries_again(finished: RunConfig, tmp_path: Path) -> None:
    parallel = finished.parallel.model_copy(update={"expert": 2, "timeout_minutes": 0.2})
    run = restarted(finished, tmp_path / "run", 9).model_copy(update={"parallel": parallel})
    _poison(run, 9, ".experts.3.")  # read by the rank that has expert 3, alone
    argv = ["train", run_file(run, tmp_path / "run.yaml"), "checkpoint.verify=size"]
    with started(tmp_path, [argv, argv], {}) as ranks:
        ranks.wait()
        assert re.search(r"\.experts\.3\.\S+ \(weight\) holds NaN", ranks.error(1))
        assert re.search(r"lost contact .*; the cause is: rank 1 .*: bad input: .*holds NaN", ranks.error(0))
        assert ranks.codes == [2, 2]


def test_another_tokenizer_stops_a_resume(finished: RunConfig, tmp_path: Path) -> None:
    other = tiny_data(tmp_path / "other", vocab_size=470)
    run = restarted(finished, tmp_path / "run", 9)
    new = {"tokenizer": other.tokenizer, "train": other.train, "valid": other.valid}
    changed = RunConfig.model_validate({**run.model_dump(), "data": {**run.data.model_dump(), **new, "test": []}})
    answer = command("train", run_file(changed, tmp_path / "run.yaml"))
    assert answer.code == 2
    assert "was trained with tokenizer" in answer.err
    assert len(answer.err.strip().splitlines()) == 1


@pytest.mark.parametrize("keep", [1, 3])
def test_keep_prunes_all_but_the_newest(keep: int, data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run", checkpoint={"every": 2, "keep": keep})
    train_run(run)
    folder = Path(run.directory) / "checkpoints"
    expected = [f"step-{step:06d}" for step in (8, 10, 12)][-keep:]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", *expected]
    assert (folder / "latest").read_text() == f"step-{STEPS:06d}"


def test_a_later_checkpoint_left_over_does_not_push_the_newest_out(data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run", checkpoint={"every": 6, "keep": 1})
    left_over = Path(run.directory) / "checkpoints" / "step-000900"
    left_over.mkdir(parents=True)
    train_run(run)
    assert checkpoint_of(run, STEPS).is_dir()
    assert (left_over.parent / "latest").read_text() == f"step-{STEPS:06d}"


def test_an_incomplete_checkpoint_does_not_count(finished: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(checkpoint_of(finished, STEPS).parent, folder)
    (folder / "step-000009" / "weights-0000.safetensors").unlink()
    part = folder / ".step-000015.part"
    shutil.copytree(folder / f"step-{STEPS:06d}", part)
    publish(part, folder / "step-000015", keep=3)
    assert [path.name for path in saved_checkpoints(tmp_path)] == ["step-000015", f"step-{STEPS:06d}", "step-000006"]
    assert not list(folder.glob(".step-*"))


def test_nothing_is_unpickled() -> None:
    package = Path(stablemoe_ds.__file__).parent
    forbidden = re.compile(r"\btorch\.load\b|\bpickle\b|allow_pickle\s*=\s*True|\bmarshal\b|\bexec\(|[^.\w]eval\(")
    files = list(package.rglob("*.py"))
    assert len(files) > 40
    found = [f"{file.name}: {hit[0]}" for file in files for hit in forbidden.finditer(file.read_text())]
    assert found == []
