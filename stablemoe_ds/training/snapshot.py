"""A copy in host memory of what this rank writes into a checkpoint.

A tensor is written by the rank that ZeRO has given its fp32 state to, so that most are copied and never sent. Only
those that lie across a border between two ranks, and the cut ones of tensor parallelism, are gathered; one at a time.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from stablemoe_ds.model.layout import Piece, pieces
from stablemoe_ds.training.engine import Engine
from stablemoe_ds.training.masters import MOMENTS, WEIGHT, Masters


class Snapshot:
    """Takes copies of an engine's state, into the same memory each time: 12 bytes a parameter over all ranks."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._masters = engine, Masters(engine.deepspeed)
        self._host: dict[str, Tensor] = {}
        self._plan: list[list[Piece]] = []

    @property
    def optimizer_steps(self) -> int:
        return self._masters.steps

    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights by name, and moments by name/moment, that this rank is to write. Collective.

        Valid until the next call.
        """
        groups, model = self._engine.groups, self._engine.model
        if not self._plan:
            self._masters.find_holders(model.parameters())
            rows = groupby(pieces(model, groups.tensor), key=lambda piece: id(piece.parameter))
            self._plan = [list(own) for _, own in rows]
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for number, own in enumerate(self._plan):
            for key in (WEIGHT, *MOMENTS):
                value = self._share(number, own, key)
                if value is None:
                    continue
                kept = self._keep(f"{own[0].name}/{key}", value)
                if key == WEIGHT:
                    weights |= {piece.name: piece.select(kept) for piece in own}
                else:
                    moments |= {f"{piece.name}/{key}": piece.select(kept) for piece in own}
        if groups.world.is_main:
            weights |= {name: self._keep(name, value) for name, value in model.router_state().items()}
        if groups.world.device.type == "cuda":
            torch.cuda.synchronize()
        return weights, moments

    def _keep(self, name: str, value: Tensor) -> Tensor:
        if name not in self._host:
            self._host[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
        return self._host[name].copy_(value, non_blocking=True)

    def _share(self, number: int, own: list[Piece], key: str) -> Tensor | None:
        """The pieces of a parameter together, whole, if this rank is to write them. Collective.

        number: of the parameter in the model; turns ranks into writers one after the other.
        """
        groups, masters, parameter = self._engine.groups, self._masters, own[0].parameter
        me, copies = groups.data_rank, groups.data_size
        if own[0].is_expert:
            me, copies = groups.expert_data_rank, groups.world.size // groups.expert
        holders = masters.holders(parameter)
        writer = holders[0] if len(holders) == 1 else number % copies
        if len(holders) > 1:
            local = masters.read(parameter, key)
        elif me == writer:
            local = masters.view(parameter, key)
        if me != writer:
            return None
        if own[0].is_expert:
            return local
        if own[0].cut_dim is not None:
            parts = [torch.empty_like(local) for _ in range(groups.tensor)]
            dist.all_gather(parts, local.contiguous(), group=groups.tensor_group)
            local = own[0].whole_of(parts)
        return local if groups.tensor_rank == number % groups.tensor else None
