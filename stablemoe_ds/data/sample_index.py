"""Which tokens make which training sample: megatron-core's answer, worked out by one rank and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.distributed.together import on_first_rank
from stablemoe_ds.errors import UserError, one_line

Item = dict[str, Tensor]


@dataclass(frozen=True)
class _NoPads:
    """What ``GPTDataset`` asks of a tokenizer. Prepared text holds no padding, so no id of it may pass for one."""

    unique_identifiers: str
    vocab_size: int
    eod: int = -2
    pad: int = -1


@dataclass(frozen=True)
class Recipe:
    """What decides the samples. infos and weights: the corpora and their shares."""

    infos: list[PreparedInfo]
    weights: list[float]
    sequence_length: int
    samples: int
    seed: int

    @property
    def key(self) -> str:
        """Names the recipe: equal for equal text, wherever it is."""
        texts = [(info.sha256, info.documents, weight) for info, weight in zip(self.infos, self.weights, strict=True)]
        told = json.dumps([texts, self.sequence_length, self.samples, self.seed])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def blend(recipe: Recipe, folder: Path) -> Dataset[Item]:
    """Megatron-core's dataset over the corpora, ``recipe.samples`` items long or longer; call on every rank.

    The first rank reads the corpora through and writes the index under ``folder``, if neither was done before.
    Raises UserError on all ranks if a corpus or the index is damaged, or the index cannot be written.
    """
    cache = folder / recipe.key
    on_first_rank(lambda: _write(recipe, cache))
    if not cache.exists():
        raise UserError(
            f"no sample index at {cache}: the first rank wrote it elsewhere; every rank must see that directory"
        )
    try:
        return _blend(recipe, cache)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"cannot read the sample index {cache}: {one_line(error)}; delete it to make it anew"
        ) from error


def _write(recipe: Recipe, cache: Path) -> None:
    """Let megatron-core write its index files into a directory that appears when they are complete."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        for info in recipe.infos:
            _verify_once(info, cache.parent)
        if cache.exists():
            return
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".index-") as folder:
            part = Path(folder, "index")
            _blend(recipe, part)
            part.replace(cache)
    except OSError as error:
        if not cache.exists():  # else another run with the same data was faster
            raise UserError(f"cannot write the sample index {cache}: {error}") from error


def _verify_once(info: PreparedInfo, folder: Path) -> None:
    """Read a corpus through unless ``folder`` has a mark that this was done, to a file that looks the same."""
    file = info.path("bin").stat()
    known = f"{info.sha256} {info.vocab_size} {file.st_size} {file.st_mtime_ns}"
    mark = folder / f"verified-{hashlib.sha256(known.encode()).hexdigest()[:16]}"
    if not mark.exists():
        info.verify()
        mark.touch()


def _blend(recipe: Recipe, cache: Path) -> Dataset[Item]:
    """Megatron-core's datasets for these corpora, with the index files in ``cache`` (read if there, else written)."""
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    infos, weights, samples = recipe.infos, recipe.weights, recipe.samples
    config = GPTDatasetConfig(
        random_seed=recipe.seed,
        sequence_length=recipe.sequence_length,
        blend=([info.prefix for info in infos], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=_NoPads(infos[0].tokenizer, infos[0].vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    parts = []
    for info, weight in zip(infos, weights, strict=True):
        documents = np.arange(info.documents, dtype=np.int32)
        # The blend follows the weights to within a sample for each corpus, so this is enough of each.
        share = min(samples, math.ceil(samples * weight / sum(weights)) + len(infos))
        parts.append(GPTDataset(IndexedDataset(info.prefix), info.prefix, documents, share, Split.train, config))
    if len(parts) == 1:
        return parts[0]
    # Without a cache every rank computes the interleaving, which is quick; with one, torch.distributed must be up.
    logging.getLogger("megatron.core.datasets.blended_dataset").setLevel(logging.ERROR)
    return BlendedDataset(parts, weights, samples, replace(config, path_to_cache=None))
