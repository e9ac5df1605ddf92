"""What every update of a run asks of every rank, worked out on one core from data order, table and placement alone.

Where routes are a table, the rows that each expert serves and each pair of ranks exchanges follow from the token ids.
Nothing here needs a process group or a model: sequences are dealt as :class:`Deal` deals them, cut over tensor ranks
and into parts as a layer cuts them, looked up and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stablemoe_ds.config.resolved import ResolvedRun
from stablemoe_ds.data.blend import content
from stablemoe_ds.data.dataset import TrainDataset
from stablemoe_ds.data.loader import Deal
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.data.training_data import TrainingData
from stablemoe_ds.moe.plan import cut
from stablemoe_ds.moe.tensor_split import share_of
from stablemoe_ds.tables.expert_places import ExpertPlaces
from stablemoe_ds.tables.table import RoutingTable

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of one value of a row."""


@dataclass(frozen=True)
class Layout:
    """Which rank is where.

    ranks: W, all processes. expert: G, ranks that share a set of experts; group x has ranks [x * G, (x + 1) * G), and
    rank r is number r mod G of its group. nodes: each with as many consecutive
    ranks. row_bytes: of one row of the residual stream. trips: how often a row travels in an update: there and back,
    its gradient there and back, and there and back once more where activations are recomputed. places: of
    the experts of each layer; None: by number.
    """

    ranks: int
    expert: int
    nodes: int
    row_bytes: int
    trips: int
    places: ExpertPlaces | None = None

    @classmethod
    def of(cls, resolved: ResolvedRun, nodes: int, load_LN: NDArray[np.float64]) -> Layout:
        """The layout of a run. load_LN: float64 [L, N], of its table on the training text.

        Raises ValueError if nodes would have unequal numbers of ranks.
        """
        run, ranks = resolved.run, resolved.world_size
        if ranks % nodes:
            raise ValueError(f"{ranks} ranks cannot be divided over {nodes} nodes")
        row_bytes = run.model.hidden_size * BYTES[run.precision.dtype]
        trips, parallel, places = 6 if run.parallel.recompute else 4, run.parallel, None
        if parallel.places_by_load:
            places = ExpertPlaces.by_load(load_LN, parallel.expert, parallel.replicated_experts)
        return cls(ranks, parallel.expert, nodes, row_bytes, trips, places)

    @property
    def across_XGG(self) -> NDArray[np.bool_]:  # noqa: N802
        """bool [X, G, G]: whether sender and receiver of a group are on different nodes."""
        node_XG = np.arange(self.ranks).reshape(-1, self.expert) // (self.ranks // self.nodes)
        return node_XG[:, :, None] != node_XG[:, None, :]


@dataclass(frozen=True)
class SimulatedUpdate:
    """One update.

    served_LWE: int64 [L, W, E], rows that each expert of each rank serves, over all micro-batches, in the order of
    their places (0 where no expert is). sent_LXGG: int64 [L, X, G, G], rows by sender and receiver within each group.
    most_rows: that one rank serves at once, in one dispatch. capacity: the smallest factor with which no dispatch drops
    a row. idle: share of the time that ranks wait for the busiest of their group, if the time of a dispatch follows its
    rows. inside, between: bytes that travel between ranks of one node, and of different ones. busiest_pair: bytes
    between the two ranks that exchange most.
    """

    number: int
    served_LWE: NDArray[np.int64]  # noqa: N815
    sent_LXGG: NDArray[np.int64]  # noqa: N815
    most_rows: int
    capacity: float
    idle: float
    inside: int
    between: int
    busiest_pair: int

    @property
    def busiest_rank(self) -> int:
        """Rows of the rank that serves most, over all layers."""
        return int(self.served_LWE.sum((0, 2)).max())


def simulate(
    resolved: ResolvedRun, table: RoutingTable, layout: Layout, updates: range, tokenizer: Tokenizer | None
) -> Iterator[SimulatedUpdate]:
    """Updates of a run that follows ``table`` in them, counted from 1; one at a time is in memory.

    Raises UserError for a corpus that is missing, damaged or of another tokenizer.
    """
    run, plan = resolved.run, resolved.batch
    data = TrainingData(run, plan, 0, 1, tokenizer)
    for info in data.infos:
        info.verify()
    dataset = TrainDataset({content(info): info.prefix for info in data.infos})
    # Which sequences of an update each micro-batch of each rank has: [data ranks, micro-batches, B].
    deals = [Deal(plan.micro_batch, plan.accumulation, rank, plan.data_parallel) for rank in range(plan.data_parallel)]
    dealt = np.array([deal.share(range(plan.sequences_per_step)) for deal in deals])
    dealt = dealt.reshape(plan.data_parallel, plan.accumulation, plan.micro_batch)
    position = data.start().skip((updates.start - 1) * plan.sequences_per_step)
    for number in updates:
        windows, position = position.take(plan.sequences_per_step)
        sequences = np.stack([dataset[window]["tokens"].numpy() for window in windows])
        rows = tokens_of_ranks(table.rows(sequences)[dealt], plan.sequence)
        counts = count_dispatches(rows, table, run.parallel.tensor, run.parallel.dispatch_parts)
        yield judge_update(number, counts, layout)


