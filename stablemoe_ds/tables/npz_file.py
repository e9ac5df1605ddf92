"""Routing tables in numpy's own files, for programs that know nothing else."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from stablemoe_ds.errors import UserError
from stablemoe_ds.files import open_file
from stablemoe_ds.tables.table import RoutingTable
from stablemoe_ds.tables.table_flaws import flaws, refuse

NAME = "npz"
"""The format on the command line, and the builder that a table of somebody else's file names."""
ZIP = b"PK\x03\x04"

DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and its archive raise over files that are none of theirs."""


def is_npz(path: str | Path) -> bool:
    """Whether a file begins as numpy's archives do."""
    try:
        with open_file(path) as file:
            return file.read(len(ZIP)) == ZIP
    except OSError:
        return False


def save_npz(table: RoutingTable, path: str | Path) -> None:
    """Write ``expert_LVK`` int32 [L, V, K], ``blocks`` int64 [L], and what else there is to know as 0-d arrays.

    Raises OSError if it cannot be written.
    """
    with Path(path).open("wb") as file:  # a name would be given an ending
        np.savez_compressed(
            file,
            expert_LVK=table.expert_LVK,
            blocks=np.array(table.blocks),
            experts=np.array(table.experts),
            tokenizer=np.array(table.tokenizer),
            sha256=np.array(table.sha256),
            made=np.array(json.dumps(dict(table.made))),
        )


def read_npz(path: str | Path, experts: int | None = None) -> RoutingTable:
    """Read what :func:`save_npz` wrote, or a file with one array of integers, [V, K] or [L, V, K], under any name.

    experts: N, for a file that does not say; where nobody does, it is the largest expert that is named, plus one.
    Layers of a file that does not say are those of blocks 1 to L.
    Raises UserError, one line a problem, if it is damaged or no table.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        ours = "expert_LVK" in arrays
        given = arrays["expert_LVK"] if ours else _only_one(arrays)
        expert_LVK = given if given.ndim == 3 else given[None]
        if expert_LVK.dtype.kind not in "iu" or expert_LVK.ndim != 3 or 0 in expert_LVK.shape:
            raise ValueError(f"{given.dtype} {list(given.shape)}: expected integers [layers, ids, experts of an id]")
        known = int(arrays["experts"]) if "experts" in arrays else experts
        refuse(f"{path}: layer {i}: {flaw}" for i, layer_VK in enumerate(expert_LVK) for flaw in flaws(layer_VK, known))
        blocks = tuple(arrays["blocks"].tolist()) if "blocks" in arrays else tuple(range(1, len(expert_LVK) + 1))
        made = dict(json.loads(str(arrays["made"]))) if "made" in arrays else {"builder": NAME}
        values = np.ascontiguousarray(expert_LVK, dtype=np.int32)
        table = RoutingTable(values, known or int(values.max()) + 1, blocks, str(arrays.get("tokenizer", "")), made)
    except DAMAGED as error:
        raise UserError(f"{path} is not a routing table that can be read: {error}") from error
    if "sha256" in arrays and table.sha256 != str(arrays["sha256"]):
        raise UserError(f"routing table {path} is damaged, or was changed: its sha256 is not the one it says")
    return table


def _only_one(arrays: dict[str, np.ndarray]) -> np.ndarray:
    if len(arrays) != 1:
        raise ValueError(f"it holds {', '.join(sorted(arrays)) or 'nothing'}: expected one array, or expert_LVK")
    return next(iter(arrays.values()))
