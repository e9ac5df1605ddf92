"""Who sends which token where: everything a dispatch needs, worked out before a token moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.routing.losses import count_tokens


@dataclass(frozen=True)
class DispatchPlan:
    """Orders and sizes of one layer's dispatch, seen from one rank of the expert-parallel group.

    order_A: int64 [A], the A routed (token, choice) pairs t * K + k, sorted by expert, stable in t.
    send_splits, recv_splits: rows to and from each rank of the group.
    arrival_R: int64 [R], where each of the R rows sorted by this rank's expert stands among the rows as they
        arrive (by sender, then expert); None without expert parallelism, where they arrive sorted.
    expert_splits: rows of each of this rank's experts; sums to R.
    group_total: routed (token, choice) pairs of all ranks of the group.
    """

    order_A: Tensor  # noqa: N815
    send_splits: list[int]
    recv_splits: list[int]
    arrival_R: Tensor | None  # noqa: N815
    expert_splits: list[int]
    group_total: int

    def map(self, change: Callable[[Tensor], Tensor]) -> DispatchPlan:
        """The same plan with each of its orders changed."""
        arrival_R = None if self.arrival_R is None else change(self.arrival_R)
        return replace(self, order_A=change(self.order_A), arrival_R=arrival_R)


def plan_dispatch(expert_TK: Tensor, experts: int, group: dist.ProcessGroup | None) -> DispatchPlan:
    """Plan from routes, exchanging counts with the group. Waits for the device once.

    expert_TK: int64 [T, K], negative where not routed. group: expert-parallel group, None for a single rank.
    Rank r of the group holds experts [r * n, (r + 1) * n), n = experts / group size.
    """
    counts_N = count_tokens(expert_TK, experts)
    if group is None:
        return plan_from_counts(expert_TK, counts_N[None], 0)
    counts_RN = counts_N.new_empty(dist.get_world_size(group) * experts)
    dist.all_gather_into_tensor(counts_RN, counts_N, group=group)
    return plan_from_counts(expert_TK, counts_RN.view(-1, experts), dist.get_rank(group))


def plan_from_counts(expert_TK: Tensor, counts_RN: Tensor, rank: int) -> DispatchPlan:
    """Plan once the counts of every rank are known.

    expert_TK: int64 [T, K] of this rank. counts_RN: int64 [ranks, N], (token, choice) pairs of each rank by expert.
    """
    ranks = counts_RN.shape[0]
    counts_RRE = counts_RN.view(ranks, ranks, -1)
    counts = counts_RRE.tolist()  # [sender][receiver][receiver's expert]; on a GPU the one wait
    send_splits = [sum(row) for row in counts[rank]]
    recv = [counts[sender][rank] for sender in range(ranks)]
    recv_splits = [sum(row) for row in recv]
    expert_splits = [sum(column) for column in zip(*recv, strict=True)]
    # Negative entries sort to the front, where they are cut off.
    order = torch.argsort(expert_TK.reshape(-1), stable=True)
    arrival = None
    if ranks > 1:
        # Rows arrive by (sender, expert); a stable sort by expert groups them and keeps the senders in order.
        local_expert = torch.arange(len(expert_splits), device=order.device).repeat(ranks)
        received = counts_RRE[:, rank].reshape(-1)
        arrived_R = torch.repeat_interleave(local_expert, received, output_size=sum(recv_splits))
        arrival = torch.argsort(arrived_R, stable=True)
    return DispatchPlan(
        order_A=order[order.numel() - sum(send_splits) :],
        send_splits=send_splits,
        recv_splits=recv_splits,
        arrival_R=arrival,
        expert_splits=expert_splits,
        group_total=sum(sum(map(sum, sender)) for sender in counts),
    )


@dataclass(frozen=True)
class RoutedBatch:
    """A micro-batch with all that is known of its routing before the step begins.

    fixed_LTK: int64 [L, T, K], None where the learned routers decide. plans: one a MoE layer, None where each
    layer has to make its own in the step.
    """

    batch: Batch
    fixed_LTK: Tensor | None = None  # noqa: N815
    plans: tuple[DispatchPlan, ...] | None = None

    def to(self, device: torch.device | str) -> RoutedBatch:
        """The same on another device, copied without waiting where memory is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> RoutedBatch:
        """The same in pinned memory, from where a GPU copies while it computes."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> RoutedBatch:
        """The same with every tensor in it changed."""
        fixed_LTK = None if self.fixed_LTK is None else change(self.fixed_LTK)
        plans = None if self.plans is None else tuple(plan.map(change) for plan in self.plans)
        return RoutedBatch(self.batch.map(change), fixed_LTK, plans)
