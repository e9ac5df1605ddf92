"""How far a long computation is: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Advance = Callable[[int], object]
"""To be called with how many steps have just been done."""


_SHOWN = ContextVar("a progress bar is shown", default=False)


def unwatched(_: int) -> None:
    """For computations that nobody follows."""


@contextmanager
def progress_bar(what: str, total: int | None, in_bytes: bool = False) -> Iterator[Advance]:
    """Yields what to call with how many of ``total`` have just been done. Written to standard error.

    total: None if it is not known how many there will be. Of a computation inside another one that is shown, nothing is
    written: two bars would overwrite each other.
    """
    if _SHOWN.get():
        yield unwatched
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    done = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        token = _SHOWN.set(True)
        try:
            yield lambda count: progress.advance(task, count)
        finally:
            _SHOWN.reset(token)
