"""Bad input of every kind: one clear line on stderr, exit status 2, never a traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stablemoe_ds.cli import main
from stablemoe_ds.config.schema import RunConfig
from tests.distributed.launch import run_distributed
from tests.training.runs import (
    Answer,
    TinyData,
    checkpoint_of,
    command,
    command_here,
    run_file,
    small_run,
    tiny_data,
)


def complaint(answer: Answer, expected: str, rank: str = "") -> None:
    assert answer.code == 2
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1, answer.err
    assert re.match(rf"stablemoe{re.escape(rank)}: error: .*{expected}", lines[0]), lines[0]


@pytest.fixture
def run_yaml(data: TinyData, tmp_path: Path) -> str:
    run = small_run(data, tmp_path / "run", data={"tokenizer": data.tokenizer})
    return run_file(run, tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["moe.expert=4"], r"moe\.expert: unknown key; did you mean moe\.experts\?"),
        (["optimzer.lr=1"], r"optimzer: unknown key; did you mean optimizer\?"),
        (
            ["parallel.zero_stage=0", "precision.dtype=bf16"],
            r"zero_stage: got 0: .* nearest that works: 1",
        ),
        (["moe.layers=[7]"], r"moe\.layers: got \[7\]: expected block numbers from 1 to model\.layers 2"),
        (["stages.at_step=99"], r"stages\.at_step: got 99: stage 1 must end inside the run"),
        (["schedule.steps=many"], r"schedule\.steps: got \"many\": expected an integer"),
        (["steps"], r"expected key\.sub=value"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_settings(verb: str, overrides: list[str], expected: str, run_yaml: str) -> None:
    words = ["train"] if verb == "train" else ["config", "check"]
    complaint(command_here(*words, run_yaml, *overrides), expected)


@pytest.mark.parametrize("words", [["train"], ["config", "check"], ["config", "show"]], ids=" ".join)
def test_missing_configuration(words: list[str], tmp_path: Path) -> None:
    complaint(command_here(*words, str(tmp_path / "none.yaml")), r"none\.yaml: cannot read .* No such file")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train=/nowhere/text", r"no prepared corpus at /nowhere/text: .*stablemoe data prepare"),
        ("data.valid=/nowhere/text", r"no prepared corpus at /nowhere/text"),
        ("data.tokenizer=/nowhere/t.model", r"cannot read tokenizer /nowhere/t\.model: No such file"),
        ("model.vocab_size=100", r"model\.vocab_size: got 100: the tokenizer has \d+ ids"),
        ("precision.dtype=fp16", r"fp16 needs a GPU, this machine has none; nearest that works: bf16 or fp32"),
        ("parallel.micro_batch=3", r"schedule\.tokens_per_step: got 128: expected a multiple of"),
    ],
)
def test_training(override: str, expected: str, run_yaml: str, tmp_path: Path) -> None:
    complaint(command("train", run_yaml, override), expected)
    assert not (tmp_path / "run").exists(), "nothing is written before everything is known to work"


def test_corpus_of_another_tokenizer(run_yaml: str, tmp_path: Path) -> None:
    other = tiny_data(tmp_path / "other", vocab_size=470)
    expected = r"corpus \S+/other/train was made by tokenizer [0-9a-f]{12}, but \S+ is [0-9a-f]{12}"
    complaint(command("train", run_yaml, f"data.train={other.train}"), expected)


@pytest.mark.distributed
def test_odd_world_size(run_yaml: str) -> None:
    answers = run_distributed(3, command_here, "train", run_yaml, "parallel.expert=2")
    for rank, answer in enumerate(answers):
        assert answer.code == 2
        first, second = answer.err.strip().splitlines()
        where = f" (rank {rank})" if rank else ""
        assert first.startswith(
            f"stablemoe{where}: error: parallel.expert: got 2: expected a divisor of the world size 3"
        )
        assert second.startswith("schedule.tokens_per_step: got 128: expected a multiple of")


def test_vocabulary_larger_than_the_text_allows(data: TinyData, tmp_path: Path) -> None:
    output = tmp_path / "t.model"
    words = ("data", "tokenizer", str(data.text), "--output", str(output), "--vocab-size", "90000")
    complaint(command_here(*words), r"vocabulary of 90000 is more than the text of \S+ allows: the largest .* is \d+")
    assert not output.exists()


@pytest.mark.parametrize("content", [b"", b" \n\n \t\n"], ids=["empty", "blank"])
def test_text_without_a_word(content: bytes, data: TinyData, tmp_path: Path) -> None:
    text = tmp_path / "empty.txt"
    text.write_bytes(content)
    output = ("--output", str(tmp_path / "out"))
    complaint(command_here("data", "tokenizer", str(text), *output, "--vocab-size", "300"), r"empty\.txt")
    words = ("data", "prepare", str(text), *output, "--tokenizer", data.tokenizer)
    complaint(command_here(*words), "the text files are empty or hold only white space")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt"]


NO_CHECKPOINT = r"no checkpoint at \S+none: expected checkpoint.json"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["eval", "{}"], NO_CHECKPOINT),
        (["generate", "{}", "--prompt", "x"], NO_CHECKPOINT),
        (["routing", "report", "{}"], NO_CHECKPOINT),
        (["routing", "table", "{}"], r"nothing at \S+none: expected a table file, a checkpoint or a run directory"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_no_checkpoint(words: list[str], expected: str, tmp_path: Path) -> None:
    path = str(tmp_path / "none")
    complaint(command_here(*(word.format(path) for word in words)), expected)


def test_table_of_stage_1(finished: RunConfig) -> None:
    complaint(command_here("routing", "table", str(checkpoint_of(finished, 3))), r"has no routing table: .* stage 1")


def test_table_that_is_none(data: TinyData) -> None:
    complaint(command_here("routing", "table", data.tokenizer), r"is not a routing table")


def test_evaluation_of_a_missing_corpus(finished: RunConfig) -> None:
    complaint(command("eval", finished.directory, "--data", "/nowhere/text"), "no prepared corpus at /nowhere/text")


def test_prompt_too_long(finished: RunConfig) -> None:
    words = ("generate", finished.directory, "--prompt", "x", "--prompt", "wrap the text " * 30)
    complaint(command(*words), r"prompt 2 has \d+ ids, the model has 32 positions \(data\.sequence_length\)")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["generate", "runs/x"], "the following arguments are required: --prompt"),
        (["generate", "runs/x", "--prompt", "a", "--tokens", "many"], "invalid int value: 'many'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(words)
    assert ending.value.code == 2
    assert expected in capsys.readouterr().err


def test_settings_behind_an_option_are_told_where_they_go(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["config", "check", "run.yaml", "--world-size", "2", "schedule.steps=9"])
    assert "unrecognized arguments: schedule.steps=9; settings go right behind RUN.yaml" in capsys.readouterr().err
