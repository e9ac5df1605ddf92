"""``stablemoe data``: from text to training data."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from stablemoe_ds.answers import answer
from stablemoe_ds.commands.parsing import Subparsers, add_command, add_group, settle_libraries

if TYPE_CHECKING:  # a command loads what it needs when it is called
    from stablemoe_ds.data.text_files import Reading


def add_to(commands: Subparsers) -> None:
    data = add_group(commands, "data", "from text to training data", "tokenizer|prepare")
    tokenizer = add_command(data, "tokenizer", "learn a sentencepiece tokenizer from text files", _tokenizer)
    _reading_arguments(tokenizer)
    tokenizer.add_argument("--output", type=Path, required=True, help="the .model file to write")
    tokenizer.add_argument("--vocab-size", type=int, required=True, help="number of ids")
    tokenizer.add_argument("--kind", choices=("unigram", "bpe"), default="unigram", help="default unigram")
    tokenizer.add_argument("--no-byte-fallback", action="store_true", help="unknown characters become <unk>")
    prepare = add_command(data, "prepare", "text files to Megatron's .bin/.idx", _prepare)
    _reading_arguments(prepare)
    prepare.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model file, or a tokenizer.json")
    prepare.add_argument("--output", type=Path, required=True, help="path without extension")
    prepare.add_argument(
        "--documents",
        choices=("file", "line", "wiki"),
        default="file",
        help="what is a document in plain text (default: the file); a JSON line or Parquet row always is one",
    )
    prepare.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")


def _reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of both commands about the files to read."""
    kinds = "plain text, JSON lines or Parquet; gzip, bzip2, xz or zstd inside"
    parser.add_argument("files", nargs="+", type=Path, help=kinds)
    parser.add_argument("--field", help="field of JSON lines or column of Parquet that holds the text (default: text)")
    parser.add_argument(
        "--format",
        choices=("auto", "text", "jsonl"),
        default="auto",
        help="auto (default): by the first bytes of each file; text: read all as plain text; jsonl: as JSON lines",
    )
    parser.add_argument(
        "--allow-damaged",
        action="store_true",
        help="read files of which more than 1%% is not UTF-8, and leave out records without a text",
    )


def _reading(arguments: argparse.Namespace) -> Reading:
    from stablemoe_ds.data.text_files import Reading

    kind = None if arguments.format == "auto" else arguments.format
    return Reading(kind, arguments.field, arguments.allow_damaged)


def _tokenizer(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.data.tokenizer import train_tokenizer

    made = train_tokenizer(
        arguments.files,
        arguments.output,
        arguments.vocab_size,
        arguments.kind,
        byte_fallback=not arguments.no_byte_fallback,
        threads=os.cpu_count() or 1,
        reading=_reading(arguments),
    )
    answer(f"wrote {made.path}: {made.vocab_size} ids, fingerprint {made.fingerprint[:12]}")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.data.prepare import prepare
    from stablemoe_ds.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(arguments.tokenizer)
    settle_libraries()
    reading = _reading(arguments)
    info = prepare(arguments.files, tokenizer, arguments.output, arguments.workers, arguments.documents, reading)
    answer(f"wrote {info.prefix}.bin/.idx: {info.documents:,} documents, {info.tokens:,} tokens, {info.words:,} words")
    return 0
