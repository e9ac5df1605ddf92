"""Aligned text for a terminal or a file: the same in both, without lines, colours or cuts."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Rows as lines whose columns stand one below the other, two spaces apart; every row has as many cells.

    right: columns whose cells are flush right, as numbers are. A cell is as wide as a terminal shows it, and whole.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for number in range(len(rows[0]) if rows else 0):
        table.add_column(justify="right" if number in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    # Wider than any row, because rich shrinks tables to the terminal; not a terminal, so no colours.
    console = Console(
        width=1 << 20, color_system=None, force_terminal=False, markup=False, emoji=False, highlight=False
    )
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
