"""Who sends which token where: everything a dispatch needs, worked out before a token moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

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


def plan_dispatch(expert_TK: Tensor, experts: int, group: dist.ProcessGroup | None) -> DispatchPlan:
    """Plan from routes, exchanging counts with the group. Waits for the device once.

    expert_TK: int64 [T, K], negative where not routed. group: expert-parallel group, None for a single rank.
    Rank r of the group holds experts [r * n, (r + 1) * n), n = experts / group size.
    """
    counts_N = count_tokens(expert_TK, experts)
    flat = expert_TK.reshape(-1)
    # Negative entries sort to the front and are cut off below, once their number is known on the host.
    order = torch.argsort(flat, stable=True)
    if group is None:
        splits = counts_N.tolist()
        total = sum(splits)
        return DispatchPlan(order[flat.numel() - total :], [total], [total], None, splits, total)

    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    gathered = counts_N.new_empty(ranks * experts)
    dist.all_gather_into_tensor(gathered, counts_N, group=group)
    counts = gathered.view(ranks, ranks, -1).tolist()  # [sender][receiver][receiver's expert], the one wait
    send_splits = [sum(row) for row in counts[rank]]
    recv = [counts[sender][rank] for sender in range(ranks)]
    recv_splits = [sum(row) for row in recv]
    expert_splits = [sum(column) for column in zip(*recv, strict=True)]
    # Rows arrive by (sender, expert); a stable sort by expert groups them and keeps the senders in order.
    local_expert = torch.arange(len(expert_splits), device=order.device).repeat(ranks)
    received = gathered.view(ranks, ranks, -1)[:, rank].reshape(-1)
    arrived_R = torch.repeat_interleave(local_expert, received, output_size=sum(recv_splits))
    return DispatchPlan(
        order_A=order[flat.numel() - sum(send_splits) :],
        send_splits=send_splits,
        recv_splits=recv_splits,
        arrival_R=torch.argsort(arrived_R, stable=True),
        expert_splits=expert_splits,
        group_total=sum(sum(map(sum, sender)) for sender in counts),
    )
