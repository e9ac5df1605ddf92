"""Prompts nobody should send, and what the commands print where."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stablemoe_ds.config.schema import RunConfig
from tests.training.runs import Answer, TinyData, command


def generated(run: RunConfig, *words: str) -> Answer:
    return command("generate", run.directory, "--tokens", "5", *words)


def test_empty_prompt_starts_a_document(finished: RunConfig) -> None:
    answer = generated(finished, "--prompt", "", "--prompt", "def a", "--temperature", "5", "--json")
    assert (answer.code, answer.err) == (0, "")
    empty, other = answer.json
    assert (empty["prompt"], other["prompt"]) == ("", "def a")
    assert empty["continuation"] != other["continuation"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", "a", "--prompt", "b\udcff"], "prompt 2: text is not valid Unicode at character 1"),
        (["--prompt", "a\0" * 20], "prompt 1 has 40 ids, the model has 32 positions"),
        (["--prompt", "a", "--seed", "9" * 30], "seed is 9+: expected 0 to"),
    ],
    ids=["not UTF-8", "too long", "seed"],
)
def test_refused(finished: RunConfig, words: list[str], expected: str) -> None:
    answer = generated(finished, *words)
    assert answer.code == 2
    assert len(answer.err.splitlines()) == 1
    assert re.search(f"stablemoe: error: .*{expected}", answer.err), answer.err


def test_prompt_with_a_nul_is_continued(finished: RunConfig) -> None:
    answer = generated(finished, "--prompt", "a\0b", "--temperature", "1e-320", "--json")
    assert (answer.code, answer.err) == (0, "")
    assert answer.json[0]["prompt"] == "a\0b"


def test_prepare_is_silent_about_libraries_and_prints_in_any_encoding(data: TinyData, tmp_path: Path) -> None:
    text, output = tmp_path / "text", tmp_path / "é"
    text.write_text("some words\n")
    words = ["data", "prepare", str(text), "--tokenizer", data.tokenizer, "--output", str(output), "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "stablemoe_ds", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"wrote {tmp_path}/\\xe9.bin/.idx: 1 documents")
