"""Sequences to train on and windows to evaluate on.

An item of either dataset is a dict of int64 ``tokens`` [S] and ``labels`` [S] (the token that follows each) and
float ``loss_mask`` [S], 0 at padding. These are the names of megatron-core's ``GPTDataset``.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.corpus import read_sources
from stablemoe_ds.data.epoch_order import Documents, EpochOrder
from stablemoe_ds.data.position import Order, Window
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.distributed.libraries import import_megatron
from stablemoe_ds.errors import UserError

Item = dict[str, Tensor]


class TrainDataset(Dataset[Item]):
    """The training sequences of corpora; an item is asked for by its address.

    Of each corpus the order of one epoch is kept in memory, worked out when its first sequence is asked for.
    """

    def __init__(self, prefixes: Mapping[str, str]) -> None:
        """``prefixes``: where each corpus lies, by the name that addresses have for it."""
        self._prefixes = prefixes
        self._orders: dict[str, tuple[Order, EpochOrder]] = {}

    def __getitem__(self, window: Window) -> Item:
        order = window.order
        known, sequences = self._orders.get(order.source, (None, None))
        if sequences is None or known != order:
            sequences = EpochOrder(_documents(self._prefixes[order.source]), order)
            self._orders[order.source] = order, sequences
        tokens, labels = torch.from_numpy(sequences.read(window.index))
        return {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(order.length)}


def _documents(prefix: str) -> Documents:
    import_megatron()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents: Documents = IndexedDataset(prefix)
    return documents


class EvalDataset(Dataset[Item]):
    """Corpora read from end to end, in windows of ``sequence_length`` that follow one another.

    In each corpus every token but the very first is predicted exactly once; the last window is padded. Weights of
    sources are ignored. ``tokens`` is how many predictions count. ``words`` is how many words they spell, or
    None when ``max_tokens`` leaves out a part of the text, whose words were not counted apart.

    max_tokens: bound on ``tokens``; the text is taken from the start. Without it the corpora are read through first, to
    see that the ids are those that were prepared; otherwise only that those to be read are in the vocabulary.
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
        for info, scored, all_of_it in zip(infos, self._scored, available, strict=True):
            info.verify(None if scored == all_of_it else scored + 1)
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
