"""Sequences to train on and windows to evaluate on.

An item of either dataset is a dict of int64 ``tokens`` [S] and ``labels`` [S] (the token that follows each) and
float ``loss_mask`` [S], 0 at padding. These are the names of megatron-core's ``GPTDataset``.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset, Subset

from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.corpus import PreparedInfo, read_sources
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError

Item = dict[str, Tensor]


@dataclass(frozen=True)
class _NoPads:
    """What ``GPTDataset`` asks of a tokenizer. Prepared text holds no padding, so no id of it may pass for one."""

    unique_identifiers: str
    vocab_size: int
    eod: int = -2
    pad: int = -1


def build_train_dataset(
    sources: Sequence[Source],
    sequence_length: int,
    samples: int,
    seed: int,
    cache_dir: str | Path,
    tokenizer: Tokenizer | None = None,
) -> Dataset[Item]:
    """A blend of corpora as ``samples`` training sequences; item i is the same on every rank.

    Megatron-core's ``GPTDataset`` shuffles the documents of a corpus, lays them end to end, cuts sequences of
    ``sequence_length`` tokens that overlap in no label, and shuffles those; a corpus that is too short for its share is
    repeated. ``BlendedDataset`` interleaves corpora by their weights. The order depends on the text, the length,
    ``samples`` and ``seed``, so a run that is to be continued exactly keeps all four.

    Call on every rank: the first one computes the index and writes it under ``cache_dir``, the others wait and read
    it, so the directory must be visible to all of them.
    Raises UserError for a corpus that is missing, damaged, of another tokenizer, or shorter than one sequence.
    """
    infos = read_sources(sources, tokenizer)
    for info in infos:
        if info.tokens <= sequence_length:
            raise UserError(
                f"corpus {info.prefix} has {info.tokens} tokens, but a sequence of {sequence_length} needs "
                f"{sequence_length + 1}: use more text, or data.sequence_length={max(1, info.tokens - 1)} at most"
            )
    contents = [(info.sha256, info.documents, source.weight) for info, source in zip(infos, sources, strict=True)]
    key = hashlib.sha256(json.dumps([contents, sequence_length, samples, seed]).encode()).hexdigest()[:16]
    cache = Path(cache_dir) / key
    weights = [source.weight for source in sources]
    try:
        if not cache.exists() and (not distributed.is_initialized() or distributed.get_rank() == 0):
            _write_cache(cache, infos, weights, sequence_length, samples, seed)
    finally:
        if distributed.is_initialized():
            distributed.barrier()
    if not cache.exists():
        raise UserError(
            f"no sample index at {cache}: the first rank wrote it elsewhere; every rank must see that directory"
        )
    return Subset(_blend(cache, infos, weights, sequence_length, samples, seed), range(samples))


def _write_cache(cache: Path, *what: Any) -> None:
    """Let megatron-core write its index files into a directory that appears when they are complete."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".index-") as folder:
            part = Path(folder, "index")
            _blend(part, *what)
            part.replace(cache)
    except OSError as error:
        if not cache.exists():  # else another run with the same data was faster
            raise UserError(f"cannot write the sample index {cache}: {error}") from error


def _blend(
    cache: Path, infos: list[PreparedInfo], weights: list[float], sequence_length: int, samples: int, seed: int
) -> Dataset[Item]:
    """Megatron-core's datasets for these corpora, with the index files in ``cache`` (read if there, else written)."""
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
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


class EvalDataset(Dataset[Item]):
    """Corpora read from end to end, in windows of ``sequence_length`` that follow one another.

    In each corpus every token but the very first is predicted exactly once; the last window is padded. Weights of
    sources are ignored. ``tokens`` is how many predictions count. ``words`` is how many words they spell, or
    None when ``max_tokens`` leaves out a part of the text, whose words were not counted apart.

    max_tokens: bound on ``tokens``; the text is taken from the start.
    Raises UserError for a corpus that is missing, damaged, of another tokenizer, or has nothing to predict.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        sequence_length: int,
        max_tokens: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        infos = read_sources(sources, tokenizer)
        for info in infos:
            if info.tokens < 2:
                raise UserError(f"corpus {info.prefix} has {info.tokens} tokens: at least 2 are needed to predict one")
        self.sequence_length = sequence_length
        self._streams = [info.stream() for info in infos]
        available = [info.tokens - 1 for info in infos]
        before = [0, *itertools.accumulate(available)][:-1]
        bound = sum(available) if max_tokens is None else max_tokens
        self._scored = [max(0, min(n, bound - start)) for n, start in zip(available, before, strict=True)]
        self._ends = list(itertools.accumulate(-(-n // sequence_length) for n in self._scored))
        self.tokens = sum(self._scored)
        self.words = sum(info.words for info in infos) if self.tokens == sum(available) else None

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Item:
        """Window ``index``; past the end, a window of padding."""
        if index >= len(self):
            return self._window(np.zeros(1, np.int64))
        source = bisect.bisect_right(self._ends, index)
        first = self._ends[source - 1] if source else 0
        start = (index - first) * self.sequence_length
        count = min(self.sequence_length, self._scored[source] - start)
        return self._window(self._streams[source][start : start + count + 1].astype(np.int64))

    def _window(self, ids: np.ndarray[Any, np.dtype[np.int64]]) -> Item:
        """Item of a stretch of up to S + 1 ids: all but the last are inputs, all but the first are labels."""
        item = torch.zeros(2, self.sequence_length, dtype=torch.int64)
        count = len(ids) - 1
        item[0, :count] = torch.from_numpy(ids[:-1])
        item[1, :count] = torch.from_numpy(ids[1:])
        return {"tokens": item[0], "labels": item[1], "loss_mask": (torch.arange(self.sequence_length) < count).float()}
