"""Sentencepiece, set up so that text comes back from ids exactly as it went in.

Ids 0 to 3 are unk, bos, eos and pad; then newline and tab, one id each; then the 256 bytes that stand in for
whatever has no piece of its own; then the pieces learned from text.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from stablemoe_ds.data.text import check_files, decode, open_text, text_size, warn_invalid
from stablemoe_ds.errors import UserError
from stablemoe_ds.files import open_file

LINE_CHARACTERS = 4096
"""Longer lines reach the trainer in several pieces, which it would otherwise drop."""

LARGEST = 1 << 28
"""Bytes of a model; one of 100 000 pieces has about two million."""

SPACE = "\u2581".encode()
"""How sentencepiece writes a space."""


class Tokenizer:
    """Text to ids and back with a sentencepiece model.

    Pieces never reach over a newline, so the ids of two texts that are cut after a newline are the ids of the
    whole.
    Raises UserError if the file is missing, is no sentencepiece model, or has no eos.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = [self.path]
        """Everything that has to be copied along, under the same names."""
        try:
            with open_file(path) as file:
                model = file.read(LARGEST + 1)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"cannot read tokenizer {path}: {reason}; 'stablemoe data tokenizer' makes one") from error
        if not model:
            raise UserError(f"tokenizer {path} is empty: expected a sentencepiece model")
        if len(model) > LARGEST:
            raise UserError(f"tokenizer {path} is larger than {LARGEST} bytes: expected a sentencepiece model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model, num_threads=1)
            self.vocab_size: int = self._model.vocab_size()
            for token in range(self.vocab_size):  # the library takes any bytes for a piece, and fails when it is read
                self._model.id_to_piece(token)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no sentencepiece model, or damaged: {_reason(error)}") from error
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"tokenizer {path} has no eos, which must end each document: train it with eos_id")
        pad = self._model.pad_id()
        self.pad_id: int = pad if pad >= 0 else self._model.unk_id()
        self._space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without bos or eos. Raises UserError if the text has half a surrogate pair."""
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"text is not valid Unicode at character {error.start}: not UTF-8, or half a surrogate pair"
            ) from error
        ids: list[int] = []
        # The sign sentencepiece uses for a space would come back as one; its bytes come back as themselves.
        for number, part in enumerate(raw.split(SPACE)):
            ids += self._space if number else []
            # A line at a time: over a long text the scores, float32 sums, lose the digits that tell pieces apart.
            for line in self._model.encode(re.findall(rb"[^\n]*\n|[^\n]+", part)):
                ids += line
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; unk, bos, eos and pad leave no trace."""
        special = {self._model.unk_id(), self._model.bos_id(), self.eos_id, self._model.pad_id()}
        return self._model.decode([int(i) for i in ids if int(i) not in special])

    def piece(self, token: int) -> str:
        """One id in readable form: a space is ``▁``, what cannot be printed is escaped as in Python."""
        piece = self._model.id_to_piece(int(token))
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)


def train_tokenizer(
    files: Sequence[Path | str],
    output: Path | str,
    vocab_size: int,
    kind: Literal["unigram", "bpe"] = "unigram",
    byte_fallback: bool = True,
    threads: int = 1,
    sample_bytes: int = 100_000_000,
) -> Tokenizer:
    """Learn a tokenizer from text files and write it to ``output``, whole or not at all.

    Text is taken as it is: nothing is normalised, and runs of spaces may become pieces.
    byte_fallback: without it, a character the text does not have becomes unk and does not come back.
    sample_bytes: from a larger corpus every n-th line is taken, as memory grows with the text.
    Raises UserError for unreadable or empty text and for a vocabulary the text cannot fill.
    """
    if not 8 <= vocab_size < 2**31:
        raise UserError(f"vocabulary of {vocab_size} cannot be learned: expected a size such as 8000")
    paths = check_files(files)
    output = Path(output)
    lines = _training_lines(paths, stride=max(1, -(-sum(map(text_size, paths)) // sample_bytes)))
    if not lines:
        raise UserError(f"no text to learn a tokenizer from: {_names(paths)} holds white space at most")
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


def _training_lines(paths: Sequence[Path], stride: int) -> list[str]:
    """Every ``stride``-th line that is not blank, without its end, in pieces the trainer accepts.

    A list, since sentencepiece turns whatever an iterator raises, Ctrl-C too, into a RuntimeError.
    """
    lines: list[str] = []
    number = invalid = 0
    for path in paths:
        with open_text(path) as file:
            for raw in file:
                if not raw.strip():
                    continue
                number += 1
                if (number - 1) % stride == 0:
                    line, bad = decode(raw.rstrip(b"\r\n"))
                    invalid += bad
                    lines += [line[i : i + LINE_CHARACTERS] for i in range(0, len(line), LINE_CHARACTERS)]
    warn_invalid(invalid)
    return lines


def _explain(error: RuntimeError, vocab_size: int, paths: Sequence[Path]) -> str:
    """Sentencepiece's complaint in words that say what to do."""
    text = str(error)
    where = _names(paths)
    if most := re.search(r"value <= (\d+)", text):
        return (
            f"vocabulary of {vocab_size} is more than the text of {where} allows: the largest that works is {most[1]}"
        )
    if least := re.search(r"required_chars\. \d+ vs (\d+)", text):
        return f"vocabulary of {vocab_size} cannot hold all bytes and characters: the smallest that works is {least[1]}"
    return f"cannot learn a tokenizer of {vocab_size} pieces from {where}: {_reason(error)}"


def _names(paths: Sequence[Path]) -> str:
    return f"{paths[0]}" + (f" and {len(paths) - 1} more files" if len(paths) > 1 else "")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())


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