def tokens_of_ranks(rows: NDArray[np.integer], parts: int) -> NDArray[np.integer]:
    """Integers [data ranks, M, T]: the tokens of each data rank, of which ``parts`` in a row share sequences.

    rows: integers [groups of such ranks, M, B, S], of each token its row in the table. Tokens of a micro-batch stand
    sequence first, t = s * B + b.
    """
    readers, micro_batches, sequences, length = rows.shape
    cut_up = rows.reshape(readers, micro_batches, sequences, parts, length // parts)
    return cut_up.transpose(0, 3, 1, 4, 2).reshape(readers * parts, micro_batches, -1)


def count_dispatches(rows: NDArray[np.integer], table: RoutingTable, tensor: int, parts: int) -> NDArray[np.int64]:
    """int64 [L, W, M, C, N]: (token, choice) pairs of each rank, micro-batch and part by expert.

    rows: integers [data ranks, M, T], of each token its row in the table. tensor: ranks that share a batch; W = data
    ranks * tensor, and rank r has the share r mod tensor of the batch of data rank r // tensor.
    """
    data_ranks, micro_batches, tokens = rows.shape
    segment_T = np.empty(tokens, np.int64)
    for rank in range(tensor):
        start, end, _ = share_of(tokens, rank, tensor)
        for part, own in enumerate(cut(torch.arange(start, end), parts)):
            segment_T[own.numpy()] = rank * parts + part
    segments, experts = tensor * parts, table.experts
    batches = np.arange(data_ranks * micro_batches).reshape(data_ranks, micro_batches)
    first_bin = (batches[:, :, None] * segments + segment_T) * experts
    counted = []
    for expert_VK in table.expert_LVK:
        bins = sum(
            np.bincount((first_bin + expert_V[rows]).reshape(-1), minlength=batches.size * segments * experts)
            for expert_V in expert_VK.T
        )
        by_rank = np.asarray(bins).reshape(data_ranks, micro_batches, tensor, parts, experts).swapaxes(1, 2)
        counted.append(by_rank.reshape(data_ranks * tensor, micro_batches, parts, experts))
    return np.stack(counted)


def judge_update(number: int, counts_LWMCN: NDArray[np.int64], layout: Layout) -> SimulatedUpdate:
    """What the counts of :func:`count_dispatches` mean for ranks and links."""
    layers, ranks, micro_batches, parts, experts = counts_LWMCN.shape
    size, groups = layout.expert, ranks // layout.expert
    counts_LXGMCN = counts_LWMCN.reshape(layers, groups, size, micro_batches, parts, experts)
    chosen = counts_LXGMCN.sum(2)  # [L, X, M, C, N]
    routed = np.maximum(chosen.sum(-1), 1)
    # By group and sender, and by receiver and its experts.
    counts = _by_place(counts_LXGMCN, layout.places).reshape(layers, groups, size, micro_batches, parts, size, -1)
    arrived = counts.sum(2)  # [L, X, M, C, G, E]
    rows = arrived.sum(-1)  # of each receiver, at once
    sent_LXGG = counts.sum((3, 4, 6))
    bytes_XGG = sent_LXGG.sum(0) * layout.row_bytes * layout.trips
    apart = ~np.eye(size, dtype=bool)
    across_XGG = layout.across_XGG
    waited = size * int(rows.max(-1).sum())
    return SimulatedUpdate(
        number,
        arrived.sum((2, 3)).reshape(layers, ranks, -1),
        sent_LXGG,
        int(rows.max()),
        float((chosen.max(-1) * experts / routed).max()),
        1 - int(rows.sum()) / waited if waited else 0.0,
        int(bytes_XGG[~across_XGG & apart].sum()),
        int(bytes_XGG[across_XGG].sum()),
        # A row goes one way and comes back the other, so a pair carries what both of it have sent.
        int(((bytes_XGG + bytes_XGG.swapaxes(1, 2)) * apart).max()),
    )


def _by_place(counts_LXGMCN: NDArray[np.int64], places: ExpertPlaces | None) -> NDArray[np.int64]:
    """int64 [L, X, G, M, C, Y]: what each sender of a group sends to each place."""
    if places is None:
        return counts_LXGMCN
    expert_LGY = np.stack([places.experts_for(rank) for rank in range(places.ranks)], axis=1)
    # NO_EXPERT, the last index, is then one without tokens.
    padded = np.concatenate([counts_LXGMCN, np.zeros_like(counts_LXGMCN[..., :1])], axis=-1)
    return np.take_along_axis(padded, expert_LGY[:, None, :, None, None], axis=-1)
