"""The experts of a layer, of which some are in memory and the others are brought there when tokens need them.

For a model that does not train. Where routes are known before the call, so are the experts: they are brought while the
layers before compute.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stablemoe_ds.moe.expert_offsets import ExpertOffsets
from stablemoe_ds.moe.experts import Experts, ExpertShape
from stablemoe_ds.moe.turns import Turn, turns

Fetch = Callable[[int, Experts], None]
"""Copies the weights of an expert, by its number in the layer's :class:`Experts`, into a single expert."""


@dataclass
class Traffic:
    """What some layers have brought since they were filled.

    served: turns of experts that had tokens. fetched: those that were not in memory. waited: seconds in which a layer
    stood still for one.
    """

    served: int = 0
    fetched: int = 0
    waited: float = 0.0


class ResidentExperts(nn.Module):
    """In place of :class:`Experts`: E experts, of which as many as there are ``places`` are in memory.

    Weights are no parameters of the model: which expert's they are changes from call to call. An expert computes what
    it would among the others, to the bit.
    """

    def __init__(
        self, shape: ExpertShape, experts: int, places: int, device: torch.device, thread: Executor, traffic: Traffic
    ) -> None:
        """``thread``: what brings experts, one after another. traffic: is added to."""
        super().__init__()
        with device:
            self._places = [Experts(shape, 1).requires_grad_(False) for _ in range(places)]
        self._held: list[int | None] = [None] * places
        self._arriving: list[Future[None] | None] = [None] * places
        self._thread, self._traffic = thread, traffic
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._expected: Set[int] = frozenset()
        self._turns: list[Turn] = []
        self._waiting: defaultdict[int, deque[int]] = defaultdict(deque)
        self._last_used, self._calls = [0] * experts, 0

    @property
    def shapes_of_one(self) -> dict[str, tuple[int, ...]]:
        """Of the weights of one expert, by name."""
        return {name: tuple(weight.shape[1:]) for name, weight in self._places[0].named_parameters()}

    @property
    def bytes_of_one(self) -> int:
        """Bytes of one expert's weights."""
        return sum(weight.nbytes for weight in self._places[0].parameters())

    @property
    def in_memory(self) -> int:
        """How many experts are in memory at a time."""
        return len(self._places)

    def fill(self, fetch: Fetch, load: Sequence[float]) -> None:
        """Begin to bring the experts of most load, which give way last.

        load: of each expert, in any unit. Raises in a later call what ``fetch`` raises.
        """
        self._fetch, self._load = fetch, load
        most = sorted(range(len(load)), key=lambda expert: (-load[expert], expert))
        for place, expert in zip(range(self.in_memory), most, strict=False):
            self._bring(expert, place)

    def expect(self, needed: Set[int]) -> None:
        """Begin to bring the experts that the next call has tokens for, if they are not here."""
        self._plan(needed, self._load)

    @torch.no_grad()
    def forward(self, x_RD: Tensor, offsets: ExpertOffsets) -> Tensor:
        """What each expert *adds* to its rows: [R, D]. Rows sorted by expert.

        Experts that were not expected are brought now, in place of those not used for longest.
        """
        needed = {expert for expert, rows in enumerate(offsets.sizes) if rows}
        if not needed <= self._expected:
            self._plan(needed, self._last_used)
        self._calls += 1
        added_RD = torch.empty_like(x_RD)
        rows = list(offsets.split(x_RD, added_RD))
        for turn in self._turns:
            expert = self._arrived(turn.place)
            x, added = rows[turn.expert]
            if len(x):
                added.copy_(expert(x, ExpertOffsets.whole(len(x), x.device)))
                self._last_used[turn.expert] = self._calls
                self._traffic.served += 1
            if waiting := self._waiting[turn.place]:
                self._bring(waiting.popleft(), turn.place)
        self._expected, self._turns = frozenset(), []
        return added_RD

    def _plan(self, needed: Set[int], worth: Sequence[float]) -> None:
        """Settle the turns of a call, and begin to bring what comes first to each place."""
        self._expected, self._turns = needed, turns(self._held, needed, worth)
        self._waiting, taken = defaultdict(deque), set()
        for turn in self._turns:
            if turn.fetched and turn.place in taken:
                self._waiting[turn.place].append(turn.expert)
            elif turn.fetched:
                self._bring(turn.expert, turn.place)
            taken.add(turn.place)
        self._traffic.fetched += sum(turn.fetched for turn in self._turns)

    def _bring(self, expert: int, place: int) -> None:
        self._held[place] = expert
        left = None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()
        self._arriving[place] = self._thread.submit(self._copy, expert, self._places[place], left)

    def _copy(self, expert: int, into: Experts, left: torch.cuda.Event | None) -> None:
        """In the thread: bring an expert, complete on return. A GPU goes on computing meanwhile: the copy has a stream
        of its own, and waits there for ``left``, after which nothing reads what stands at the place."""
        if self._stream is None or left is None:
            self._fetch(expert, into)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(left)
            self._fetch(expert, into)
        self._stream.synchronize()

    def _arrived(self, place: int) -> Experts:
        """The expert at a place, waiting for it if it is on its way."""
        arriving = self._arriving[place]
        if arriving is not None:
            began = time.perf_counter()
            arriving.result()
            self._traffic.waited += time.perf_counter() - began
            self._arriving[place] = None
        return self._places[place]
