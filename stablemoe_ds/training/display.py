"""What a person sees of a run: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from stablemoe_ds.answers import stream


def step_fields(values: dict[str, Any]) -> str:
    """One line of an update's figures; what is None is left out."""
    parts = [f"stage {values['stage']}", f"loss {values['loss']:.3f}", f"{values['tokens_per_second']:,.0f} tok/s"]
    if values.get("mfu") is not None:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values.get("agreement") is not None:
        parts.append(f"agree {values['agreement']:.0%}")
    if values.get("load"):
        parts.append("load " + " ".join(f"{load:.1f}" for load in values["load"]))
    if values.get("drop_rate") is not None:
        parts.append(f"drop {values['drop_rate']:.1%}")
    return " · ".join(parts)


class Display:
    """Main rank only; on every other rank all methods do nothing."""

    def __init__(self, active: bool) -> None:
        self._active = active
        self.console = Console(file=stream(), highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def start(self, name: str, done: int, total: int) -> None:
        """Begin to show progress; without a terminal there is no bar, only lines."""
        # Open MPI gives its ranks a terminal of its own whose output usually ends in a file.
        if self._active and self.console.is_terminal and "OMPI_COMM_WORLD_RANK" not in os.environ:
            columns: Iterable[Any] = (
                MofNCompleteColumn(),
                *([BarColumn(bar_width=20)] if self.console.width >= 120 else []),
                TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True),
            )
            self._progress = Progress(*columns, console=self.console, refresh_per_second=4)
            self._task = self._progress.add_task(name, completed=done, total=total, figures="")
            self._progress.start()

    def advance(self, step: int) -> None:
        """An update was made and its figures were not read."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def step(self, step: int, total: int, values: dict[str, Any]) -> None:
        """Show the figures of an update: in the live line, or as a line of its own."""
        if not self._active:
            return
        figures = step_fields(values)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures)
        else:
            width = len(str(total))
            self.console.print(f"step {step:>{width}}/{total} · {figures} · lr {values['lr']:.2e}", markup=False)

    def say(self, text: str, style: str | None = None) -> None:
        """A line that stays."""
        if self._active:
            # A style given to print would colour the live line, too.
            self.console.print(Text(text, style=style or ""))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
