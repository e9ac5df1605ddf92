"""``stablemoe checkpoint convert FOLDER``: the first checkpoint of a run from a folder of transformers."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stablemoe_ds.checkpoint.attached import to_attach
from stablemoe_ds.checkpoint.convert.conversion import write_first_checkpoint
from stablemoe_ds.checkpoint.reader import Progress
from stablemoe_ds.config.messages import show_both
from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.config.resolved import settled
from stablemoe_ds.config.rules import check, with_document_end, with_vocabulary
from stablemoe_ds.config.schema import ParallelConfig, RunConfig
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.distributed.groups import Groups, start_world
from stablemoe_ds.errors import UserError
from stablemoe_ds.export.canonical_names import TABLE, canonical_tensors, exported_name
from stablemoe_ds.export.described_model import PLAIN, described_model, in_words
from stablemoe_ds.export.folder_settings import BY_ID, learned_router, model_settings
from stablemoe_ds.export.tensor_names import SPLIT
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.model.layout import pieces
from stablemoe_ds.tables.split_ids import SplitIds
from stablemoe_ds.tables.table import RoutingTable


def is_folder_of_transformers(path: str | Path) -> bool:
    """Whether ``convert`` reads it as one, and not as a checkpoint."""
    return Path(path, "config.json").is_file()


def import_folder(folder: str | Path, target: RunConfig) -> tuple[Path, str]:
    """Write the first checkpoint of ``target``, which computes what the model in ``folder`` does; its path, and what
    was done as text. Weights become fp32; a table that the folder has is followed from the first update on.

    Raises UserError if the folder is damaged or of a model that this package does not compute, with a line for each
    setting in which ``target`` describes another model, and if its run has checkpoints already.
    Holds the whole model in memory, twice.
    """
    folder = Path(folder)
    settings = described_model(folder)
    words = in_words(settings)
    target = settled(target, words["model.embedding"], words.get("moe.router_input"))
    check(target)
    tokenizer = Tokenizer(target.data.tokenizer) if target.data.tokenizer else None
    vocab = _vocabulary(settings["vocab_size"], target, tokenizer)
    target = with_document_end(with_vocabulary(target, vocab), tokenizer.eos_id if tokenizer else None)
    _check_same(folder, settings, target)
    found = _read(folder, plain=settings["model_type"] in PLAIN)
    if target.model.tie_embeddings:
        found.pop("lm_head.weight", None)
    try:
        weights = canonical_tensors(found, target)
    except ValueError as error:
        raise UserError(f"{folder} has tensor {error}, which belongs to another model") from error
    weights = _completed(folder, weights, target, vocab)
    followed = [block + 1 for block in settings.get("table_blocks") or settings.get("moe_blocks", [])]
    table = _table(found, target.moe, followed, tokenizer.fingerprint if tokenizer else "")
    written = write_first_checkpoint(
        target,
        weights,
        table,
        Progress(stage=2, switched_at=0) if settings.get("router") in BY_ID and target.moe.facts.routed else Progress(),
        tokenizer=tokenizer.fingerprint if tokenizer else "",
        vocab_size=vocab,
        attached=to_attach(tokenizer, None),
        origin=str(folder),
    )
    return written, f"read: {len(found)} tensors of a {settings['model_type']} model" + (
        ", with its table" if table else ""
    )


def _vocabulary(ids: int, target: RunConfig, tokenizer: Tokenizer | None) -> int:
    """Ids of the model. Training takes those of the tokenizer unless the run says otherwise."""
    named = target.model.vocab_size or (tokenizer.vocab_size if tokenizer else ids)
    if named != ids:
        raise UserError(
            f"model.vocab_size: got {named}, but the folder's model has {ids} ids: expected model.vocab_size={ids}"
        )
    return ids


def _check_same(folder: Path, settings: dict[str, object], target: RunConfig) -> None:
    """Raise UserError unless ``target`` describes the folder's model, with a line for each thing that differs."""
    moe, router = target.moe, settings.get("router") if settings.get("routed_experts") else None
    if moe.facts.routed and router is None:
        raise UserError(
            f"{folder} is a dense model: convert it to a run with moe.router=dense first, and that one to experts"
        )
    if router is not None and moe.facts.routed and router not in _routers(moe):
        what = "follows a table" if router == "table" else f"chooses by {router}"
        raise UserError(f"moe.router: got {moe.router}, but the model in {folder} {what}: expected a router that does")
    ours = model_settings(target, int(str(settings["vocab_size"])), router if router is None else str(router))
    given, needed = in_words(ours), in_words(settings)
    lines = []
    for key in dict.fromkeys([*needed, *given]):
        if given.get(key) != needed.get(key):
            got, has = show_both(given.get(key), needed.get(key))
            lines.append(f"{key}: got {got}, but {folder} has {has}: expected the same")
    if lines:
        raise UserError("\n".join(lines))


