"""Checkpoints keyed by what things are: parameter name and global expert id, never rank or layout.

They load into any data, expert or tensor parallel degree and any ZeRO stage; nothing in them is executed.
:mod:`stablemoe_ds.run_directory.checkpoint_files` has the files, :mod:`.saver` writes them, :mod:`.restore` brings
them into a model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stablemoe_ds.checkpoint.fp32_state import WEIGHT
from stablemoe_ds.config.messages import error_messages
from stablemoe_ds.config.resolved import saved_run
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.position import Position
from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.checkpoint_files import (
    CHECKPOINTS,
    MANIFEST,
    DamagedError,
    check_hashes,
    check_sizes,
    find_checkpoint,
    read_manifest,
    saved_in,
)
from stablemoe_ds.tables.table import RoutingTable

TABLE = "routing_table.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    step: updates made. stage: 1 or 2. switched_at: first update of stage 2. samples: training sequences consumed,
    whatever their length. position: where in the data it goes on; without a corpus in checkpoints up to 0.1.0.
    """

    step: int = 0
    stage: int = 1
    switched_at: int | None = None
    samples: int = 0
    position: Position = field(default_factory=Position)

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Progress:
        """From what a manifest says. Raises TypeError or ValueError if that is something else."""
        return cls(**{**fields, "position": Position.parse(fields.get("position", {}))})


def weights_file(part: str) -> str:
    """Name of the file with the weights that one rank wrote; ``part``: its number."""
    return f"weights-{part}.safetensors"


def moments_file(part: str) -> str:
    return f"moments-{part}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; tensors are read when asked for.

    tensors: the part each tensor is in, by canonical name. started_in: the directory training was started in, "" if
    it is not known. manifest: all that the checkpoint says of itself.
    """

    path: Path
    progress: Progress
    run: RunConfig
    vocab_size: int
    tokenizer: str
    optimizer_steps: int
    tensors: dict[str, str]
    loss_scale: float | None
    started_in: str
    manifest: dict[str, Any] = field(repr=False)
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint directory, or the newest one of a run directory or of a folder of checkpoints.

        Sizes are checked, content is not.

        Raises UserError if there is none, or if it is damaged or of another format; it names the newest sound one.
        """
        path = find_checkpoint(path)
        try:
            return cls.at(path)
        except DamagedError as error:
            raise UserError(f"{error}; {advice(path)}") from error

    @classmethod
    def at(cls, path: Path) -> Checkpoint:
        """Open this directory. Raises DamagedError, or UserError if its settings or format are unknown here."""
        manifest = read_manifest(path)
        try:
            check_sizes(path, manifest)
            return cls(
                path=path,
                progress=Progress.parse(manifest["progress"]),
                run=saved_run(manifest["run"]),
                vocab_size=manifest["vocab_size"],
                tokenizer=manifest["tokenizer"],
                optimizer_steps=manifest["optimizer_steps"],
                tensors=manifest["tensors"],
                loss_scale=manifest["loss_scale"],
                started_in=manifest.get("started_in", ""),
                manifest=manifest,
            )
        except ValidationError as error:
            raise UserError(error_messages(error, lambda _: str(path / MANIFEST))) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"cannot read {path / MANIFEST}: {error!r}") from error

    @property
    def files(self) -> list[str]:
        """Names of its files, without the manifest."""
        return list(self.manifest["files"])

    @property
    def run_directory(self) -> Path | None:
        """The run directory it lies in; None if it was copied out of one."""
        folder = Path(os.path.abspath(self.path)).parent  # links are kept: checkpoints/ may be one to a larger disk
        return folder.parent if folder.name == CHECKPOINTS else None

    def check_content(self, moments: bool = True) -> None:
        """Read every byte. Raises UserError if one is not what was written, naming the newest sound checkpoint.

        moments: False leaves them out, for callers that need only weights and table.
        """
        names = [name for name in self.files if moments or not name.startswith("moments-")]
        try:
            check_hashes(self.path, self.manifest, names)
        except DamagedError as error:
            raise UserError(f"{error}; {advice(self.path)}") from error

    def read(self, tensor: str, key: str = WEIGHT, shape: tuple[int, ...] | None = None) -> Tensor:
        """A whole tensor by its canonical name, ``key`` of it: its weight or a moment.

        Raises UserError if it is missing, has another shape than ``shape`` or is not finite.
        """
        handle, name = self._place(tensor, key)
        try:
            value: Tensor = handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"checkpoint {self.path} is damaged: {name}: {error}") from error
        if shape is not None and tuple(value.shape) != shape:
            raise UserError(_misfit(self.path, tensor, tuple(value.shape), shape))
        if not torch.isfinite(value).all():
            raise UserError(f"checkpoint {self.path}: {tensor} ({key}) holds NaN or infinity; use an older checkpoint")
        return value

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Of a tensor, without reading its values. Raises UserError if it is missing."""
        handle, name = self._place(tensor, WEIGHT)
        try:
            return tuple(handle.get_slice(name).get_shape())
        except SafetensorError as error:
            raise DamagedError(f"checkpoint {self.path} is damaged: {name}: {error}") from error

    def check_shape(self, tensor: str, shape: tuple[int, ...]) -> None:
        """Raise UserError unless a model with this tensor can take it."""
        found = self.shape(tensor)
        if found != shape:
            raise UserError(_misfit(self.path, tensor, found, shape))

    def _place(self, tensor: str, key: str) -> tuple[Any, str]:
        """The opened file a tensor is in, and its name there."""
        if tensor not in self.tensors:
            raise UserError(f"checkpoint {self.path} has no tensor {tensor}: it belongs to another model")
        part = self.tensors[tensor]
        file, name = (weights_file(part), tensor) if key == WEIGHT else (moments_file(part), f"{tensor}/{key}")
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self.path / file), framework="pt")
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"checkpoint {self.path} is damaged: {file}: {error}") from error
        return self._open[file], name

    def table(self) -> RoutingTable | None:
        """The routing table of the layers that follow one: in stage 1 some or none, in stage 2 all.

        None if no layer does, or if the distilled router is no table.
        """
        return RoutingTable.read(self.path / TABLE) if TABLE in self.files else None


def _misfit(path: Path, tensor: str, found: tuple[int, ...], needed: tuple[int, ...]) -> str:
    return (
        f"checkpoint {path} belongs to another model: {tensor} has shape {list(found)}, this model needs {list(needed)}"
    )


def check_everything(path: Path) -> Checkpoint:
    """Open a checkpoint and hash every file. Raises DamagedError, or UserError as :meth:`Checkpoint.at` does."""
    checkpoint = Checkpoint.at(path)
    check_hashes(path, checkpoint.manifest, checkpoint.files)
    return checkpoint


def advice(damaged: Path) -> str:
    """What to use instead of a damaged checkpoint: the newest of its run that is sound, found by reading them."""
    for path in saved_in(damaged.parent):
        if path == damaged:
            continue
        try:
            return f"the newest intact one next to it is {check_everything(path).path}"
        except UserError:
            continue
    return f"no other checkpoint in {damaged.parent} is sound"
