"""A sentencepiece model as a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from stablemoe_ds.errors import UserError, one_line

SPACE = "\u2581".encode()
"""How sentencepiece writes a space."""


class SentencePieceModel:
    """Ids as sentencepiece gives them, a line at a time, so that they do not depend on what other lines there are.

    Raises UserError if the content is no sentencepiece model, or has no eos.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content, num_threads=1)
            self.vocab_size: int = self._model.vocab_size()
            for token in range(self.vocab_size):  # the library takes any bytes for a piece, and fails when it is read
                self._model.id_to_piece(token)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no sentencepiece model, or damaged: {one_line(error)}") from error
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"tokenizer {path} has no eos, which must end each document: train it with eos_id")
        pad = self._model.pad_id()
        self.pad_id: int = pad if pad >= 0 else self._model.unk_id()
        self._special = {self._model.unk_id(), self._model.bos_id(), self.eos_id, pad}
        self._space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        # The sign sentencepiece uses for a space would come back as one; its bytes come back as themselves.
        for number, part in enumerate(text.encode().split(SPACE)):
            ids += self._space if number else []
            # A line at a time: over a long text the scores, float32 sums, lose the digits that tell pieces apart.
            for line in self._model.encode(re.findall(rb"[^\n]*\n|[^\n]+", part)):
                ids += line
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([i for i in ids if i not in self._special])

    def piece(self, token: int) -> str:
        return self._model.id_to_piece(token)
