"""A checkpoint can be used without the data, the tokenizer and the directory that its training had."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stablemoe_ds.checkpoint.attached import (
    check_corpora,
    find_corpora,
    open_tokenizer,
    to_attach,
    token_counts_of,
)
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.schema import RunConfig, Source
from stablemoe_ds.data.corpus import token_counts
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.checkpoint_files import read_manifest, write_manifest
from tests.distributed.launch import run_distributed
from tests.training.runs import STEPS, SWITCH, Answer, TinyData, checkpoint_of, command_here, run_file, tiny_data

GONE = {"tokenizer": "gone/tok.model", "train": [{"path": "gone/train"}], "valid": [{"path": "gone/valid"}], "test": []}


def command_in(folder: Path, *argv: str) -> Answer:
    """What a process does: ``stablemoe`` with these arguments, given in another directory."""
    os.chdir(folder)
    return command_here(*argv)


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = read_manifest(checkpoint)
    change(manifest)
    write_manifest(checkpoint, manifest)


def forget(checkpoint: Path) -> None:
    """Make a checkpoint as earlier versions wrote it: nothing attached, no word of where training was started."""

    def change(manifest: dict[str, Any]) -> None:
        del manifest["started_in"]
        for name in ("tokenizer.model", "token_counts.npy"):
            del manifest["files"][name], manifest["sha256"][name]
            (checkpoint / name).unlink()

    edit(checkpoint, change)


def lose(checkpoint: Path) -> None:
    """Make a checkpoint's run name data that is nowhere."""
    edit(checkpoint, lambda manifest: (manifest["run"]["data"].update(GONE), manifest.update(started_in="/gone")))


@pytest.fixture
def alone(finished: RunConfig, tmp_path: Path) -> Path:
    """A copy of the last checkpoint, of stage 2, whose run names data that is nowhere."""
    copy = Path(shutil.copytree(checkpoint_of(finished, STEPS), tmp_path / "alone"))
    lose(copy)
    return copy


@pytest.mark.parametrize("copied", ["checkpoints", f"checkpoints/step-{STEPS:06d}", "."])
def test_a_copy_works_without_what_the_run_names(
    copied: str, finished: RunConfig, data: TinyData, tmp_path: Path
) -> None:
    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(Path(finished.directory, copied), copy)
    for manifest in copy.rglob("checkpoint.json"):
        lose(manifest.parent)

    def ask(*argv: str, where: Path | str = copy) -> Any:
        argv = (*argv[:1], str(where), *argv[1:]) if argv[0] in ("eval", "generate") else (*argv[:2], str(where))
        answer = run_distributed(1, command_in, elsewhere, *argv, "--json")[0]
        assert answer.code == 0, answer.err
        return answer.json

    words = ("generate", "--prompt", "def ", "--tokens", "6")
    assert ask(*words) == ask(*words, where=finished.directory)
    measured, wanted = (ask("eval", "--data", data.valid, where=where) for where in (copy, finished.directory))
    assert measured["loss"] == wanted["loss"]
    report, whole = (ask("routing", "report", where=where) for where in (copy, finished.directory))
    assert report["layers"] == whole["layers"]
    assert report["switch"]["step"] == whole["switch"]["step"] == SWITCH
    assert (report["history"] == whole["history"]) == (copied == "."), "history lies in the run directory"
    assert ask("checkpoint", "show")["step"] == ask("checkpoint", "verify")["step"] == STEPS