def _routers(moe: MoEConfig) -> set[str]:
    """What a folder may call the router of a run's model, in whichever stage."""
    if moe.facts.fixed:
        return {"table"}
    frozen = {"table" if moe.distilled.kind == "word" else moe.distilled.kind} if moe.facts.distilled else set()
    return {learned_router(moe)} | frozen


def _read(folder: Path, plain: bool) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, by its name in an exported folder."""
    try:
        index = folder / "model.safetensors.index.json"
        files = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
        tensors: dict[str, Tensor] = {}
        with ExitStack() as opened:
            for name in files:
                file = opened.enter_context(safe_open(str(folder / name), framework="pt"))
                tensors |= {exported_name(key, plain): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"the weights in {folder} cannot be read: {error}; expected model.safetensors, or shards and their index"
        ) from error
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _completed(folder: Path, weights: dict[str, Tensor], run: RunConfig, vocab: int) -> dict[str, Tensor]:
    """With start values for what an export leaves out: distilled routers, and centroids that decide nothing.

    Raises UserError for a tensor that is missing, has another shape or is not finite, and for one too many.
    """
    alone = run.model_copy(update={"parallel": ParallelConfig()})
    model = StableMoEGPT(alone, vocab, Groups(start_world(), 1, 1).placement)
    start = {piece.name: piece.select(piece.parameter).detach() for piece in pieces(model, 1)} | model.router_state()
    for name in sorted(start.keys() | weights.keys()):
        if name not in start:
            raise UserError(f"{folder} has {name}, as a checkpoint calls it, which the run's model lacks")
        unused = name.endswith(".router.centroids") and not run.moe.gate_facts.affinity
        if name not in weights and not (".router.distilled." in name or unused):
            raise UserError(f"{folder} lacks {name}, as a checkpoint calls it: its files are not complete")
        value, shape = weights.get(name, start[name]), tuple(start[name].shape)
        if tuple(value.shape) != shape:
            raise UserError(f"{folder}: {name} has shape {list(value.shape)}: expected {list(shape)}")
        if not value.isfinite().all():
            raise UserError(f"{folder}: {name} holds NaN or infinity: its weights are damaged")
    return start | weights


def _table(found: dict[str, Tensor], moe: MoEConfig, blocks: list[int], tokenizer: str) -> RoutingTable | None:
    layers = {int(re.findall(r"\d+", name)[0]): tensor for name, tensor in found.items() if TABLE.fullmatch(name)}
    if not layers:
        return None
    expert_LVK = np.stack([layers[block].numpy() for block in sorted(layers)]).astype(np.int32)
    try:
        split = SplitIds(*(found[name].numpy() for name in SPLIT.values())) if found.keys() & SPLIT.values() else None
        return RoutingTable(expert_LVK, moe.experts, tuple(blocks), tokenizer, split=split)
    except (ValueError, KeyError) as error:
        raise UserError(f"the routing tables of the folder are damaged: {error}") from error
