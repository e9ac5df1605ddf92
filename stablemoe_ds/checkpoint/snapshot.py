"""A copy in host memory of what this rank writes into a checkpoint.

A tensor is written by the rank that ZeRO has given its fp32 state to, so that most are copied and never sent. They
are copied as Adam keeps them, neighbours at once, and separated in the copy. Only tensors that lie across a border
between two ranks, and the cut ones of tensor parallelism, are gathered; one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stablemoe_ds.checkpoint.fp32_state import MOMENTS, WEIGHT, Fp32State, Stretch
from stablemoe_ds.checkpoint.state import TrainingState
from stablemoe_ds.model.layout import Piece, pieces, shape_of

KEYS = (WEIGHT, *MOMENTS)


@dataclass(frozen=True)
class _Share:
    """This rank's part in writing one parameter.

    pieces: a row for each local expert, or the one that the parameter is. split: several replicas hold parts of its
    fp32 state. writer: this replica puts it together. mine: this rank writes it.
    """

    pieces: list[Piece]
    split: bool
    writer: bool
    mine: bool

    @property
    def parameter(self) -> nn.Parameter:
        return self.pieces[0].parameter

    @property
    def gathered(self) -> bool:
        """Whether no rank has all of it by itself."""
        return self.split or self.pieces[0].cut_dim is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is written: whole, but experts still stacked."""
        return shape_of(self.parameter) if self.pieces[0].is_expert else self.pieces[0].shape


class Snapshot:
    """Takes copies of a model in training, into the same memory each time: 12 bytes a parameter over all ranks."""

    def __init__(self, state: TrainingState) -> None:
        """Plan what is copied where, and set memory aside. Collective."""
        self._state, self._fp32, self._device = state, Fp32State(state.deepspeed), state.groups.world.device
        self._fp32.find_holders(state.model.parameters())
        self._weights: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}
        # Not counted among those that have pieces: on a rank without an expert at its place, one has none.
        number = {id(parameter): at for at, parameter in enumerate(state.model.parameters())}
        rows = groupby(pieces(state.model, state.groups.tensor), key=lambda piece: id(piece.parameter))
        shares = [self._share(number[key], list(own)) for key, own in rows]
        self._blocks = self._plan_blocks(share for share in shares if share.mine and not share.gathered)
        self._gathered = [
            (share, self._room(*share.shape) if share.mine else None)
            for share in shares
            if share.split or (share.gathered and share.writer)
        ]
        for share, room in self._gathered:
            if room is not None:
                self._name(share, room)
        self._buffers: dict[str, Tensor] = {}
        if state.groups.world.is_main:
            self._buffers = {name: b.to("cpu", copy=True) for name, b in state.model.router_state().items()}
            self._weights |= self._buffers

    @property
    def optimizer_steps(self) -> int:
        return self._fp32.steps

    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights by name, and moments by name/moment, that this rank is to write. Collective.

        Valid until the next call.
        """
        for held, start, host in self._blocks:
            for row, key in zip(host, KEYS, strict=True):
                row.copy_(self._fp32.live(held, key)[start : start + len(row)], non_blocking=True)
        for share, room in self._gathered:
            for index, key in enumerate(KEYS):
                value = self._gather(share, key)
                if room is not None:
                    room[index].copy_(value, non_blocking=True)
        if self._buffers:
            for name, buffer in self._state.model.router_state().items():
                self._buffers[name].copy_(buffer)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return self._weights, self._moments

    def _share(self, number: int, own: list[Piece]) -> _Share:
        """number: of the parameter in the model; turns ranks into writers one after the other."""
        groups = self._state.groups
        me, copies = groups.among_copies(own[0].parameter)
        holders = self._fp32.holders(own[0].parameter)
        writer = me == (holders[0] if len(holders) == 1 else number % copies)
        alone = own[0].is_expert or groups.tensor_rank == number % groups.tensor
        return _Share(own, len(holders) > 1, writer, writer and alone)

    def _plan_blocks(self, shares: Iterable[_Share]) -> list[tuple[Tensor, int, Tensor]]:
        """What lies side by side in a tensor that Adam works on: that tensor, where it begins, the copy [3, length]."""
        placed: list[tuple[Stretch, _Share]] = []
        for share in shares:
            stretch = self._fp32.stretch(share.parameter)
            assert stretch is not None, "what is not gathered is held by who writes it"
            placed.append((stretch, share))
        placed.sort(key=lambda pair: (id(pair[0].held), pair[0].at))
        runs: list[list[tuple[Stretch, _Share]]] = []
        for stretch, share in placed:
            before = runs[-1][-1][0] if runs else None
            if before is None or before.held is not stretch.held or before.at + before.numel != stretch.at:
                runs.append([])
            runs[-1].append((stretch, share))
        blocks = []
        for run in runs:
            held, start = run[0][0].held, run[0][0].at
            host = self._room(sum(stretch.numel for stretch, _ in run))
            for stretch, share in run:
                own = host[:, stretch.at - start :][:, : stretch.numel]
                self._name(share, own.view(len(KEYS), *share.shape))
            blocks.append((held, start, host))
        return blocks

    def _room(self, *shape: int) -> Tensor:
        """Host memory for a tensor of this shape under each key."""
        return torch.empty(len(KEYS), *shape, pin_memory=self._device.type == "cuda")

    def _name(self, share: _Share, room: Tensor) -> None:
        """What is copied here will be written under these names."""
        for piece in share.pieces:
            self._weights[piece.name] = piece.select(room[0])
            self._moments |= {f"{piece.name}/{key}": piece.select(room[1 + at]) for at, key in enumerate(MOMENTS)}

    def _gather(self, share: _Share, key: str) -> Tensor:
        """A weight or moment from the ranks that hold parts of it: whole on those that write it. Collective."""
        local = (self._fp32.read if share.split else self._fp32.view)(share.parameter, key)
        piece, groups = share.pieces[0], self._state.groups
        if piece.cut_dim is None or not share.writer:
            return local
        local = local.to(self._device)  # from host memory, where it was offloaded to
        parts = [torch.empty_like(local) for _ in range(groups.tensor)]
        dist.all_gather(parts, local, group=groups.tensor_group)
        return piece.whole_of(parts)
