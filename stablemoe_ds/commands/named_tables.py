"""Tables as the command line names them, and the files that commands write them to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stablemoe_ds.commands.parsing import settle_libraries
from stablemoe_ds.errors import UserError

if TYPE_CHECKING:
    from stablemoe_ds.checkpoint.reader import Checkpoint
    from stablemoe_ds.tables.table import RoutingTable


def open_table(path: str) -> tuple[RoutingTable, Checkpoint | None]:
    """A table file, or the frozen table of a checkpoint or run directory and that. Raises UserError without one."""
    from stablemoe_ds.tables.table_file import read_table

    if Path(path).is_file():
        return read_table(path), None
    settle_libraries()
    from stablemoe_ds.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(path)
    table = checkpoint.table()
    if table is None:
        raise UserError(
            f"checkpoint {checkpoint.path} has no routing table: it is of stage {checkpoint.progress.stage}; "
            "'stablemoe table build frozen' or 'observed' makes one"
        )
    return table, checkpoint


def check_load(max_load: float | None, option: str = "--max-load") -> None:
    """Raise UserError for a largest max/mean load that no table can have."""
    if max_load is not None and not 1 <= max_load < float("inf"):
        raise UserError(f"{option}: got {max_load}: expected at least 1, the mean")


def write_table(table: RoutingTable, path: Path, save: Callable[[RoutingTable, Path], None] | None = None) -> None:
    """Write a table file, whole or not at all, on the main rank only. Raises UserError if that is impossible.

    save: writes the file; by default in this package's own format.
    """
    from safetensors import SafetensorError

    from stablemoe_ds.distributed.environment import read_launcher_environment

    if read_launcher_environment()[0] != 0:
        return
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if save is None:
            table.save(part)
        else:
            save(table, part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write routing table {path}: {error}") from error
