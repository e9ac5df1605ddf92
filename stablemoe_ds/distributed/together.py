"""What one rank does for all."""

from __future__ import annotations

from collections.abc import Callable

from torch import distributed

from stablemoe_ds.errors import UserError


def on_first_rank(act: Callable[[], None]) -> None:
    """Do something on one rank while the others wait. Its UserError is raised on all of them."""
    if not distributed.is_initialized():
        act()
        return
    complaint: list[str | None] = ["the first rank failed"]
    try:
        if distributed.get_rank() == 0:
            act()
        complaint = [None]
    except UserError as error:
        complaint = [str(error)]
        raise
    finally:
        distributed.broadcast_object_list(complaint)
    if complaint[0] is not None:
        raise UserError(complaint[0])
