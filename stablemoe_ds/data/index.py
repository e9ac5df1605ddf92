"""Megatron's ``.idx``: where the documents of a corpus begin. What it must hold, to the last byte.

A head, then int32 lengths and int64 places in bytes of all sequences, then the int64 numbers of the sequences at
which documents begin (megatron-core, ``datasets/indexed_dataset.py``). Only megatron-core reads its
content, and it does not check what it reads.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.errors import UserError
from stablemoe_ds.files import open_file

HEAD = struct.Struct("<9sQBQQ")
"""Magic, version, number of the type of ids, sequences, document boundaries."""
MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
TYPES = {"uint16": 8, "int32": 4}
"""Types that ids are stored in, and Megatron's number for each."""


def check_size(path: Path, expected: int) -> None:
    """Raise UserError unless there is a file of this many bytes."""
    try:
        with open_file(path) as file:
            found = file.seek(0, 2)
    except OSError as error:
        raise UserError(f"corpus is incomplete: {error}; prepare it again") from error
    if found != expected:
        raise UserError(f"{path} has {found} bytes, expected {expected}: cut short or replaced; prepare it again")


def check_index(path: Path, documents: int, tokens: int, dtype: str) -> None:
    """Raise UserError unless the file cuts ``tokens`` ids of type ``dtype`` into ``documents`` of a sequence each.

    Lengths decide places and the other way round, so no single damage goes unnoticed.
    """
    head = HEAD.pack(MAGIC, VERSION, TYPES[dtype], documents, documents + 1)
    try:
        with open_file(path) as file:
            found = file.read(HEAD.size)
    except OSError as error:
        raise UserError(f"corpus is incomplete: {error}; prepare it again") from error
    if not head.startswith(found):
        raise UserError(f"{path} does not belong to this corpus; prepare it again")
    check_size(path, HEAD.size + documents * (4 + 8) + (documents + 1) * 8)

    lengths, places, firsts = _columns(path, documents)
    ends = np.cumsum(lengths, dtype=np.int64)
    if not (
        lengths.min() > 0
        and ends[-1] == tokens
        and np.array_equal(places, (ends - lengths) * np.dtype(dtype).itemsize)
        and np.array_equal(firsts, np.arange(documents + 1))
    ):
        raise UserError(f"{path} is damaged: it does not cut {tokens} tokens into documents; prepare it again")


def document_lengths(path: Path, documents: int) -> NDArray[np.int32]:
    """int32 [documents]: ids of each document, mapped from a file that :func:`check_index` has seen."""
    return _columns(path, documents)[0]


def _columns(path: Path, documents: int) -> list[NDArray[Any]]:
    """Lengths, places and first sequences."""
    parts = np.split(np.memmap(path, mode="r")[HEAD.size :], [documents * 4, documents * (4 + 8)])
    return [part.view(kind) for part, kind in zip(parts, ("<i4", "<i8", "<i8"), strict=True)]
