"""Checkpoints keyed by what things are: parameter name and global expert id, never rank or layout.

    <run_dir>/checkpoints/step-000120/
        checkpoint.json              step, stage, data position, configuration, tokenizer, files, tensors
        weights-0000.safetensors     fp32 master weights; one file for each rank that wrote
        moments-0000.safetensors     Adam's moments, named <tensor>/exp_avg and <tensor>/exp_avg_sq
        routing_table.safetensors    from stage 2 on, if the distilled router is a table
    <run_dir>/checkpoints/latest     name of the newest complete one

A checkpoint is written beside its place and renamed when complete. It loads into any data, expert or tensor
parallel degree and any ZeRO stage; nothing in it is executed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stablemoe_ds.config.complaints import complaints
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from stablemoe_ds.files import follow_umask
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.model.layout import Piece, pieces
from stablemoe_ds.routing.table import RoutingTable
from stablemoe_ds.training.engine import Engine
from stablemoe_ds.training.groups import Groups
from stablemoe_ds.training.masters import MOMENTS, WEIGHT, Masters

FORMAT = "stablemoe-checkpoint-1"
TABLE = "routing_table.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    step: updates made. stage: 1 or 2. switched_at: first update of stage 2. samples: training sequences consumed.
    """

    step: int = 0
    stage: int = 1
    switched_at: int | None = None
    samples: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; tensors are read when asked for."""

    path: Path
    progress: Progress
    run: RunConfig
    vocab_size: int
    tokenizer: str
    optimizer_steps: int
    tensors: dict[str, str]
    loss_scale: float | None = None
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint directory, or the newest one of a run directory.

        Raises UserError if there is none, or if a file is missing, cut short or not of this format.
        """
        path = Path(path)
        if not (path / "checkpoint.json").is_file():
            newest = newest_checkpoint(path)
            if newest is None:
                raise UserError(
                    f"no checkpoint at {path}: expected checkpoint.json, or checkpoints/latest as in a run directory"
                )
            path = newest
        try:
            manifest = json.loads((path / "checkpoint.json").read_text())
            if manifest["format"] != FORMAT:
                raise UserError(f"{path} has format {manifest['format']!r}, this version reads {FORMAT!r}")
            for name, size in manifest["files"].items():
                found = (path / name).stat().st_size if (path / name).is_file() else None
                if found != size:
                    state = "is missing" if found is None else f"has {found} bytes, expected {size}"
                    raise UserError(f"checkpoint {path} is damaged: {name} {state}; use an older one")
            return cls(
                path=path,
                progress=Progress(**manifest["progress"]),
                run=RunConfig.model_validate(manifest["run"]),
                vocab_size=manifest["vocab_size"],
                tokenizer=manifest["tokenizer"],
                optimizer_steps=manifest["optimizer_steps"],
                tensors=manifest["tensors"],
                loss_scale=manifest["loss_scale"],
            )
        except ValidationError as error:
            raise UserError(complaints(error, lambda _: str(path / "checkpoint.json"))) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {path / 'checkpoint.json'}: {error!r}; use an older checkpoint") from error

    def tensor(self, piece: Piece, key: str) -> Tensor:
        """A whole fp32 tensor. Raises UserError if it is missing, has another shape or (a weight) is not finite."""
        if piece.name not in self.tensors:
            raise UserError(f"checkpoint {self.path} has no tensor {piece.name}: it belongs to another model")
        part = self.tensors[piece.name]
        file, name = (
            (f"weights-{part}.safetensors", piece.name)
            if key == WEIGHT
            else (
                f"moments-{part}.safetensors",
                f"{piece.name}/{key}",
            )
        )
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self.path / file), framework="pt")
            value: Tensor = self._open[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint {self.path} is damaged: {file}: {error}") from error
        if tuple(value.shape) != piece.shape:
            raise UserError(
                f"checkpoint {self.path}: {piece.name} has shape {list(value.shape)}, "
                f"this model needs {list(piece.shape)}"
            )
        if not torch.isfinite(value).all():
            raise UserError(
                f"checkpoint {self.path}: {piece.name} ({key}) holds NaN or infinity; use an older checkpoint"
            )
        return value

    def table(self) -> RoutingTable | None:
        """The frozen routing table; None in stage 1 or if the distilled router is no table."""
        file = self.path / TABLE
        return RoutingTable.read(file) if file.exists() else None


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run directory, None if it has none."""
    folder = Path(run_dir) / "checkpoints"
    try:
        return folder / (folder / "latest").read_text().strip()
    except OSError:
        return None


def save(engine: Engine, progress: Progress, tokenizer: str, table: RoutingTable | None) -> Path:
    """Write a checkpoint of the run; collective. Returns its directory."""
    folder = Path(engine.run.directory) / "checkpoints"
    final = folder / f"step-{progress.step:06d}"
    part = folder / f".{final.name}.part"
    world = engine.groups.world
    if world.is_main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()

    masters = Masters(engine.deepspeed)
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for owned, piece, key, value in _whole_tensors(engine, masters):
        if owned:
            target, name = (weights, piece.name) if key == WEIGHT else (moments, f"{piece.name}/{key}")
            target[name] = value.cpu().contiguous()
    number = f"{world.rank:04d}"
    sizes = {}
    for name, tensors in ((f"weights-{number}.safetensors", weights), (f"moments-{number}.safetensors", moments)):
        if tensors:
            save_file(tensors, str(part / name))
            follow_umask(part / name)
            sizes[name] = (part / name).stat().st_size
    if world.is_main and table is not None:
        table.save(part / TABLE)
        sizes[TABLE] = (part / TABLE).stat().st_size
    written: list[Any] = [None] * world.size
    dist.all_gather_object(written, (sizes, dict.fromkeys(weights, number)))

    if world.is_main:
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        manifest = {
            "format": FORMAT,
            "progress": asdict(progress),
            "optimizer_steps": masters.steps,
            "loss_scale": float(scaler.cur_scale) if engine.run.precision.dtype == "fp16" and scaler else None,
            "tokenizer": tokenizer,
            "vocab_size": engine.model.vocab_size,
            "run": engine.run.model_dump(mode="json"),
            "files": {name: size for files, _ in written for name, size in files.items()},
            "tensors": {name: owner for _, names in written for name, owner in names.items()},
        }
        (part / "checkpoint.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        (folder / "latest.part").write_text(final.name)
        (folder / "latest.part").rename(folder / "latest")
        _prune(folder, engine.run.checkpoint.keep)
    dist.barrier()
    return final


def _prune(folder: Path, keep: int) -> None:
    """Delete all but the newest checkpoints; the one ``latest`` names is never touched."""
    latest = (folder / "latest").read_text().strip()
    # By time, not by step: a run that was set back writes lower steps than the ones it has abandoned.
    older = sorted((p for p in folder.glob("step-*") if p.name != latest), key=lambda path: path.stat().st_mtime)
    for path in older[: max(0, len(older) - (keep - 1))]:
        shutil.rmtree(path)


def _whole_tensors(engine: Engine, masters: Masters) -> Iterator[tuple[bool, Piece, str, Tensor]]:
    """Every tensor of the run, whole, and whether this rank is the one to write it. Collective."""
    groups = engine.groups
    copies = groups.world.size // groups.expert
    cached: tuple[Any, dict[str, Tensor]] = (None, {})
    for number, piece in enumerate(pieces(engine.model, groups.tensor)):
        if cached[0] is not piece.parameter:  # the rows of a stacked parameter come one after the other
            cached = (piece.parameter, {key: masters.read(piece.parameter, key) for key in (WEIGHT, *MOMENTS)})
        owned = (
            groups.expert_data_rank == number % copies
            if piece.is_expert
            else groups.world.rank == number % groups.world.size
        )
        for key, local in cached[1].items():
            value = piece.select(local)
            if piece.cut_dim is not None:
                parts = [torch.empty_like(value) for _ in range(groups.tensor)]
                dist.all_gather(parts, value.contiguous(), group=groups.tensor_group)
                value = piece.whole_of(parts)
            yield owned, piece, key, value


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Bring weights, master weights and moments to the checkpoint's, under whatever layout the engine has."""
    masters, groups = Masters(engine.deepspeed), engine.groups
    masters.prepare(engine.model.parameters(), checkpoint.optimizer_steps)
    for key in (WEIGHT, *MOMENTS):
        for parameter, value in _local_tensors(engine.model, groups, checkpoint, key):
            masters.write(parameter, key, value.to(parameter.device))
    if checkpoint.loss_scale is not None and engine.run.precision.dtype == "fp16":
        engine.optimizer.loss_scaler.cur_scale = checkpoint.loss_scale


@torch.no_grad()
def load_weights(model: StableMoEGPT, groups: Groups, checkpoint: Checkpoint) -> None:
    """Load weights alone, for evaluation and generation."""
    for parameter, value in _local_tensors(model, groups, checkpoint, WEIGHT):
        parameter.copy_(value)


def _local_tensors(
    model: StableMoEGPT, groups: Groups, checkpoint: Checkpoint, key: str
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Each local parameter with its values from the checkpoint; rows of stacked experts are put together."""
    values: dict[int, tuple[torch.nn.Parameter, list[Tensor]]] = {}
    for piece in pieces(model, groups.tensor):
        local = piece.local_of(checkpoint.tensor(piece, key), groups.tensor_rank, groups.tensor)
        if not piece.is_expert:
            yield piece.parameter, local
            continue
        parameter, rows = values.setdefault(id(piece.parameter), (piece.parameter, []))
        rows.append(local)
        if len(rows) == parameter.shape[0]:
            yield parameter, torch.stack(rows)
            del values[id(piece.parameter)]
