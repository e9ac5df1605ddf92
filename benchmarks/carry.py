"""Text for a machine without a network: a tokenizer and a prepared corpus, compressed, in one folder.

    python -m benchmarks.carry FOLDER FILE ...

Learns a tokenizer of 8 192 ids from the files, encodes them (a document a line), keeps the last two hundredth for
validation, and compresses what it has made: 48 MiB hold about 40 million tokens. ``benchmarks.routers --data FOLDER``
reads it.
"""

from __future__ import annotations

import argparse
import lzma
import tempfile
from collections.abc import Sequence
from pathlib import Path

from stablemoe_ds.data.prepare import prepare
from stablemoe_ds.data.tokenizer import train_tokenizer

VALIDATION = 200
"""One line in so many."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+", help="plain text")
    parser.add_argument("--vocab-size", type=int, default=8192)
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        parts = split(given.files, Path(name))
        tokenizer = train_tokenizer([parts["train"]], given.folder / "tokenizer.model", given.vocab_size, "bpe")
        for part, text in parts.items():
            info = prepare([text], tokenizer, Path(name) / part, documents="line")
            for ending in (".bin", ".idx", ".json", ".counts.npy"):
                made = Path(f"{info.prefix}{ending}")
                (given.folder / f"{part}{ending}.xz").write_bytes(lzma.compress(made.read_bytes(), preset=9))
            size = sum(file.stat().st_size for file in given.folder.iterdir())
            print(f"{part}: {info.tokens:,} tokens; {size / 2**20:.1f} MiB so far")


def split(files: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Lines of the files as two files: the last ones for validation."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = len(lines) - max(1, len(lines) // VALIDATION)
    parts = {"train": lines[:kept], "valid": lines[kept:]}
    for name, text in parts.items():
        (folder / f"{name}.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    return {name: folder / f"{name}.txt" for name in parts}


if __name__ == "__main__":
    main()
