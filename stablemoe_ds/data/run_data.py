"""The data of a run, read from its configuration: training data, evaluation sets, the probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stablemoe_ds.config.batch_plan import BatchPlan
from stablemoe_ds.config.schema import RunConfig, Source
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.corpus import check_vocabulary, read_sources
from stablemoe_ds.data.dataset import EvalDataset
from stablemoe_ds.data.loader import EvalLoader
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.data.training_data import TrainingData
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.errors import UserError


@dataclass(frozen=True)
class EvalSet:
    """A corpus to evaluate on. words: of its text, None if only a part of it is read."""

    loader: EvalLoader
    words: int | None


class RunData:
    """Everything a run reads. Raises UserError for what is missing, damaged or of another tokenizer.

    train: the sequences to train on, and the position in them.
    """

    def __init__(self, run: RunConfig, plan: BatchPlan, groups: Groups, tokenizer: Tokenizer | None) -> None:
        if not run.data.train:
            raise UserError("data.train names no corpus to train on; prepare one with 'stablemoe data prepare'")
        self._run, self._plan, self._groups, self._tokenizer = run, plan, groups, tokenizer
        reader, part = (groups.reading_rank, groups.reading_size), (groups.sequence_rank, groups.sequence)
        self.train = TrainingData(run, plan, *reader, tokenizer, part)
        for info in read_sources([*run.data.train, *run.data.valid, *run.data.test], tokenizer):
            check_vocabulary(info, run.model.vocab_size or 0)

    def valid(self, max_tokens: int | None) -> EvalSet | None:
        """The validation text, or its first ``max_tokens``; None if the run names none."""
        return self.eval_set(self._run.data.valid, max_tokens)

    def test(self, max_tokens: int | None) -> EvalSet | None:
        """As :meth:`valid`, of the test text."""
        return self.eval_set(self._run.data.test, max_tokens)

    def eval_set(self, sources: list[Source], max_tokens: int | None) -> EvalSet | None:
        """This rank's share of a corpus to evaluate on; None if none is named."""
        if not sources:
            return None
        return eval_set(
            sources, self._run.data.sequence_length, self._plan.micro_batch, self._groups, max_tokens, self._tokenizer
        )

    def probe(self) -> list[Batch]:
        """The fixed tokens whose routing is recorded: the start of the validation text, else of the training text."""
        probe = self.eval_set(self._run.data.valid or self._run.data.train, self._run.logging.probe_tokens)
        return list(probe.loader) if probe else []


def eval_set(
    sources: Sequence[Source],
    sequence_length: int,
    micro_batch: int,
    groups: Groups,
    max_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> EvalSet:
    """This rank's share of corpora to evaluate on. max_tokens, tokenizer: see :class:`EvalDataset`."""
    dataset = EvalDataset(sources, sequence_length, max_tokens, tokenizer)
    reader, part = (groups.reading_rank, groups.reading_size), (groups.sequence_rank, groups.sequence)
    return EvalSet(EvalLoader(dataset, micro_batch, *reader, *part), dataset.words)
