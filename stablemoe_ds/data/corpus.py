"""A prepared corpus on disk: ids in Megatron's ``.bin/.idx``, and beside them what was counted on the way.

``<prefix>.bin``         the ids of all documents, one after the other, each document ending in eos
``<prefix>.idx``         where documents begin (megatron-core, ``datasets/indexed_dataset.py``)
``<prefix>.counts.npy``  how often each id occurs
``<prefix>.json``        the fields of :class:`PreparedInfo`; written last, so it seals the other three
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError

FORMAT = "stablemoe-corpus-1"
INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, number type, sequences, document boundaries: the head of Megatron's ``.idx``."""
INDEX_MAGIC = b"MMIDIDX\x00\x00"


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

    def path(self, ending: str) -> Path:
        """One of the corpus's files, e.g. ``path("bin")``."""
        return corpus_file(self.prefix, ending)

    def token_counts(self) -> NDArray[np.int64]:
        """How often each id occurs: int64 [V]. Raises UserError if the file is missing or damaged."""
        try:
            counts = np.load(self.path("counts.npy"))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"cannot read token counts of corpus {self.prefix}: {error}; prepare it again") from error
        if counts.shape != (self.vocab_size,) or counts.dtype != np.int64 or counts.sum() != self.tokens:
            raise UserError(f"{self.path('counts.npy')} does not belong to corpus {self.prefix}; prepare it again")
        return counts

    def stream(self) -> NDArray[Any]:
        """All ids in order, mapped from disk: ``dtype`` [tokens]."""
        return np.memmap(self.path("bin"), dtype=self.dtype, mode="r")

    def save(self, path: Path) -> None:
        """Write the fields as JSON; the prefix is not among them, so that a corpus can be moved."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k != "prefix"}
        path.write_text(json.dumps({"format": FORMAT, **fields}, indent=2) + "\n")

    @classmethod
    def read(cls, prefix: str | Path, tokenizer: Tokenizer | None = None) -> PreparedInfo:
        """Read and check a corpus.

        Raises UserError if a file is missing, damaged or cut short, or if another tokenizer made the ids.
        """
        info = cls._parse(str(prefix))
        info._check_sizes()
        if tokenizer is not None and tokenizer.fingerprint != info.tokenizer:
            raise UserError(
                f"corpus {prefix} was made by tokenizer {info.tokenizer[:12]}, but {tokenizer.path} is "
                f"{tokenizer.fingerprint[:12]}: name the tokenizer it was made by, or prepare it again"
            )
        return info

    @classmethod
    def _parse(cls, prefix: str) -> PreparedInfo:
        path = corpus_file(prefix, "json")
        try:
            fields = json.loads(path.read_text())
            if fields.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            return cls(prefix=prefix, **fields)
        except FileNotFoundError as error:
            raise UserError(
                f"no prepared corpus at {prefix}: {path} does not exist; give the path of the .bin/.idx pair without "
                "its ending, or make it with 'stablemoe data prepare'"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read corpus description {path}: {error}; prepare the corpus again") from error

    def _check_sizes(self) -> None:
        """Compare .bin and .idx with what the description and the head of .idx promise."""
        index, ids = self.path("idx"), self.path("bin")
        try:
            with index.open("rb") as file:
                magic, _, _, sequences, boundaries = INDEX_HEADER.unpack(file.read(INDEX_HEADER.size))
            found = {index: index.stat().st_size, ids: ids.stat().st_size}
        except struct.error as error:
            raise UserError(f"{index} is cut short: it has no complete head; prepare the corpus again") from error
        except OSError as error:
            raise UserError(f"corpus {self.prefix} is incomplete: {error}; prepare it again") from error
        if magic != INDEX_MAGIC or sequences != self.documents:
            raise UserError(f"{index} does not belong to corpus {self.prefix}; prepare it again")
        expected = {
            index: INDEX_HEADER.size + sequences * (4 + 8) + boundaries * 8,
            ids: self.tokens * np.dtype(self.dtype).itemsize,
        }
        for path, size in expected.items():
            if found[path] != size:
                raise UserError(
                    f"{path} has {found[path]} bytes, expected {size}: cut short or replaced; prepare it again"
                )


def corpus_file(prefix: str | Path, ending: str) -> Path:
    """Path of one file of a corpus; an ending is added, whatever dots the prefix has."""
    return Path(f"{prefix}.{ending}")


def read_sources(sources: Sequence[Source], tokenizer: Tokenizer | None = None) -> list[PreparedInfo]:
    """Read the corpora of a blend. Raises UserError if there is none or if two tokenizers made them."""
    if not sources:
        raise UserError("no corpus is named: expected at least one source, e.g. data.train=[path/without/ending]")
    infos = [PreparedInfo.read(source.path, tokenizer) for source in sources]
    for info in infos[1:]:
        if info.tokenizer != infos[0].tokenizer:
            raise UserError(
                f"corpora {infos[0].prefix} and {info.prefix} were made by different tokenizers "
                f"({infos[0].tokenizer[:12]} and {info.tokenizer[:12]}): prepare both with one"
            )
    return infos
