"""From datasets to batches: who gets which sequence, and where a resumed run goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.dataset import EvalDataset, Item
from stablemoe_ds.errors import UserError

BEFORE_QUEUES = 100
"""Priority at exit. At 10 multiprocessing closes its queues, and an order to stop would no longer arrive."""


def collate(items: Sequence[Item]) -> Batch:
    """Stack items into a batch; a token whose loss is masked is padding."""
    real = torch.stack([item["loss_mask"] for item in items]).bool()
    ids, labels = (torch.stack([item[name] for item in items]) for name in ("tokens", "labels"))
    return Batch(ids=ids, labels=labels, real=real, scored=real)


@dataclass(frozen=True)
class StepSampler:
    """The samples one rank reads for each optimizer step.

    Step u is B = micro_batch * accumulation * dp_size samples from ``start + u * B`` on. Accumulation step m takes
    the m-th slice of micro_batch * dp_size of them, and of that rank r the r-th slice: so the ranks together see
    the same micro-batches in the same order, however many ranks there are.
    """

    micro_batch: int
    accumulation: int
    dp_rank: int
    dp_size: int
    start: int
    samples: int

    @property
    def per_step(self) -> int:
        return self.micro_batch * self.accumulation * self.dp_size

    def __len__(self) -> int:
        return max(0, self.samples - self.start) // self.per_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(len(self)):
            first = self.start + step * self.per_step + self.dp_rank * self.micro_batch
            slices = (first + m * self.micro_batch * self.dp_size for m in range(self.accumulation))
            yield [sample for low in slices for sample in range(low, low + self.micro_batch)]


class TrainLoader:
    """Iterates over optimizer steps: each is ``accumulation`` batches of ``micro_batch`` sequences.

    It ends when the dataset holds no further whole step. Iterating anew goes on after the last step yielded.

    workers: processes that read ahead; 0 reads inline. What a worker raises is raised here, with its traceback.
    collate: turns the items of one step (accumulation * micro_batch of them) into one batch, in the worker.
    Raises UserError if ``start_sample`` lies outside the dataset.
    """

    def __init__(
        self,
        dataset: Dataset[Item],
        micro_batch: int,
        accumulation: int,
        dp_rank: int,
        dp_size: int,
        start_sample: int = 0,
        workers: int = 0,
        collate: Callable[[Sequence[Item]], Batch] = collate,
    ) -> None:
        samples = len(cast(Sized, dataset))
        if not 0 <= start_sample <= samples:
            raise UserError(
                f"cannot go on at sample {start_sample}: the training data has {samples}; was the run shortened?"
            )
        self._dataset = dataset
        self._workers = workers
        self._collate = collate
        self._layout = (micro_batch, accumulation, dp_rank, dp_size)
        self._size = samples
        self._samples = start_sample

    def state(self) -> dict[str, int]:
        """Samples consumed, over all ranks, by the steps yielded so far; what was read ahead is not among them."""
        return {"samples": self._samples}

    def __len__(self) -> int:
        """Steps still to come."""
        return len(self._sampler())

    def _sampler(self) -> StepSampler:
        return StepSampler(*self._layout, start=self._samples, samples=self._size)

    def __iter__(self) -> Iterator[list[Batch]]:
        sampler = self._sampler()
        loader: DataLoader[Item] = DataLoader(
            self._dataset,
            batch_sampler=cast(Any, sampler),
            num_workers=self._workers,
            collate_fn=self._collate,
            worker_init_fn=_ignore_signals,
            # Otherwise it draws from the global generator, and dropout would depend on when loaders are made.
            generator=torch.Generator(),
        )
        steps = iter(loader)
        # Python ends what processes are left by SIGTERM, to which these are deaf, and then waits for them without end.
        ending = Finalize(None, _end_workers, args=(steps,), exitpriority=BEFORE_QUEUES)
        try:
            for step in steps:
                self._samples += sampler.per_step
                yield split(step, sampler.micro_batch)
        finally:
            ending()


def split(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into batches of ``size`` sequences, without copying."""
    fields = (batch.ids, batch.labels, batch.real, batch.scored)
    return [Batch(*parts) for parts in zip(*(field.split(size) for field in fields), strict=True)]


def _end_workers(steps: Any) -> None:
    """End the processes of a torch DataLoader's iterator, if it has any.

    An exception's traceback keeps the iterator in a cycle. The garbage collector may take its queues first; the order
    to stop is then lost, and the process waits ten seconds for each worker at some unrelated moment.
    """
    if hasattr(steps, "_shutdown_workers"):
        steps._shutdown_workers()
        for worker in steps._workers:
            if worker.is_alive():  # stuck, and deaf to SIGTERM
                worker.kill()


def _ignore_signals(worker: int) -> None:
    """Leave requests to stop, which launchers send to all processes, to the trainer, which saves and then ends us."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class EvalLoader:
    """Iterates over the windows of a dataset, dealt to the ranks in turn.

    Together the ranks see every window once. All have the same number of batches of the same shape, the last
    filled up with padding, since with expert parallelism no rank may call the model less often than another.
    """

    dataset: EvalDataset
    micro_batch: int
    dp_rank: int
    dp_size: int

    def __len__(self) -> int:
        return -(-len(self.dataset) // (self.micro_batch * self.dp_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self.dp_size + self.dp_rank) * self.micro_batch
            yield collate([self.dataset[i] for i in range(first, first + self.micro_batch)])
