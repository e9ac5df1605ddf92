"""A table from a file, in whichever format it is, and to a file in any of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.npz_file import NAME as NPZ
from stablemoe_ds.tables.npz_file import is_npz, read_npz, save_npz
from stablemoe_ds.tables.table import RoutingTable
from stablemoe_ds.tables.tid2eid import STYLES, has_tid2eid, read_tid2eid, save_tid2eid

if TYPE_CHECKING:
    from collections.abc import Callable

FOREIGN = (*STYLES, NPZ)
"""Formats of others: names on the command line, and the builder that a table names if its file says nothing else."""


def read_table(path: str | Path, experts: int | None = None) -> RoutingTable:
    """This package's format, or one of :data:`FOREIGN`, known by what the file holds.

    experts: N of the run that is to follow the table, for files that do not say; None: not known.
    Raises UserError if the file is missing, damaged or no table.
    """
    if is_npz(path):
        return read_npz(path, experts)
    if has_tid2eid(path):
        return read_tid2eid(path, experts)
    return RoutingTable.read(path)


def writer(form: str, dtype: Literal["int64", "int32"] = "int64") -> Callable[[RoutingTable, Path], None]:
    """Writes a table in one of :data:`FOREIGN`. dtype: of the values of a ``tid2eid``; npz has int32.

    It raises UserError for a table that splits ids: readers of these formats look an id up by itself.
    """
    save = save_npz if form == NPZ else partial(save_tid2eid, style=form, dtype=dtype)

    def refuse_split(table: RoutingTable, path: Path) -> None:
        if table.split is not None:
            raise UserError(
                f"the table splits {len(table.split.ids_J)} ids by the id before them, for which {form} has no place: "
                "expected a table without split ids, e.g. the one that it was made from"
            )
        save(table, path)

    return refuse_split
