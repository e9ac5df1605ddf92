"""Where a run is in its data, counted so that no setting can change what the count means.

The position is kept per corpus: which pass through it (epoch) the run is in, and what of that epoch was read. Batch
size, world size, number of steps and weights are no part of it, so a run may change them between two starts.

A token is *read* when it is an input of the model, and its successor is then the label. Each token of a corpus is read
once an epoch, and is a label once an epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError


@dataclass(frozen=True)
class Cut:
    """Sequences that were read from an epoch: their length in tokens and their number."""

    length: PositiveInt
    read: PositiveInt


@dataclass(frozen=True)
class Epoch:
    """One pass through a corpus, as far as it was read.

    number: counted from 0. carried: tokens that the epoch before left, too few for a sequence; they are read first.
    cuts: what was read, oldest first. Each change of the sequence length begins another one, which takes its sequences
    from what those before it have left.
    """

    number: NonNegativeInt = 0
    carried: NonNegativeInt = 0
    cuts: tuple[Cut, ...] = ()

    @property
    def read(self) -> int:
        """Tokens that were read, carried ones included."""
        return sum(cut.length * cut.read for cut in self.cuts)

    def split(self, length: int) -> tuple[Epoch, int]:
        """The epoch as it was before its sequences of ``length``, if those came last, and how many there were."""
        if self.cuts and self.cuts[-1].length == length:
            return replace(self, cuts=self.cuts[:-1]), self.cuts[-1].read
        return self, 0


@dataclass(frozen=True)
class Order:
    """Names one order of sequences: those of ``length`` tokens, from what earlier cuts have left of an epoch.

    source: the corpus. seed: decides all orders. epoch: with the cuts before this one. before: the epoch whose rest is
    carried into this one.
    """

    source: str
    seed: int
    epoch: Epoch
    before: Epoch | None
    length: int


@dataclass(frozen=True)
class Window:
    """Address of one training sequence: its place in an order."""

    order: Order
    index: int


@dataclass(frozen=True)
class SourcePosition:
    """Where a run is in one corpus.

    path: where the corpus was when it was last used, for messages. tokens: of the corpus. seed: decides the order of
    every epoch; the one that the corpus was begun with. epoch: the present one. before: the one that left
    ``epoch.carried`` tokens; None if there are none.
    """

    path: str
    tokens: PositiveInt
    seed: NonNegativeInt
    epoch: Epoch = Epoch()
    before: Epoch | None = None

    @property
    def left(self) -> int:
        """Tokens of this epoch that were not read yet, carried ones included."""
        return self.epoch.carried + self.tokens - self.epoch.read

    @property
    def total(self) -> int:
        """Tokens that were read in all epochs together."""
        return (self.epoch.number + 1) * self.tokens - self.left

    def take(self, source: str, length: int, count: int) -> tuple[list[Window], SourcePosition]:
        """The next sequences, and the position after them.

        source: what addresses call this corpus. length: at most the tokens of the corpus.
        """
        here, windows = self, list[Window]()
        while missing := count - len(windows):
            here = here._with_room(length)
            earlier, read = here.epoch.split(length)
            some = min(missing, here.left // length)
            order = Order(source, here.seed, earlier, here.before, length)
            windows += [Window(order, index) for index in range(read, read + some)]
            here = here._after(length, some)
        return windows, here

    def skip(self, length: int, count: int) -> SourcePosition:
        """The position after the next sequences."""
        here = self
        while count:
            here = here._with_room(length)
            some = min(count, here.left // length)
            here, count = here._after(length, some), count - some
        return here

    def _with_room(self, length: int) -> SourcePosition:
        """Here, or at the begin of the next epoch if this one has no whole sequence left."""
        if self.left >= length:
            return self
        following = Epoch(self.epoch.number + 1, carried=self.left)
        return replace(self, epoch=following, before=self.epoch if self.left else None)

    def _after(self, length: int, count: int) -> SourcePosition:
        earlier, read = self.epoch.split(length)
        return replace(self, epoch=replace(earlier, cuts=(*earlier.cuts, Cut(length, read + count))))


@dataclass(frozen=True)
class Position:
    """Where a run is in all its corpora, those included that it no longer reads.

    sources: by what the corpora hold (:func:`.blend.content`). weights: shares of the corpora in the blend, of
    which the sum is 1. length: of a sequence, in tokens. given: sequences that each corpus has given since weights or
    length were last set; the next one comes from the corpus that lies furthest behind its weight.
    """

    sources: dict[str, SourcePosition] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    length: PositiveInt = 1
    given: dict[str, NonNegativeInt] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that were read in all epochs of all corpora."""
        return sum(source.total for source in self.sources.values())

    @classmethod
    def parse(cls, fields: Any) -> Position:
        """From what ``dataclasses.asdict`` made of one and JSON may have kept. Raises ValueError for anything else."""
        try:
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    def under(self, corpora: Mapping[str, SourcePosition], weights: dict[str, float], length: int) -> Position:
        """The same position under settings that may not be those that it was reached with.

        corpora: by name, at their starts. What was read of one is kept, also of those that are not among them.
        """
        known = {name: replace(self.sources.get(name, start), path=start.path) for name, start in corpora.items()}
        same = (weights, length) == (self.weights, self.length)
        # In the order of the weights, which decides between corpora that are equally far behind.
        given = {name: self.given.get(name, 0) if same else 0 for name in weights}
        return Position(self.sources | known, weights, length, given)

    def take(self, count: int) -> tuple[list[Window], Position]:
        """The next sequences of the blend, and the position after them."""
        names = self._turns(count)
        taken = {name: self.sources[name].take(name, self.length, number) for name, number in Counter(names).items()}
        windows = {name: iter(part) for name, (part, _) in taken.items()}
        after = self._with({name: there for name, (_, there) in taken.items()}, names)
        return [next(windows[name]) for name in names], after

    def skip(self, count: int) -> Position:
        """The position after the next sequences."""
        names = self._turns(count)
        skipped = Counter(names).items()
        return self._with({name: self.sources[name].skip(self.length, number) for name, number in skipped}, names)

    def _turns(self, count: int) -> list[str]:
        """Which corpus gives each of the next sequences.

        The rule of megatron-core's ``BlendedDataset`` (``build_blending_indices`` in its helpers.cpp): the corpus whose
        count is furthest below its weight's share, the first of several.
        """
        given, names = dict(self.given), []
        total = sum(given.values())
        for number in range(total, total + count):
            share = max(number, 1)
            name = max(self.weights, key=lambda name: self.weights[name] * share - given[name])
            given[name] += 1
            names.append(name)
        return names

    def _with(self, sources: dict[str, SourcePosition], names: list[str]) -> Position:
        more = Counter(names)
        given = {name: number + more[name] for name, number in self.given.items()}
        return replace(self, sources=self.sources | sources, given=given)
