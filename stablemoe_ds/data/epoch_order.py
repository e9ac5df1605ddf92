"""The order in which an epoch of a corpus is read.

Documents are shuffled and laid end to end. The resulting line of tokens is cut into sequences, which are shuffled. All
of that follows from the seed and the number of the epoch, whatever the length of the run; in the first epoch the order
is that of megatron-core's ``GPTDataset``.

If the length changes within an epoch, the sequences not yet read are put back in line, and that shorter line is cut
and shuffled. What remains at the end of an epoch, less than a sequence, begins the line of the next epoch and is read
before anything else there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.data.position import Order

Ints = NDArray[np.int64]


class Documents(Protocol):
    """What is used of megatron-core's ``IndexedDataset``."""

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, at least 1: int32 [documents]."""

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """Part of a document."""


class EpochOrder:
    """Reads one cut of one epoch.

    It holds 12 bytes for each document of the corpus and 4 for each sequence of the epoch.
    """

    def __init__(self, documents: Documents, order: Order) -> None:
        epoch, seed = order.epoch, order.seed
        self._documents = documents
        # The first epoch has the generator of megatron-core's index: checkpoints of versions that used it go on.
        state = np.random.RandomState(seed % 2**32 if epoch.number == 0 else [seed % 2**32, epoch.number])
        lengths = documents.sequence_lengths
        self._permuted = np.arange(len(lengths), dtype=np.int32)
        state.shuffle(self._permuted)
        self._ends: Ints = np.cumsum(lengths[self._permuted], dtype=np.int64)
        self._front, self._carried = epoch.carried, _carried(documents, order)
        self._cuts: list[tuple[int, NDArray[Any]]] = []  # length of each earlier cut, and which sequences it has left
        left, first = epoch.carried + int(self._ends[-1]), epoch.carried
        for cut in epoch.cuts:
            count = left // cut.length
            rest = np.sort(_shuffled(count, -(-first // cut.length), state)[cut.read :])
            self._cuts.append((cut.length, np.append(rest, np.array(count, rest.dtype))))
            left, first = left - cut.length * cut.read, max(0, first - cut.length * cut.read)
        self.left, self._length = left, order.length
        self._sequences = _shuffled(left // order.length, -(-first // order.length), state)

    def read(self, index: int) -> Ints:
        """Sequence ``index`` of this cut: int64 [2, length], its tokens and those that follow each."""
        start = int(self._sequences[index]) * self._length
        return self.stretch(start, start + self._length)

    def stretch(self, start: int, stop: int) -> Ints:
        """Tokens ``start`` to ``stop`` of the line that this cut divides, and those that follow each."""
        return np.concatenate([self._pairs(*part) for part in self._placed(start, stop, len(self._cuts))], axis=1)

    def _placed(self, start: int, stop: int, cuts: int) -> Iterator[tuple[int, int]]:
        """Where a stretch of what ``cuts`` cuts have left lies in the whole line of the epoch."""
        if cuts == 0:
            yield start, stop
            return
        length, rest = self._cuts[cuts - 1]
        while start < stop:
            number, offset = divmod(start, length)
            place, count = int(rest[number]) * length + offset, min(stop - start, length - offset)
            yield from self._placed(place, place + count, cuts - 1)
            start += count

    def _pairs(self, start: int, stop: int) -> Ints:
        """A stretch of the whole line: carried tokens, then the documents."""
        carried = self._front
        if stop <= carried:
            return self._carried[:, start:stop]
        if start < carried:
            return np.concatenate([self._carried[:, start:], self._pairs(carried, stop)], axis=1)
        start, stop, end = start - carried, stop - carried, int(self._ends[-1])
        text = self._text(start, min(stop + 1, end))
        if stop == end:  # the last token ends a document; what follows it is the start of one
            text = np.append(text, self._text(0, 1))
        return np.stack([text[:-1], text[1:]])

    def _text(self, start: int, stop: int) -> Ints:
        """Tokens of the documents in their order."""
        number, parts = int(np.searchsorted(self._ends, start, side="right")), []
        while start < stop:
            document, end = int(self._permuted[number]), int(self._ends[number])
            offset = start - end + int(self._documents.sequence_lengths[document])
            parts.append(self._documents.get(document, offset=offset, length=min(stop, end) - start))
            start, number = end, number + 1
        return np.concatenate(parts, dtype=np.int64)


def _carried(documents: Documents, order: Order) -> Ints:
    """The tokens that the epoch before has left, and those that follow each: int64 [2, carried]."""
    if order.before is None:
        return np.empty((2, 0), np.int64)
    # What that epoch was handed itself was read first there, so its tokens are not needed to find the rest of it.
    line = EpochOrder(documents, replace(order, epoch=order.before, before=None))
    return line.stretch(line.left - order.epoch.carried, line.left)


def _shuffled(count: int, first: int, state: np.random.RandomState) -> NDArray[Any]:
    """Numbers of ``count`` sequences in the order in which they are read; the ``first`` ones stay in front."""
    order = np.arange(count, dtype=np.uint32 if count < 2**32 - 1 else np.int64)
    state.shuffle(order[first:])
    return order
