"""``config check`` and the files a run names: what ``train`` runs passes, what it would refuse does not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stablemoe_ds.cli import main
from stablemoe_ds.config.load import load_run
from stablemoe_ds.data.named_files import look_at_files
from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer
from stablemoe_ds.run_directory.checkpoint_files import write_manifest

RUN = """
run_dir: {folder}/run
model: {{layers: 2, hidden_size: 32, heads: 2, ffn_hidden_size: 64}}
moe: {{layers: [1], experts: 4}}
data: {{tokenizer: {folder}/tok.model, train: {folder}/train, valid: {folder}/valid, sequence_length: 32}}
optimizer: {{lr: 1e-3}}
schedule: {{steps: 40, tokens_per_step: 256}}
stages: {{at_step: 15}}
"""
ENDINGS = ("bin", "idx", "json", "counts.npy")


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer, corpus: Callable[..., str]) -> Path:
    """A run and all its files; the vocabulary is the tokenizer's."""
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path))
    shutil.copy(tokenizer.path, tmp_path / "tok.model")
    for name in ("train", "valid"):
        for ending in ENDINGS:
            shutil.copy(f"{corpus('named')}.{ending}", tmp_path / f"{name}.{ending}")
    return tmp_path


def config_check(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["config", "check", str(folder / "run.yaml"), *words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_vocabulary_is_read_from_the_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = config_check(folder, capsys, "--json")
    known = config_check(folder, capsys, "model.vocab_size=350", "--json")[1]
    assert code == 0
    assert json.loads(out) == json.loads(known)
    assert json.loads(out)["parameters"]["components"]["embedding"] == 350 * 32
    assert {file["state"] for file in json.loads(out)["files"]} == {"sound"}


def test_without_the_tokenizer_rules_are_checked_and_costs_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tok.model").unlink()
    code, out, _ = config_check(folder, capsys)
    assert code == 0
    assert f"costs are left out: model.vocab_size is null and the tokenizer {folder}/tok.model cannot be" in out
    assert "parameters" not in out
    assert "stage 2 from update 16" in out
    assert f"{folder}/tok.model  missing" in out
    code, _, err = config_check(folder, capsys, "model.heads=3")
    assert code == 2
    assert err.startswith("stablemoe: error: model.heads: got 3: expected a divisor of model.hidden_size 32")


def test_files_that_are_not_here_are_said_and_no_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in ENDINGS:
        (folder / f"valid.{ending}").unlink()
    code, out, _ = config_check(folder, capsys, "data.test=[nowhere/a, nowhere/b]", "--json")
    assert code == 0
    states = {file["key"]: file["state"] for file in json.loads(out)["files"]}
    missing = dict.fromkeys(("data.valid.0", "data.test.0", "data.test.1"), "missing")
    assert states == {"data.tokenizer": "sound", "data.train.0": "sound", **missing}
    assert "data.train  " in config_check(folder, capsys, "data.train=[]")[1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def fold(path: Path) -> None:
    path.unlink()
    path.mkdir()


def counted_wrong(path: Path) -> None:
    np.save(path, np.load(path) + 1)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "an empty tokenizer": ("tok.model", lambda path: path.write_bytes(b""), "data.tokenizer: tokenizer "),
    "a tokenizer that is none": ("tok.model", lambda path: path.write_text("text"), "no sentencepiece model"),
    "a tokenizer that is a pipe": ("tok.model", pipe, "data.tokenizer: cannot read tokenizer"),
    "a tokenizer that is a folder": ("tok.model", fold, "data.tokenizer: cannot read tokenizer"),
    "another tokenizer": ("tok.model", lambda path: other(path), "data.train.0: corpus "),
    "a description in UTF-16": ("train.json", lambda p: p.write_text(p.read_text(), "utf-16"), "UTF-16 text"),
    "a description in Latin-1": ("train.json", lambda p: p.write_bytes(b'{"a": "\xe9"}'), "is not UTF-8 text"),
    "a description with a NUL": ("train.json", lambda p: p.write_bytes(b'{"a": "\0"}'), "U+0000"),
    "a description of another form": ("train.json", lambda p: p.write_text("[1]"), "holds no JSON object"),
    "a deep description": ("train.json", lambda p: p.write_text("[" * 99_999), "invalid JSON"),
    "a description without end": ("train.json", lambda p: os.truncate(p, 1 << 30), "larger than"),
    "a description that is a pipe": ("valid.json", pipe, "data.valid.0: "),
    "no description": ("valid.json", Path.unlink, "data.valid.0: no prepared corpus"),
    "no ids": ("valid.bin", Path.unlink, "data.valid.0: corpus is incomplete"),
    "ids cut short": ("train.bin", cut, "data.train.0: "),
    "an index cut short": ("train.idx", cut, "data.train.0: "),
    "an index that is a folder": ("train.idx", fold, "data.train.0: "),
    "counts of another corpus": ("train.counts.npy", counted_wrong, "data.train.0: "),
}


def other(path: Path) -> None:
    text = path.with_name("other.txt")
    text.write_text("".join(f"{n} other words {n * n}\n" for n in range(500)))
    train_tokenizer([text], path, 300)


@pytest.mark.parametrize("name", DAMAGE)
def test_what_train_would_refuse_is_an_error(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, damage, said = DAMAGE[name]
    damage(folder / file)
    code, _, err = config_check(folder, capsys)
    assert code == 2
    assert said in err
    assert all(line.isprintable() for line in err.splitlines())


def test_settings_that_do_not_fit_the_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["model.vocab_size=100"], "model.vocab_size: got 100: the tokenizer has 350 ids"),
        (["data.tokenizer=null", "model.vocab_size=100"], "got 100: "),
        (["data.sequence_length=999999", "schedule.tokens_per_step=999999"], "fewer than a sequence of 999999"),
        ([f"run_dir={folder}/tok.model/run"], f"run_dir: {folder}/tok.model is a file: name another run_dir"),
        (["parallel.tensor=4", "model.heads=4"], "model.vocab_size: got 350: expected a multiple of parallel.tensor 4"),
    ):
        code, _, err = config_check(folder, capsys, *words)
        assert code == 2
        assert said in err


def test_a_checkpoint_to_go_on_from(folder: Path) -> None:
    def found(*overrides: str) -> tuple[str, str]:
        (last,) = (one for one in look_at_files(load_run(folder / "run.yaml", overrides))[0] if one.key == "run_dir")
        return last.state, last.found

    step = folder / "run" / "checkpoints" / "step-000010"
    step.mkdir(parents=True)
    write_manifest(step, {"format": "stablemoe-checkpoint-1", "files": {}})
    assert found() == ("sound", "continues from step-000010")
    (step.parent / "latest").write_bytes(b"\xff\0")
    assert found() == ("sound", "continues from step-000010")
    (step.parent / "latest").write_text("../../../elsewhere")
    assert found() == ("sound", "continues from step-000010")
    (step.parent / "latest").write_text(step.name)
    (step / "checkpoint.json").write_text("{}")
    assert found("checkpoint.fallback=false")[0] == "unusable"
    assert "an older one is tried" in found()[1]