def test_a_report_needs_no_history_to_be_read(alone: Path, tmp_path: Path) -> None:
    picture = tmp_path / "report.png"
    answer = command_here("routing", "report", str(alone), "--png", str(picture))
    assert answer.code == 0, answer.err
    assert "12 updates · stage 2 since update 6" in answer.out
    assert "MoE layer at block 1: 4 experts" in answer.out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_no_run_directory_is_not_taken_for_one(finished: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(finished.directory, tmp_path / "other")
    copy = shutil.copytree(checkpoint_of(finished, STEPS), tmp_path / "other" / "best" / "step-000012")
    assert Checkpoint.open(copy).run_directory is None
    assert Checkpoint.open(checkpoint_of(finished, STEPS)).run_directory == Path(finished.directory)


def test_what_is_attached_is_what_training_had(finished: RunConfig, data: TinyData) -> None:
    checkpoint = Checkpoint.open(finished.directory)
    files = to_attach(Tokenizer(data.tokenizer), None)
    assert (checkpoint.path / "tokenizer.model").read_bytes() == files["tokenizer.model"]
    assert {"tokenizer.model", "token_counts.npy"} <= checkpoint.manifest["sha256"].keys()
    expected = token_counts(finished.data.train, Tokenizer(data.tokenizer), checkpoint.vocab_size)
    np.testing.assert_array_equal(token_counts_of(checkpoint), expected)


def test_a_tokenizer_keeps_its_suffix(data: TinyData, tmp_path: Path) -> None:
    tokenizer = Tokenizer(shutil.copy(data.tokenizer, tmp_path / "some.name.json"))
    assert list(to_attach(tokenizer, None)) == ["tokenizer.json"]


def test_a_tokenizer_of_two_files_is_carried_whole(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers.models import WordLevel

    HuggingFace(WordLevel({"a": 0, "end": 1, "b": 2}, unk_token="a")).save(str(tmp_path / "mine.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "end"}')
    (tmp_path / "copy").mkdir()
    files = to_attach(Tokenizer(tmp_path / "mine.json"), None)
    for name, content in files.items():
        (tmp_path / "copy" / name).write_bytes(content)
    assert sorted(files) == ["tokenizer.json", "tokenizer_config.json"]
    assert Tokenizer(tmp_path / "copy" / "tokenizer.json").eos_id == 1


@pytest.mark.parametrize("name", ["tokenizer.model", "token_counts.npy"])
def test_damage_to_what_is_attached_is_noticed(name: str, alone: Path) -> None:
    file = alone / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    answer = command_here("routing", "report", str(alone))
    assert answer.code == 2
    assert str(alone) in answer.err
    assert len(answer.err.splitlines()) == 1


def test_an_old_checkpoint_takes_what_its_run_named(finished: RunConfig, data: TinyData, tmp_path: Path) -> None:
    old = Path(shutil.copytree(checkpoint_of(finished, STEPS), tmp_path / "old"))
    forget(old)
    checkpoint = Checkpoint.open(old)
    assert open_tokenizer(checkpoint).path == Path(data.tokenizer)
    expected = token_counts(finished.data.train, Tokenizer(data.tokenizer), checkpoint.vocab_size)
    np.testing.assert_array_equal(token_counts_of(checkpoint), expected)


def test_an_old_checkpoint_can_be_given_its_tokenizer(finished: RunConfig, data: TinyData, tmp_path: Path) -> None:
    old = Path(shutil.copytree(checkpoint_of(finished, STEPS), tmp_path / "old"))
    forget(old)
    edit(old, lambda manifest: manifest["run"]["data"].update(GONE))
    answer = command_here("routing", "report", str(old))
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert re.search(r"contains no tokenizer.*looked for \S+gone/tok\.model; name it with --tokenizer", answer.err)
    answer = command_here("routing", "report", str(old), "--tokenizer", data.tokenizer)
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert re.search(r"contains no counts of its training text, .*no prepared corpus gone/train", answer.err)
    words = ("generate", str(old), "--prompt", "def ", "--tokens", "3")
    assert run_distributed(1, command_in, tmp_path, *words)[0].code == 2
    assert run_distributed(1, command_in, tmp_path, *words, "--tokenizer", data.tokenizer)[0].code == 0


def test_another_tokenizer_or_corpus_is_refused(alone: Path, tmp_path: Path) -> None:
    other, checkpoint = tiny_data(tmp_path / "other", vocab_size=470), Checkpoint.open(alone)
    with pytest.raises(UserError, match="was trained with tokenizer"):
        open_tokenizer(checkpoint, other.tokenizer)
    with pytest.raises(UserError, match="was made by tokenizer"):
        check_corpora(checkpoint, [Source(path=other.valid)])


@pytest.mark.parametrize("place", ["where training was started", "where the run was moved to", "here"])
def test_paths_are_found_from_anywhere(
    place: str, finished: RunConfig, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    copy = home / "runs" / "base" / "checkpoints" / "step-000012"
    shutil.copytree(checkpoint_of(finished, STEPS), copy)
    held = {"where training was started": tmp_path / "first", "where the run was moved to": home, "here": tmp_path}
    shutil.copytree(Path(data.valid).parent, held[place] / "texts")
    named = {"valid": [{"path": "texts/valid"}], "tokenizer": "texts/tokenizer.model"}
    forget(copy)

    def change(manifest: dict[str, Any]) -> None:
        manifest["run"].update(run_dir="runs/base")
        manifest["run"]["data"].update(named)
        manifest.update(started_in=str(tmp_path / "first"))

    edit(copy, change)
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint.open("home/runs/base")
    assert [source.path for source in find_corpora(checkpoint, checkpoint.run.data.valid)] == [
        str(held[place] / "texts" / "valid")
    ]
    assert open_tokenizer(checkpoint).path == held[place] / "texts" / "tokenizer.model"
    shutil.rmtree(held[place] / "texts")
    with pytest.raises(UserError, match="no prepared corpus texts/valid") as told:
        find_corpora(checkpoint, checkpoint.run.data.valid)
    assert all(str(folder / "texts" / "valid") in str(told.value) for folder in held.values())


def test_a_conversion_carries_the_tokenizer_over(finished: RunConfig, alone: Path, tmp_path: Path) -> None:
    run = finished.model_copy(update={"run_dir": str(tmp_path / "more")})
    words = ("checkpoint", "convert", str(alone), "--to", run_file(run, tmp_path / "more.yaml"), "moe.experts=8")
    answer = run_distributed(1, command_in, tmp_path, *words)[0]
    assert answer.code == 0, answer.err
    made = Checkpoint.open(run.directory)
    made.check_content()
    assert open_tokenizer(made).path == made.path / "tokenizer.model"
    assert "token_counts.npy" not in made.files, "the new run names another training text"
