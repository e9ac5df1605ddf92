"""Text to measure with: Python's standard library, or a file of one's own, as a tokenizer and a prepared corpus."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from stablemoe_ds.commands.demonstration import SKIPPED
from stablemoe_ds.data.prepare import prepare
from stablemoe_ds.data.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Paths of a tokenizer and of a corpus made with it (without ending)."""

    tokenizer: str
    prefix: str


def library_text(most_bytes: int) -> list[Path]:
    """Modules of the standard library, in the order of their names, up to so many bytes of text."""
    library = Path(sysconfig.get_paths()["stdlib"])
    chosen: list[Path] = []
    for path in sorted(library.rglob("*.py")):
        size = path.stat().st_size
        if size and size <= most_bytes and not set(path.relative_to(library).parts[:-1]) & set(SKIPPED):
            chosen.append(path)
            most_bytes -= size
    return chosen


def make_corpus(folder: Path, files: list[Path], vocab_size: int) -> Corpus:
    """Learn a tokenizer from the files and encode them with it, a document a file."""
    tokenizer = train_tokenizer(files, folder / "tokenizer.model", vocab_size, "bpe")
    return Corpus(str(tokenizer.path), prepare(files, tokenizer, folder / "corpus", documents="file").prefix)
