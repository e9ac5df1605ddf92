"""``stablemoe data``: from text to training data."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from stablemoe_ds.answers import answer
from stablemoe_ds.commands.parsing import Subparsers, add_command, add_group, settle_libraries


def add_to(commands: Subparsers) -> None:
    data = add_group(commands, "data", "from text to training data", "tokenizer|prepare")
    tokenizer = add_command(data, "tokenizer", "learn a sentencepiece tokenizer from text files", _tokenizer)
    tokenizer.add_argument("files", nargs="+", type=Path, help="text, also .gz and .xz")
    tokenizer.add_argument("--output", type=Path, required=True, help="the .model file to write")
    tokenizer.add_argument("--vocab-size", type=int, required=True, help="how many ids there shall be")
    tokenizer.add_argument("--kind", choices=("unigram", "bpe"), default="unigram", help="default unigram")
    tokenizer.add_argument("--no-byte-fallback", action="store_true", help="unknown characters become <unk>")
    prepare = add_command(data, "prepare", "text files to Megatron's .bin/.idx", _prepare)
    prepare.add_argument("files", nargs="+", type=Path, help="text, also .gz and .xz")
    prepare.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model file")
    prepare.add_argument("--output", type=Path, required=True, help="path without ending")
    prepare.add_argument(
        "--documents", choices=("file", "line", "wiki"), default="file", help="what ends a document (default: the file)"
    )
    prepare.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")


def _tokenizer(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.data.tokenizer import train_tokenizer

    made = train_tokenizer(
        arguments.files,
        arguments.output,
        arguments.vocab_size,
        arguments.kind,
        byte_fallback=not arguments.no_byte_fallback,
        threads=os.cpu_count() or 1,
    )
    answer(f"wrote {made.path}: {made.vocab_size} ids, fingerprint {made.fingerprint[:12]}")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.data.prepare import prepare
    from stablemoe_ds.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(arguments.tokenizer)
    settle_libraries()
    info = prepare(arguments.files, tokenizer, arguments.output, arguments.workers, arguments.documents)
    answer(f"wrote {info.prefix}.bin/.idx: {info.documents:,} documents, {info.tokens:,} tokens, {info.words:,} words")
    return 0
