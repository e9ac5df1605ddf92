"""A table from a file, in whichever format it is."""

from __future__ import annotations

from pathlib import Path

from stablemoe_ds.tables.deepseek_v4 import has_tid2eid, read_deepseek_v4
from stablemoe_ds.tables.table import RoutingTable


def read_table(path: str | Path, experts: int | None = None) -> RoutingTable:
    """This package's format, or DeepSeek-V4's. Raises UserError if the file is missing, damaged or no table.

    experts: N of the run that is to follow the table, for files that do not say; None: not known.
    """
    if has_tid2eid(path):
        return read_deepseek_v4(path, experts)
    return RoutingTable.read(path)
