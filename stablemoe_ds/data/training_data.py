"""What a run trains on: an endless order of sequences that can be entered at any position."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stablemoe_ds.config.batch_plan import BatchPlan
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.blend import content, shares
from stablemoe_ds.data.corpus import check_tokens, read_sources
from stablemoe_ds.data.counted_samples import position_of_samples
from stablemoe_ds.data.dataset import TrainDataset
from stablemoe_ds.data.loader import Deal, TrainLoader
from stablemoe_ds.data.position import Position, SourcePosition, Window
from stablemoe_ds.data.resumed import resumption
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.data.verified import verify_once


class TrainingData:
    """The corpora of ``data.train``, blended by their weights. The position in them is a value that the caller keeps.

    Which sequences an update has, and in which order, follows from the position and from how many an update has.
    The layout only decides which rank reads which of them.
    """

    def __init__(
        self,
        run: RunConfig,
        plan: BatchPlan,
        data_rank: int,
        data_size: int,
        tokenizer: Tokenizer | None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """``part``: which part of each sequence this rank takes, out of how many (:meth:`Batch.part`).

        Raises UserError for a corpus that is missing, damaged, of another tokenizer, or shorter than a sequence."""
        self._run, self._per_step, self._part = run, plan.sequences_per_step, part
        self._deal = Deal(plan.micro_batch, plan.accumulation, data_rank, data_size)
        self.infos = read_sources(run.data.train, tokenizer)
        for info in self.infos:
            check_tokens(info, run.data.sequence_length)

    def start(self) -> Position:
        """Where a new run begins."""
        return self.adopt(Position())

    def adopt(self, position: Position) -> Position:
        """The position under the settings of this run, which may not be those that it was reached with."""
        run = self._run
        corpora = {content(info): SourcePosition(info.prefix, info.tokens, run.seed) for info in self.infos}
        return position.under(corpora, shares(self.infos, run.data.train), run.data.sequence_length)

    def resume(self, position: Position, samples: int, run: RunConfig) -> tuple[Position, list[str]]:
        """Where a checkpoint's run goes on under the settings of this one, and lines that say so to the user.

        position, samples, run: as the checkpoint has them; a position without corpora is worked out from ``samples``.
        """
        lines: list[str] = []
        if not position.sources:
            position, lines = position_of_samples(samples, run, self.infos)
        now = self.adopt(position)
        return now, [*resumption(position, now, self._run.seed), *lines]

    def after(self, position: Position) -> Position:
        """The position one update further. ``position``: as :meth:`adopt` or this method returned it."""
        return position.skip(self._per_step)

    def updates(self, position: Position, count: int) -> Iterator[list[Batch]]:
        """This rank's share of ``count`` updates, each a list of micro-batches. Collective.

        The first rank reads the corpora through before, to see that the ids are those that were prepared. Raises
        UserError on all ranks if they are not.
        """
        verify_once(self.infos, Path(self._run.directory) / "cache")
        dataset = TrainDataset({content(info): info.prefix for info in self.infos})
        loader = TrainLoader(dataset, self._shares(position, count), self._deal.micro_batch, self._run.data.workers)
        return ([whole.part(*self._part) for whole in update] for update in loader)

    def _shares(self, position: Position, count: int) -> Iterator[list[Window]]:
        for _ in range(count):
            windows, position = position.take(self._per_step)
            yield self._deal.share(windows)
