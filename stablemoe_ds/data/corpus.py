"""A prepared corpus on disk: ids in Megatron's ``.bin/.idx``, and next to them what was counted on the way.

``<prefix>.bin``         the ids of all documents, one after the other, each document ending in eos
``<prefix>.idx``         where documents begin (megatron-core, ``datasets/indexed_dataset.py``)
``<prefix>.counts.npy``  how often each id occurs
``<prefix>.json``        the fields of :class:`PreparedInfo`; written last, so it seals the other three
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.config.schema import Source
from stablemoe_ds.config.textfile import LARGEST_LIST, read_json
from stablemoe_ds.data.index import TYPES, check_index, check_size, document_lengths
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError, one_line
from stablemoe_ds.files import open_file

FORMAT = "stablemoe-corpus-1"
CHUNK = 1 << 24


@dataclass(frozen=True)
class PreparedInfo:
    """What is known of a prepared corpus.

    documents, words, characters, bytes: of the text; words are what white space separates.
    tokens: ids in ``.bin``, the eos of each document among them.
    invalid: byte sequences that were not UTF-8 and became U+FFFD.
    dtype: numpy name of the type of the ids.
    vocab_size, tokenizer: size and fingerprint of the tokenizer.
    sha256: digest of ``.bin``.
    """

    prefix: str
    documents: int
    tokens: int
    words: int
    characters: int
    bytes: int
    invalid: int
    dtype: str
    vocab_size: int
    tokenizer: str
    sha256: str

    def __post_init__(self) -> None:
        """Raise ValueError for values that no corpus has."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "str" and not isinstance(value, str):
                raise ValueError(f"{field.name} is {value!r:.40}, expected text")
            if field.type == "int" and (type(value) is not int or value < 0):
                raise ValueError(f"{field.name} is {value!r:.40}, expected an integer of at least 0")
        if self.dtype not in TYPES:
            raise ValueError(f"dtype is {self.dtype!r:.40}, expected {' or '.join(TYPES)}")
        if not 0 < self.documents <= self.tokens:
            raise ValueError(f"{self.documents} documents cannot have {self.tokens} tokens")

    def path(self, ending: str) -> Path:
        """One of the corpus's files, e.g. ``path("bin")``."""
        return corpus_file(self.prefix, ending)

    def token_counts(self) -> NDArray[np.int64]:
        """How often each id occurs: int64 [V]. Raises UserError if the file is missing or damaged."""
        path = self.path("counts.npy")
        try:
            with open_file(path) as file:
                counts = np.lib.format.read_array(file)
        except (OSError, ValueError, MemoryError, tokenize.TokenError) as error:
            raise UserError(f"cannot read token counts {path}: {one_line(error)}; prepare the corpus again") from error
        if counts.shape != (self.vocab_size,) or counts.dtype != np.int64:
            raise UserError(f"{path} does not belong to corpus {self.prefix}; prepare it again")
        if counts.min() < 0 or counts.sum() != self.tokens:
            raise UserError(f"{path} does not belong to corpus {self.prefix} or is damaged; prepare it again")
        return counts

    def stream(self) -> NDArray[Any]:
        """All ids in order, mapped from disk: ``dtype`` [tokens]."""
        return np.memmap(self.path("bin"), dtype=self.dtype, mode="r")

    def lengths(self) -> NDArray[np.int32]:
        """int32 [documents]: ids of each document, its eos among them; mapped from disk."""
        return document_lengths(self.path("idx"), self.documents)

    def verify(self, tokens: int | None = None) -> None:
        """Read the first ``tokens`` ids, or all: they must be in the vocabulary, and all together those prepared.

        Takes a second or two for each gigabyte. Raises UserError.
        """
        path, digest, itemsize = self.path("bin"), hashlib.sha256(), np.dtype(self.dtype).itemsize
        left = (self.tokens if tokens is None else min(tokens, self.tokens)) * itemsize
        try:
            with open_file(path) as file:
                while chunk := file.read(min(CHUNK, left)):
                    left -= len(chunk)
                    digest.update(chunk)
                    ids = np.frombuffer(chunk, self.dtype, len(chunk) // itemsize)
                    if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
                        raise UserError(
                            f"{path} holds ids outside 0..{self.vocab_size - 1}: damaged, or of another tokenizer; "
                            "prepare it again"
                        )
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; prepare it again") from error
        if left or (tokens is None and digest.hexdigest() != self.sha256):
            raise UserError(f"{path} is damaged: its ids have changed since it was prepared; prepare it again")

    def save(self, path: Path) -> None:
        """Write the fields as JSON; the prefix is not among them, so that a corpus can be moved."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k != "prefix"}
        path.write_text(json.dumps({"format": FORMAT, **fields, "seal": _seal(fields)}, indent=2) + "\n")

    @classmethod
    def read(cls, prefix: str | Path, tokenizer: Tokenizer | None = None) -> PreparedInfo:
        """Read and check a corpus.

        All but the ids themselves is checked here; :meth:`verify` reads those.
        Raises UserError if a file is missing, damaged or cut short, or if another tokenizer made the ids.
        """
        info = cls._parse(str(prefix))
        check_index(info.path("idx"), info.documents, info.tokens, info.dtype)
        check_size(info.path("bin"), info.tokens * np.dtype(info.dtype).itemsize)
        if tokenizer is not None and tokenizer.fingerprint != info.tokenizer:
            raise UserError(
                f"corpus {prefix} was made by tokenizer {info.tokenizer[:12]}, but {tokenizer.path} is "
                f"{tokenizer.fingerprint[:12]}: name the tokenizer it was made by, or prepare it again"
            )
        return info

    @classmethod
    def _parse(cls, prefix: str) -> PreparedInfo:
        path = corpus_file(prefix, "json")
        if not os.path.lexists(path):
            raise UserError(
                f"no prepared corpus at {prefix}: {path} does not exist; give the path of the .bin/.idx pair without "
                "its ending, or make it with 'stablemoe data prepare'"
            )
        try:
            fields = read_json(path, "what 'stablemoe data prepare' has written", LARGEST_LIST)
        except UserError as error:
            raise UserError(f"cannot read corpus description {error}; prepare the corpus again") from error
        try:
            if fields.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            if fields.pop("seal", None) not in (None, _seal(fields)):  # one written by hand may have none
                raise ValueError("it is damaged: its digest is wrong")
            return cls(prefix=prefix, **fields)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"cannot read corpus description {path}: {one_line(error)}; prepare the corpus again"
            ) from error


def _seal(fields: dict[str, Any]) -> str:
    """Digest of a description, whatever the order and layout of its fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def corpus_file(prefix: str | Path, ending: str) -> Path:
    """Path of one file of a corpus; an ending is added, whatever dots the prefix has."""
    return Path(f"{prefix}.{ending}")


def read_sources(sources: Sequence[Source], tokenizer: Tokenizer | None = None) -> list[PreparedInfo]:
    """Read the corpora of a blend. Raises UserError if there is none or if two tokenizers made them."""
    if not sources:
        raise UserError("no corpus is named: expected at least one source, e.g. data.train=[path/without/ending]")
    infos = [PreparedInfo.read(source.path, tokenizer) for source in sources]
    check_one_tokenizer(infos)
    return infos


def check_one_tokenizer(infos: Sequence[PreparedInfo]) -> None:
    """Raise UserError unless all were made by the tokenizer of the first."""
    for info in infos[1:]:
        if info.tokenizer != infos[0].tokenizer:
            raise UserError(
                f"corpora {infos[0].prefix} and {info.prefix} were made by different tokenizers "
                f"({infos[0].tokenizer[:12]} and {info.tokenizer[:12]}): prepare both with one"
            )


def token_counts(sources: Sequence[Source], tokenizer: Tokenizer | None, vocab_size: int) -> NDArray[np.int64]:
    """int64 [V]: how often a blend has each id, corpora weighted as they are in training.

    vocab_size: ids of the model, which may have more than the tokenizer; those do not occur.
    """
    infos = read_sources(sources, tokenizer)
    shares = [info.token_counts() * (s.weight / info.tokens) for s, info in zip(sources, infos, strict=True)]
    total = sum(info.tokens for info in infos)
    weight = sum(source.weight for source in sources)
    counts = np.rint(np.sum(shares, axis=0) * (total / weight)).astype(np.int64)
    return np.pad(counts, (0, vocab_size - len(counts)))


def check_vocabulary(info: PreparedInfo, vocab_size: int) -> None:
    """Raise UserError if the model has fewer ids than the corpus, which is possible without data.tokenizer only."""
    if info.vocab_size > vocab_size:
        raise UserError(f"model.vocab_size: got {vocab_size}: {info.prefix} was prepared with {info.vocab_size} ids")


def check_tokens(info: PreparedInfo, sequence_length: int) -> None:
    """Raise UserError if a corpus is shorter than a sequence."""
    if info.tokens < sequence_length:
        raise UserError(
            f"corpus {info.prefix} has {info.tokens} tokens, fewer than a sequence of {sequence_length}: use more "
            f"text, or data.sequence_length={info.tokens} at most"
        )
