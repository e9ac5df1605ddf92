"""Text to ids and back: with a sentencepiece model, or with a ``tokenizer.json`` of Hugging Face.

Those that are learned here are sentencepiece models, set up so that text comes back from ids exactly as it went in.
Their ids 0 to 3 are unk, bos, eos and pad; then newline and tab, one id each; then the 256 bytes that stand in for
whatever has no piece of its own; then the pieces learned from text.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import sentencepiece

from stablemoe_ds.data.flaws import Flaws, Judge
from stablemoe_ds.data.sentencepiece_model import SentencePieceModel
from stablemoe_ds.data.text import plan_spans, read_documents
from stablemoe_ds.data.text_files import AS_FOUND, BOM, Reading, TextFile, recognise, text_size
from stablemoe_ds.errors import UserError, one_line
from stablemoe_ds.files import open_file

LINE_CHARACTERS = 4096
"""Longer lines reach the trainer in several pieces, which it would otherwise drop."""

LARGEST = 1 << 28
"""Bytes of a tokenizer; one of 100 000 pieces has about two million, as JSON ten times that."""
BLANK = " \t\n\r\v\f"
"""The white space of ASCII: what a blank line is made of."""


class Model(Protocol):
    """What a library's model has to offer to be a :class:`Tokenizer`.

    vocab_size: largest id + 1. eos_id: what ends a document. pad_id: what fills up a batch.
    """

    vocab_size: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text that is valid Unicode, without any that stands for no text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; those that stand for no text leave no trace."""

    def piece(self, token: int) -> str:
        """What one id stands for; a space is ``▁``."""


class Tokenizer:
    """Text to ids and back, whatever library the file is for; its first bytes tell.

    fingerprint: sha256 of the file. eos_id ends each document. is_json: it is a tokenizer.json.
    Raises UserError if the file is missing, is no tokenizer, or does not say which id ends a document.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = [self.path]
        """Everything that has to be copied along, under the same names."""
        try:
            with open_file(path) as file:
                content = file.read(LARGEST + 1)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"cannot read tokenizer {path}: {reason}; 'stablemoe data tokenizer' makes one") from error
        if not content:
            raise UserError(f"tokenizer {path} is empty: expected a sentencepiece model or a tokenizer.json")
        if len(content) > LARGEST:
            raise UserError(f"tokenizer {path} is larger than {LARGEST} bytes: expected a tokenizer")
        self._model: Model
        self.is_json = content.removeprefix(BOM).lstrip().startswith(b"{")
        if self.is_json:
            from stablemoe_ds.data.huggingface_model import HuggingFaceModel, config_path

            self._model = HuggingFaceModel(self.path, content)
            self.files += [config for config in [config_path(self.path)] if config.exists()]
        else:
            self._model = SentencePieceModel(self.path, content)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size, self.eos_id, self.pad_id = self._model.vocab_size, self._model.eos_id, self._model.pad_id

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without bos or eos. Raises UserError if the text has half a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"text is not valid Unicode at character {error.start}: not UTF-8, or half a surrogate pair"
            ) from error
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; unk, bos, eos and pad leave no trace."""
        return self._model.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        """One id in readable form: a space is ``▁``, what cannot be printed is escaped as in Python."""
        piece = self._model.piece(int(token))
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)


def train_tokenizer(
    files: Sequence[Path | str],
    output: Path | str,
    vocab_size: int,
    kind: Literal["unigram", "bpe"] = "unigram",
    byte_fallback: bool = True,
    threads: int = 1,
    sample_bytes: int = 100_000_000,
    reading: Reading = AS_FOUND,
) -> Tokenizer:
    """Learn a tokenizer from text files and write it to ``output``, whole or not at all.

    Text is taken as it is: nothing is normalised, and runs of spaces may become pieces.
    byte_fallback: without it, a character the text does not have becomes unk and does not come back.
    sample_bytes: from a larger corpus every n-th line is taken, as memory grows with the text.
    Raises UserError for unreadable or empty text, for files that are not text, and for a vocabulary the text cannot
    fill.
    """
    if not 8 <= vocab_size < 2**31:
        raise UserError(f"vocabulary of {vocab_size} cannot be learned: expected a size such as 8000")
    text = recognise(files, reading)
    paths = [file.path for file in text]
    output = Path(output)
    stride = max(1, -(-sum(map(text_size, paths)) // sample_bytes))
    lines = _training_lines(text, stride, Judge(reading.allow_damaged))
    if not lines:
        raise UserError(f"no text to learn a tokenizer from: {_names(paths)} holds only white space")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            byte_fallback=byte_fallback,
            num_threads=threads,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            user_defined_symbols=["\n", "\t"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * LINE_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_explain(error, vocab_size, paths)) from error
    _write_whole(output, model.getvalue())
    return Tokenizer(output)


def _training_lines(files: Sequence[TextFile], stride: int, judge: Judge) -> list[str]:
    """Every ``stride``-th line that is not blank, without its end, in pieces the trainer accepts.

    A list, since sentencepiece turns whatever an iterator raises, Ctrl-C too, into a RuntimeError.
    """
    lines: list[str] = []
    number = 0
    for file in files:
        flaws = Flaws()
        for line in _lines_of(file, flaws):
            if number % stride == 0:
                lines += [line[i : i + LINE_CHARACTERS] for i in range(0, len(line), LINE_CHARACTERS)]
            number += 1
        judge.file(file, flaws)
    judge.warn()
    return lines


def _lines_of(file: TextFile, flaws: Flaws) -> Iterator[str]:
    """The lines of a file that are not blank, those inside its records as well."""
    for span in plan_spans([file], "line", sys.maxsize):
        for document in read_documents(span, "line", flaws):
            yield from (line.rstrip("\r") for line in document.text.split("\n") if line.strip(BLANK))


def _explain(error: RuntimeError, vocab_size: int, paths: Sequence[Path]) -> str:
    """Sentencepiece's error as a message that says what to do."""
    text = str(error)
    where = _names(paths)
    if most := re.search(r"value <= (\d+)", text):
        return (
            f"vocabulary of {vocab_size} is more than the text of {where} allows: the largest that works is {most[1]}"
        )
    if least := re.search(r"required_chars\. \d+ vs (\d+)", text):
        return f"vocabulary of {vocab_size} cannot hold all bytes and characters: the smallest that works is {least[1]}"
    return f"cannot learn a tokenizer of {vocab_size} pieces from {where}: {one_line(error)}"


def _names(paths: Sequence[Path]) -> str:
    return f"{paths[0]}" + (f" and {len(paths) - 1} more files" if len(paths) > 1 else "")


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is never seen half done. Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tokenizer-") as folder:
            part = Path(folder, "model")
            part.write_bytes(content)
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write tokenizer {path}: {error}") from error
