"""Converts a checkpoint to another model: from dense to experts, to more experts, or to fewer. No model is built.

The new checkpoint is the first of its run: ``stablemoe train`` continues from it. The optimizer's moments are
left out: they belong to the gradients of another model, so Adam starts from zero.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from stablemoe_ds.checkpoint.attached import TOKEN_COUNTS, carried
from stablemoe_ds.checkpoint.convert.resize_experts import check_replication, merge, replicate
from stablemoe_ds.checkpoint.convert.upcycle import upcycle
from stablemoe_ds.checkpoint.reader import Checkpoint, Progress
from stablemoe_ds.checkpoint.saver import write_share
from stablemoe_ds.config.difference import flat
from stablemoe_ds.config.messages import show_both
from stablemoe_ds.config.resolved import as_begun
from stablemoe_ds.config.rules import check, with_vocabulary
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from stablemoe_ds.model.layout import moe_layer_name
from stablemoe_ds.run_directory.checkpoint_files import FORMAT, part_of, publish, saved_checkpoints, write_manifest
from stablemoe_ds.run_directory.lock import only_writer
from stablemoe_ds.tables.derived import merged_table, replicated_table
from stablemoe_ds.tables.table import RoutingTable


def convert(source: Checkpoint, target: RunConfig) -> tuple[Path, str]:
    """Write the first checkpoint of ``target`` from ``source``; returns its path and a description of what was done.

    Raises UserError if the two models differ in more than their experts, if there is nothing to convert, or if the
    target's run has checkpoints already or is being trained. Holds the whole model's weights in memory.
    """
    target = with_vocabulary(as_begun(target, source.run), source.vocab_size)
    check(target)
    source.check_content(moments=False)
    old, new = source.run.moe, target.moe
    weights = {name: source.read(name) for name in source.tensors}
    table, progress = source.table(), Progress()
    if not old.layers and new.facts.routed:
        _check_same(source.run, target, moe_differs=True)
        weights = upcycle(weights, target, source.vocab_size)
        what = f"upcycled: {len(new.layers)} MoE layers of {new.experts} experts, placed '{new.placement}'"
    elif old.facts.routed and old.experts != new.experts:
        _check_same(source.run, target, moe_differs=False)
        progress = source.progress
        weights, table, what = _regrouped(source, weights, table, new.experts, target.seed)
    else:
        raise UserError(
            f"checkpoint {source.path}: nothing to convert; a dense model can become a Mixture of Experts, and "
            "the number of experts can change by a whole factor; layout and precision need no conversion"
        )
    # Counts belong to a training text, which may be another one from now on.
    same_text = source.run.data.train == target.data.train
    attached = {name: content for name, content in carried(source).items() if same_text or name != TOKEN_COUNTS}
    written = write_first_checkpoint(
        target,
        weights,
        table,
        progress,
        tokenizer=source.tokenizer,
        vocab_size=source.vocab_size,
        attached=attached,
        origin=str(source.path),
    )
    return written, what


def _regrouped(
    source: Checkpoint, weights: dict[str, Tensor], table: RoutingTable | None, experts: int, seed: int
) -> tuple[dict[str, Tensor], RoutingTable | None, str]:
    before = source.run.moe.experts
    small, large = sorted((before, experts))
    times = large // small
    if large % small:
        raise UserError(f"moe.experts: got {experts}: expected {before} times or divided by a whole number")
    if experts > before:
        check_replication(source.run.moe, source.progress.stage)
        choosing = source.progress.stage == 1 or table is None
        followed = [moe_layer_name(source.run.moe.layers, block) for block in source.run.moe.table_layers]
        grown = replicate(weights, times, seed if choosing else None, followed)
        return grown, replicated_table(table, times) if table else None, f"replicated: {times} copies of each expert"
    shrunk = merge(weights, times)
    return shrunk, merged_table(table, times) if table else None, f"merged: the mean of each {times} experts"


def _check_same(old: RunConfig, new: RunConfig, moe_differs: bool) -> None:
    """Raise UserError if the models differ in anything but what the conversion changes."""
    sections = {"model": (old.model, new.model)} | ({} if moe_differs else {"moe": (old.moe, new.moe)})
    free = {"model.dropout", "model.vocab_size", "model.init", "model.init_std", "moe.experts", "moe.capacity_factor"}
    free |= {
        "moe.balance_weight",
        "moe.distill_weight",
        "moe.distilled.lr_scale",
        "moe.bias_step",
        "moe.table_load",
        "moe.table",
        "moe.start_table",
    }
    for name, (one, other) in sections.items():
        before, after = (flat(section.model_dump(mode="json"), f"{name}.") for section in (one, other))
        for key in before:
            if key not in free and before[key] != after[key]:
                got, has = show_both(after[key], before[key])
                raise UserError(f"{key}: got {got}, but the checkpoint has {has}: expected the same")


def write_first_checkpoint(
    target: RunConfig,
    weights: dict[str, Tensor],
    table: RoutingTable | None,
    progress: Progress,
    *,
    tokenizer: str,
    vocab_size: int,
    attached: Mapping[str, bytes],
    origin: str,
) -> Path:
    """Write the checkpoint that ``target`` starts from; returns its path.

    weights: every tensor of its model by canonical name. tokenizer: its fingerprint. attached: see :func:`to_attach`.
    origin: where the weights come from. Raises UserError if the run already has checkpoints or is being trained,
    or if the checkpoint cannot be written.
    """
    if target.moe.start_table is not None:
        raise UserError(
            f"moe.start_table: got {target.moe.start_table}, but the run starts from this checkpoint: leave it out"
        )
    with only_writer(target.directory):
        if saved_checkpoints(target.directory):
            raise UserError(f"{target.directory} has checkpoints already: name another run_dir")
        final = Path(target.directory) / "checkpoints" / f"step-{progress.step:06d}"
        part = part_of(final)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "progress": asdict(progress),
            "optimizer_steps": 0,
            "loss_scale": None,
            "tokenizer": tokenizer,
            "vocab_size": vocab_size,
            "run": target.model_dump(mode="json"),
            "started_in": os.getcwd(),
            "converted_from": origin,
        }
        try:
            part.mkdir(parents=True, exist_ok=True)
            contiguous = {name: value.contiguous() for name, value in weights.items()}
            write_manifest(part, manifest | write_share(part, "0000", contiguous, {}, table, attached))
            publish(part, final, keep=1)
        except OSError as error:
            raise UserError(f"cannot write {error.filename or part}: {error.strerror or error}") from error
        return final
