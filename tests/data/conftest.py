"""A small text, a tokenizer learned from it, and corpora made with that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stablemoe_ds.data.prepare import prepare
from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer

SOURCE = "def area(width, height):\n\tif width < 0:\n        return None\n    return width * height\n\n\n"
WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "route",
    "token",
    "expert",
    "layer",
]


def generate(count: int, start: int = 0) -> str:
    """``count`` lines, no two of them alike."""
    return "".join(
        f"{n}: {WORDS[n % 14]} {WORDS[n * 5 % 13]} {WORDS[n * n % 11]}\n" for n in range(start, start + count)
    )


@pytest.fixture(scope="session")
def lines() -> Callable[..., str]:
    return generate


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(generate(400) + SOURCE * 30)
    return path


@pytest.fixture(scope="session")
def tokenizer(text_file: Path) -> Tokenizer:
    return train_tokenizer([text_file], text_file.with_name("tokenizer.model"), 350)


@pytest.fixture(scope="session")
def corpus(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Make a corpus of generated lines, each a document; returns its prefix."""
    folder = tmp_path_factory.mktemp("corpora")

    def make(name: str, count: int = 200, start: int = 0) -> str:
        text = folder / f"{name}.txt"
        text.write_text(generate(count, start))
        return prepare([text], tokenizer, folder / name).prefix

    return make
