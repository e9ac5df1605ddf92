"""Who sends which token where: everything a dispatch needs, worked out before a token moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from stablemoe_ds.moe.expert_offsets import ExpertOffsets
from stablemoe_ds.routing.losses import count_tokens


@dataclass(frozen=True)
class DispatchPlan:
    """Orders and sizes of one dispatch, seen from one rank of the expert-parallel group.

    order_A: int64 [A], the A routed (token, choice) pairs t * K + k, sorted by the place of their expert, stable in t.
    position_TK: int64 [T, K], where each pair stands in ``order_A``; negative where not routed.
    send_splits, recv_splits: rows to and from each rank of the group.
    arrival_R: int64 [R], where each of the R rows sorted by this rank's expert stands among the rows as they
        arrive (by sender, then expert); None without expert parallelism, where they arrive sorted.
    departure_R: int64 [R], its inverse.
    offsets: rows of each of this rank's experts, R in all.
    group_total: routed (token, choice) pairs of all ranks of the group.
    """

    order_A: Tensor  # noqa: N815
    position_TK: Tensor  # noqa: N815
    send_splits: list[int]
    recv_splits: list[int]
    arrival_R: Tensor | None  # noqa: N815
    departure_R: Tensor | None  # noqa: N815
    offsets: ExpertOffsets
    group_total: int

    def map(self, change: Callable[[Tensor], Tensor]) -> DispatchPlan:
        """The same plan with each of its tensors changed."""
        return replace(
            self,
            order_A=change(self.order_A),
            position_TK=change(self.position_TK),
            arrival_R=None if self.arrival_R is None else change(self.arrival_R),
            departure_R=None if self.departure_R is None else change(self.departure_R),
            offsets=self.offsets.map(change),
        )


LayerPlan = tuple[DispatchPlan, ...]
"""The dispatches of one MoE layer: one for each part that a micro-batch is cut into, in the order of its tokens."""


def plan_dispatch(place_TK: Tensor, places: int, group: dist.ProcessGroup | None, parts: int = 1) -> LayerPlan:
    """Plan from routes, exchanging counts with the group. Waits for the device once.

    place_TK: int64 [T, K], where the experts of tokens stand (:func:`at_places`), which is their numbers unless they
    are placed by load; negative where not routed. places: of all ranks. group: expert-parallel group, None for a single
    rank. Rank r of the group has places [r * n, (r + 1) * n), n = places / group size. parts: see :func:`cut`.
    """
    counts_CY = count_parts(place_TK, places, parts)
    if group is None:
        return plan_from_counts(place_TK, counts_CY[None], 0)
    counts_GCY = counts_CY.new_empty(dist.get_world_size(group), *counts_CY.shape)
    dist.all_gather_into_tensor(counts_GCY.view(-1), counts_CY.view(-1), group=group)
    return plan_from_counts(place_TK, counts_GCY, dist.get_rank(group))


def at_places(expert_TK: Tensor, place_N: Tensor | None) -> Tensor:
    """int64 [T, K]: where the experts of tokens stand, which is what a dispatch is planned by.

    place_N: int64 [N], the place of each expert for the tokens of this rank
    (:meth:`~stablemoe_ds.tables.expert_places.ExpertPlaces.places_for`). None: an expert stands at its number. What is
    negative stays so.
    """
    if place_N is None:
        return expert_TK
    return torch.where(expert_TK < 0, expert_TK, place_N[expert_TK.clamp_min(0)])


def cut(rows: Tensor, parts: int) -> tuple[Tensor, ...]:
    """[T, ...] in ``parts`` consecutive parts of about equal size, empty ones where there are too few rows."""
    return rows.tensor_split(parts)


def count_parts(place_TK: Tensor, places: int, parts: int) -> Tensor:
    """int64 [C, Y]: (token, choice) pairs of each part by place."""
    return torch.stack([count_tokens(part, places) for part in cut(place_TK, parts)])


def plan_from_counts(place_TK: Tensor, counts_GCY: Tensor, rank: int) -> LayerPlan:
    """Plan once the counts of every rank are known.

    place_TK: int64 [T, K] of this rank. counts_GCY: int64 [G, C, Y], :func:`count_parts` of each rank.
    """
    counts = counts_GCY.transpose(0, 1).tolist()  # on a GPU the one wait
    parts = cut(place_TK, len(counts))
    return tuple(_plan(part, counts_GCY[:, p], counts[p], rank) for p, part in enumerate(parts))


def _plan(place_TK: Tensor, counts_GY: Tensor, counts: list[list[int]], rank: int) -> DispatchPlan:
    """One dispatch. counts: ``counts_GY`` on the host."""
    ranks, held = len(counts), len(counts[0]) // len(counts)
    mine = slice(rank * held, (rank + 1) * held)
    send_splits = [sum(counts[rank][to * held : (to + 1) * held]) for to in range(ranks)]
    recv_splits = [sum(sender[mine]) for sender in counts]
    sizes = [sum(column) for column in zip(*(sender[mine] for sender in counts), strict=True)]
    received_GE = counts_GY[:, mine]
    # Negative entries sort to the front, where they are cut off.
    order = torch.argsort(place_TK.reshape(-1), stable=True)
    order_A = order[order.numel() - sum(send_splits) :]
    position_TK = torch.full_like(order, -1)
    position_TK[order_A] = torch.arange(order_A.numel(), device=order.device)
    arrival = departure = None
    if ranks > 1:
        # Rows arrive by (sender, expert); a stable sort by expert groups them and keeps the senders in order.
        expert_GE = torch.arange(held, device=order.device).repeat(ranks)
        arrived_R = torch.repeat_interleave(expert_GE, received_GE.reshape(-1), output_size=sum(recv_splits))
        arrival = torch.argsort(arrived_R, stable=True)
        departure = inverse(arrival)
    return DispatchPlan(
        order_A=order_A,
        position_TK=position_TK.view_as(place_TK),
        send_splits=send_splits,
        recv_splits=recv_splits,
        arrival_R=arrival,
        departure_R=departure,
        offsets=ExpertOffsets(sizes, received_GE.sum(0).cumsum(0, dtype=torch.int32)),
        group_total=sum(map(sum, counts)),
    )


def inverse(permutation: Tensor) -> Tensor:
    """The permutation that undoes this one."""
    out = torch.empty_like(permutation)
    out[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return out
