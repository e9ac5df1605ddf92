"""From datasets to batches: who gets which sequence, and processes that read ahead."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any, Generic, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.dataset import EvalDataset, Item

Index = TypeVar("Index")
"""What a dataset names an item by."""
BEFORE_QUEUES = 100
"""Priority at exit. At 10 multiprocessing closes its queues, and an order to stop would no longer arrive."""


def collate(items: Sequence[Item]) -> Batch:
    """Stack items into a batch; a token whose loss is masked is padding."""
    real = torch.stack([item["loss_mask"] for item in items]).bool()
    ids, labels = (torch.stack([item[name] for item in items]) for name in ("tokens", "labels"))
    return Batch(ids=ids, labels=labels, real=real, scored=real)


@dataclass(frozen=True)
class Deal:
    """Who reads which sequences of an update of micro_batch * accumulation * ranks.

    Accumulation step m takes the m-th slice of micro_batch * ranks of them, and of that rank r the r-th slice: so the
    ranks together see the same micro-batches in the same order, however many ranks there are.
    """

    micro_batch: int
    accumulation: int
    rank: int
    ranks: int

    def share(self, update: Sequence[Index]) -> list[Index]:
        """This rank's sequences of an update."""
        first, stride = self.rank * self.micro_batch, self.micro_batch * self.ranks
        slices = (first + m * stride for m in range(self.accumulation))
        return [index for low in slices for index in update[low : low + self.micro_batch]]


class TrainLoader(Generic[Index]):
    """Iterates over optimizer steps, each a list of batches of ``micro_batch`` sequences.

    steps: for each step, which sequences of ``dataset`` this rank reads; looked at some steps ahead.
    workers: processes that read ahead; 0 reads inline. What a worker raises is raised here, with its traceback.
    collate: turns the items of one step into one batch, in the worker.
    """

    def __init__(
        self,
        dataset: Dataset[Item],
        steps: Iterable[Sequence[Index]],
        micro_batch: int,
        workers: int = 0,
        collate: Callable[[Sequence[Item]], Batch] = collate,
    ) -> None:
        self._dataset, self._steps, self._micro_batch = dataset, steps, micro_batch
        self._workers, self._collate = workers, collate

    def __iter__(self) -> Iterator[list[Batch]]:
        loader: DataLoader[Item] = DataLoader(
            self._dataset,
            batch_sampler=cast(Any, self._steps),
            num_workers=self._workers,
            collate_fn=self._collate,
            worker_init_fn=_ignore_signals,
            # Otherwise it draws from the global generator, and dropout would depend on when loaders are made.
            generator=torch.Generator(),
        )
        steps = iter(loader)
        # Python ends remaining processes with SIGTERM, which these ignore, and then waits for them forever.
        ending = Finalize(None, _end_workers, args=(steps,), exitpriority=BEFORE_QUEUES)
        try:
            for step in steps:
                yield split(step, self._micro_batch)
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
            if worker.is_alive():  # stuck, and it ignores SIGTERM
                worker.kill()


def _ignore_signals(worker: int) -> None:
    """Ignore requests to stop, which launchers send to all processes: the trainer saves, then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class EvalLoader:
    """Iterates over the windows of a dataset, dealt to the readers in turn.

    Together the readers see every window once. All have the same number of batches of the same shape, the last
    filled up with padding, since with expert parallelism no rank may call the model less often than another.
    A reader is a data rank, or several ranks that share sequences: part, parts, as in :meth:`Batch.part`.
    """

    dataset: EvalDataset
    micro_batch: int
    dp_rank: int
    dp_size: int
    part: int = 0
    parts: int = 1

    def __len__(self) -> int:
        return -(-len(self.dataset) // (self.micro_batch * self.dp_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self.dp_size + self.dp_rank) * self.micro_batch
            whole = collate([self.dataset[i] for i in range(first, first + self.micro_batch)])
            yield whole.part(self.part, self.parts)
