"""What one rank does for all, and what all ranks agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from stablemoe_ds.distributed.groups import World
from stablemoe_ds.errors import UserError

T = TypeVar("T")


def of_first_rank(make: Callable[[], T]) -> T:
    """Call a function on one rank; returns its result, or raises its UserError, on all ranks. Collective."""
    if not distributed.is_initialized():
        return make()
    made: list[Any] = [None, UserError("the first rank failed")]
    try:
        if distributed.get_rank() == 0:
            made = [make(), None]
    except UserError as error:
        made = [None, error]
        raise
    finally:
        distributed.broadcast_object_list(made)
    value, complaint = made
    if complaint is not None:
        raise complaint
    return cast(T, value)


@contextmanager
def on_first_rank_within(context: AbstractContextManager[None]) -> Iterator[None]:
    """Enter a context on one rank while the others wait. A UserError of entering it is raised on all of them."""
    with ExitStack() as stack:
        of_first_rank(lambda: stack.enter_context(context))
        yield


def of_all_ranks(value: Any) -> list[Any]:
    """What each rank has, in the order of the ranks; a process without a group is the only one. Collective."""
    if not distributed.is_initialized():
        return [value]
    ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(ranks, value)
    return ranks


class StopVote:
    """Whether any rank was asked to stop. Ranks agree in host memory, so that no device has to be waited for."""

    def __init__(self, world: World) -> None:
        """Collective."""
        on_host = distributed.get_backend() == "gloo"
        self._group = (
            distributed.group.WORLD if on_host else distributed.new_group(backend="gloo", timeout=world.timeout)
        )
        self._alone = world.size == 1
        self._asked = torch.zeros(1, dtype=torch.int32)
        self._under_way: distributed.Work | None = None

    def cast(self, asked: bool) -> None:
        """Begin to tell the others; :meth:`outcome` ends it. Collective, once an update."""
        self._asked.fill_(asked)
        if not self._alone:
            most = distributed.ReduceOp.MAX
            self._under_way = distributed.all_reduce(self._asked, most, group=self._group, async_op=True)

    def outcome(self) -> bool:
        """Whether any rank had been asked when it cast its vote; the same on all ranks."""
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None
        return bool(self._asked.item())
