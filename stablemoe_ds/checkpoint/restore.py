"""Choosing a checkpoint to continue from, and loading it into a model under any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stablemoe_ds.checkpoint.fp32_state import MOMENTS, WEIGHT, Fp32State
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.checkpoint.state import TrainingState
from stablemoe_ds.config.schema import CheckpointConfig
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.errors import UserError
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.model.layout import pieces, shape_of
from stablemoe_ds.run_directory.checkpoint_files import DamagedError, check_hashes, saved_checkpoints


@dataclass(frozen=True)
class Found:
    """A checkpoint to continue from. warning: why it is not the newest."""

    checkpoint: Checkpoint
    warning: str | None = None


def find_checkpoint(run_dir: str, model: StableMoEGPT, groups: Groups, config: CheckpointConfig) -> Found | None:
    """The newest sound checkpoint of a run; None if there is no checkpoint at all. Collective, the same on all ranks.

    Each rank reads a part of the files to check them (``config.verify``). Raises UserError if the newest is damaged
    and ``config.fallback`` is off, if none is sound, or if the newest is not of this model.
    """
    paths = _from_main(saved_checkpoints(run_dir) if groups.world.is_main else [], groups)
    complaint, refused = "", False
    for path in paths:
        checkpoint, fault = _examine(path, model, groups, config.verify == "hash")
        if fault is None:
            assert checkpoint is not None
            if not complaint:
                return Found(checkpoint)
            if config.fallback and not refused:
                return Found(checkpoint, f"{complaint}; continuing from {path.name} instead")
            raise UserError(
                f"{complaint}; the newest intact one before it is {path}: to continue from it, move the other away"
                + ("" if refused else ", or set checkpoint.fallback=true")
            )
        if not complaint:
            complaint, refused = str(fault), not isinstance(fault, DamagedError)
    if complaint:
        raise UserError(
            f"{complaint}; no other checkpoint in {run_dir} is usable: start over in a new run_dir, or with "
            "checkpoint.resume=false"
        )
    return None


def _examine(
    path: Path, model: StableMoEGPT, groups: Groups, hashes: bool
) -> tuple[Checkpoint | None, UserError | None]:
    """Open a checkpoint and check it against its manifest and the model; all ranks report the first rank's error."""
    world, checkpoint, fault = groups.world, None, None
    try:
        checkpoint = Checkpoint.at(path)
        if hashes:
            check_hashes(path, checkpoint.manifest, checkpoint.files[world.rank :: world.size])
        for piece in pieces(model, groups.tensor):
            checkpoint.check_shape(piece.name, piece.shape)
    except UserError as error:
        fault = error
    if world.size == 1:
        return checkpoint, fault
    faults: list[Any] = [None] * world.size
    dist.all_gather_object(faults, fault)
    return checkpoint, next((fault for fault in faults if fault is not None), None)


def _from_main(value: list[Path], groups: Groups) -> list[Path]:
    if groups.world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=groups.world.device)
    return box[0]


def restore(state: TrainingState, checkpoint: Checkpoint) -> None:
    """Load weights, master weights and moments into a model in training, under any layout."""
    fp32, groups = Fp32State(state.deepspeed), state.groups
    fp32.prepare(state.model.parameters(), checkpoint.optimizer_steps)
    # A converted checkpoint has made no update: its moments are zero and are not stored.
    for key in (WEIGHT, *MOMENTS) if checkpoint.optimizer_steps else (WEIGHT,):
        for parameter, value in _local_tensors(state.model, groups, checkpoint, key):
            fp32.write(parameter, key, value.to(parameter.device))
    _load_router_state(state.model, checkpoint)
    if checkpoint.loss_scale is not None and state.run.precision.dtype == "fp16":
        state.optimizer.loss_scaler.cur_scale = checkpoint.loss_scale


@torch.no_grad()
def load_weights(model: StableMoEGPT, groups: Groups, checkpoint: Checkpoint) -> None:
    """Load weights alone, for evaluation and generation. Raises UserError if they are not what was written."""
    if checkpoint.run.checkpoint.verify == "hash":
        checkpoint.check_content(moments=False)
    for parameter, value in _local_tensors(model, groups, checkpoint, WEIGHT):
        parameter.copy_(value)
    _load_router_state(model, checkpoint)


def _load_router_state(model: StableMoEGPT, checkpoint: Checkpoint) -> None:
    for name, buffer in model.router_state().items():
        buffer.copy_(checkpoint.read(name, WEIGHT, tuple(buffer.shape)))


def _local_tensors(
    model: StableMoEGPT, groups: Groups, checkpoint: Checkpoint, key: str
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Each local parameter with its values from the checkpoint, one in memory at a time; experts are stacked."""
    for _, held in groupby(pieces(model, groups.tensor), key=lambda piece: id(piece.parameter)):
        rows = list(held)
        # Zeros stay at places without an expert.
        parameter, value = rows[0].parameter, torch.zeros(shape_of(rows[0].parameter))
        for piece in rows:
            whole = checkpoint.read(piece.name, key, piece.shape)
            piece.select(value).copy_(piece.local_of(whole, groups.tensor_rank, groups.tensor))
        yield parameter, value
