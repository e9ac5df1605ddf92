"""Stage 2 ahead of time: while one update runs, a thread works out where every token of the next ones will go.

Routes are a function of the ids, so everything a dispatch needs, the counts of the other ranks among it, is known
before the update begins. The update then waits for nothing: no count is exchanged and none is read back.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stablemoe_ds.config.schema import ParallelConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.errors import UserError
from stablemoe_ds.moe.plan import at_places, count_parts, plan_from_counts
from stablemoe_ds.moe.routing_pass import view_of
from stablemoe_ds.moe.tensor_split import split_tokens
from stablemoe_ds.routing.fixed import TableRouting
from stablemoe_ds.routing.routes import NOT_ROUTED, KnownRoutes
from stablemoe_ds.routing.source import routes_of
from stablemoe_ds.tables.expert_places import ExpertPlaces
from stablemoe_ds.tables.table import RoutingTable
from stablemoe_ds.training.routed_batch import RoutedBatch

AHEAD = 2
"""Updates planned before they are asked for."""
CLOSING_SECONDS = 10.0
"""How long to wait for the thread; it is only late if another rank is gone."""


class Planner:
    """Turns the loader's updates into planned ones, ``AHEAD`` of the trainer.

    Every rank plans the same number of updates, whenever it is closed: a thread that exchanges counts must never
    be left waiting for a rank that has stopped.
    """

    def __init__(
        self,
        steps: Iterator[list[Batch]],
        table: RoutingTable,
        groups: Groups,
        parallel: ParallelConfig,
        places: ExpertPlaces | None = None,
    ) -> None:
        """Collective. ``steps``: what the loader has still to give, one list of micro-batches an update.

        places: of the experts of the table's layers; None: by number.
        """
        self._steps, self._groups = steps, groups
        self._parts = parallel.dispatch_parts
        self._routing = TableRouting(table)
        layers, self._blocks = len(table.blocks), table.blocks
        self._places, self._place_of, placed = table.experts, [None] * layers, [b""] * layers
        if places is not None:
            self._places = places.expert_LY.shape[1]
            self._place_of = list(torch.from_numpy(places.places_for(groups.expert_rank)))
            placed = [expert_Y.tobytes() for expert_Y in places.expert_LY]
        split = b"" if table.split is None else table.split.row_JV.tobytes()
        self._tables = [
            _digest(layer_VK.tobytes() + split + at) for layer_VK, at in zip(table.expert_LVK, placed, strict=True)
        ]
        self._group = _expert_group_on_cpu(groups, parallel.timeout_minutes)
        self._ready: queue.Queue[list[RoutedBatch] | BaseException | None] = queue.Queue()
        self._state = threading.Condition()
        self._wanted, self._closing, self._unplanned = AHEAD, False, list[list[Batch]]()
        self._thread = threading.Thread(target=self._work, name="planner", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[RoutedBatch]]:
        """Planned updates. Raises what planning raised: UserError if ranks disagree on what they route."""
        while True:
            step = self._ready.get()
            if step is None:
                return
            if isinstance(step, BaseException):
                raise step
            with self._state:
                self._wanted += 1
                self._state.notify()
            yield step

    def close(self) -> Iterator[list[Batch]]:
        """Let the thread finish what all ranks have begun, and end it.

        The updates that it has taken and nobody has asked for, in their order; raises what planning raised after them.
        """
        with self._state:
            self._closing = True
            self._state.notify()
        self._thread.join(timeout=CLOSING_SECONDS)
        return self._rest()

    def _rest(self) -> Iterator[list[Batch]]:
        while not self._ready.empty():
            step = self._ready.get()
            if isinstance(step, BaseException):
                raise step
            if step is not None:
                yield [routed.batch for routed in step]
        yield from self._unplanned

    def _work(self) -> None:
        try:
            for number, batches in enumerate(self._steps):
                with self._state:
                    while number >= self._wanted:
                        if self._closing:
                            self._unplanned = [batches]
                            return
                        self._state.wait()
                self._ready.put(self._plan(number, batches))
            self._ready.put(None)
        except BaseException as error:  # whatever it is, it belongs to the thread that waits for a plan
            self._ready.put(error)

    def _plan(self, number: int, batches: list[Batch]) -> list[RoutedBatch]:
        """All plans of one update with one exchange of counts, for the layers that the table has."""
        routes = [self._routes(batch) for batch in batches]
        shares = [self._share(known) for known in routes]
        counted = [torch.stack([count_parts(e, self._places, self._parts) for e in layers]) for layers in shares]
        counts_GMLCY = self._exchange(number, batches, torch.stack(counted))
        rank = dist.get_rank(self._group) if self._group is not None else 0
        pin = self._groups.world.device.type == "cuda"
        planned = []
        for m, (batch, known) in enumerate(zip(batches, routes, strict=True)):
            plans = [plan_from_counts(e, counts_GMLCY[:, m, layer], rank) for layer, e in enumerate(shares[m])]
            routed = RoutedBatch(batch, known, dict(zip(self._blocks, plans, strict=True)))
            planned.append(routed.pin() if pin else routed)
        return planned

    @property
    def _tensor_group(self) -> dist.ProcessGroup | None:
        return self._groups.placement.tensor_group

    def _share(self, known: KnownRoutes) -> list[Tensor]:
        """Where this rank's share of the tokens goes, by layer of the table: places of experts."""
        chosen = zip(known.values(), self._place_of, strict=True)
        return [at_places(split_tokens(expert_TK, self._tensor_group), place_N) for expert_TK, place_N in chosen]

    def _routes(self, batch: Batch) -> KnownRoutes:
        known, real_T1 = routes_of(view_of(batch), self._routing), batch.real_T[:, None]
        return {block: torch.where(real_T1, expert_TK, NOT_ROUTED) for block, expert_TK in known.items()}

    def _exchange(self, number: int, batches: list[Batch], counts_MLCY: Tensor) -> Tensor:
        """Counts of every rank of the expert-parallel group, int64 [G, M, L, C, Y].

        With them travels what must be equal: how many updates were planned, the routing of each layer, and among ranks
        that share sequences (tensor and sequence parallelism) their ids. Raises UserError on every rank if it is not.
        """
        if self._group is None:
            return counts_MLCY[None]
        ids = _digest(torch.stack([batch.whole_ids for batch in batches]).numpy().tobytes())
        head = torch.tensor([number, self._groups.reading_rank, ids, *self._tables])
        mine = torch.cat([head, counts_MLCY.reshape(-1)])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, mine, group=self._group)
        counts_GMLCY = torch.stack([part[len(head) :].view_as(counts_MLCY) for part in parts])
        self._compare([part[: len(head)].tolist() for part in parts], counts_GMLCY)
        return counts_GMLCY

    def _compare(self, heads: list[list[int]], counts_GMLCY: Tensor) -> None:
        """Raise UserError unless all ranks plan the same update alike; ``heads``: what came before their counts."""
        first_of_reader: dict[int, tuple[int, int]] = {}
        for rank, (update, reading_rank, ids, *tables) in enumerate(heads):
            if update != heads[0][0]:
                self._refuse(0, rank, f"plan different updates, {heads[0][0]} and {update}", counts_GMLCY)
            for layer, (table, expected) in enumerate(zip(tables, heads[0][3:], strict=True)):
                if table != expected:
                    at = f"the MoE layer at block {self._blocks[layer]}"
                    what = f"route {at} by different tables or place its experts differently"
                    self._refuse(0, rank, what, counts_GMLCY[:, :, layer : layer + 1])
            other, expected = first_of_reader.setdefault(reading_rank, (rank, ids))
            if ids != expected:
                self._refuse(other, rank, "should have the same batch and have not", counts_GMLCY)

    def _refuse(self, first: int, second: int, what: str, counts_GMLCY: Tensor) -> None:
        """Raise UserError naming two ranks of the group, and the rows each has to send by MoE layer."""
        names = dist.get_process_group_ranks(self._group)
        rows = counts_GMLCY.sum((1, 3, 4)).tolist()
        raise UserError(
            f"ranks {names[first]} and {names[second]} {what} ({rows[first]} and {rows[second]} rows to send): "
            "were they started with the same configuration, data and checkpoint?"
        )


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "little")


def _expert_group_on_cpu(groups: Groups, timeout_minutes: float) -> dist.ProcessGroup | None:
    """A gloo group with the ranks of the expert-parallel group, for the planner's thread alone. Collective."""
    if groups.expert == 1:
        return None
    from megatron.core import parallel_state

    mine = dist.get_process_group_ranks(parallel_state.get_expert_model_parallel_group())
    everyone: list[Any] = [None] * groups.world.size
    dist.all_gather_object(everyone, mine)
    every_group = [list(ranks) for ranks in sorted({tuple(ranks) for ranks in everyone})]
    timeout = timedelta(minutes=timeout_minutes)
    group, _ = dist.new_subgroups_by_enumeration(every_group, timeout=timeout, backend="gloo")
    return group
