"""The data of a run, read from its configuration: tokenizer, training loader, evaluation sets, the probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.config.batch import BatchPlan
from stablemoe_ds.config.schema import RunConfig, Source
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.corpus import check_vocabulary, read_sources
from stablemoe_ds.data.dataset import EvalDataset, build_train_dataset
from stablemoe_ds.data.loader import EvalLoader, TrainLoader
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.errors import UserError


@dataclass(frozen=True)
class EvalSet:
    """A corpus to evaluate on. words: of its text, None if only a part of it is read."""

    loader: EvalLoader
    words: int | None


class RunData:
    """Everything a run reads. Raises UserError for what is missing, damaged or of another tokenizer."""

    def __init__(self, run: RunConfig, plan: BatchPlan, groups: Groups, tokenizer: Tokenizer | None) -> None:
        if not run.data.train:
            raise UserError("data.train names no corpus to train on; prepare one with 'stablemoe data prepare'")
        self._run, self._plan, self._groups, self._tokenizer = run, plan, groups, tokenizer
        for info in read_sources([*run.data.train, *run.data.valid, *run.data.test], tokenizer):
            check_vocabulary(info, run.model.vocab_size or 0)

    def train_loader(self, start_sample: int) -> TrainLoader:
        """Optimizer steps from ``start_sample`` to the end of the run."""
        run, plan, groups = self._run, self._plan, self._groups
        dataset = build_train_dataset(
            run.data.train,
            run.data.sequence_length,
            run.schedule.steps * plan.sequences_per_step,
            run.seed,
            Path(run.directory) / "cache",
            self._tokenizer,
        )
        layout = (plan.micro_batch, plan.accumulation, groups.data_rank, groups.data_size)
        return TrainLoader(dataset, *layout, start_sample=start_sample, workers=run.data.workers)

    def eval_set(self, sources: list[Source], max_tokens: int | None) -> EvalSet | None:
        """This rank's share of a corpus to evaluate on; None if none is named."""
        if not sources:
            return None
        dataset = EvalDataset(sources, self._run.data.sequence_length, max_tokens, self._tokenizer)
        loader = EvalLoader(dataset, self._plan.micro_batch, self._groups.data_rank, self._groups.data_size)
        return EvalSet(loader, dataset.words)

    def probe(self) -> list[Batch]:
        """The fixed tokens whose routing is recorded: the start of the validation text, else of the training text."""
        probe = self.eval_set(self._run.data.valid or self._run.data.train, self._run.logging.probe_tokens)
        return list(probe.loader) if probe else []


def token_counts(sources: Sequence[Source], tokenizer: Tokenizer | None, vocab_size: int) -> NDArray[np.int64]:
    """int64 [V]: how often a blend has each id, corpora weighted as they are in training.

    vocab_size: ids of the model, which may have more than the tokenizer; those do not occur.
    """
    infos = read_sources(sources, tokenizer)
    shares = [info.token_counts() * (s.weight / info.tokens) for s, info in zip(sources, infos, strict=True)]
    total = sum(info.tokens for info in infos)
    weight = sum(source.weight for source in sources)
    counts = np.rint(np.sum(shares, axis=0) * (total / weight)).astype(np.int64)
    return np.pad(counts, (0, vocab_size - len(counts)))
