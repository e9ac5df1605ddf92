from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.data.dataset import EvalDataset, Item
from stablemoe_ds.data.loader import Deal, EvalLoader, TrainLoader, collate

S = 4


class Numbered(Dataset[Item]):
    """Sample n is a sequence of n's."""

    def __init__(self, samples: int, broken: int | None = None) -> None:
        self.samples = samples
        self.broken = broken

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Item:
        if index == self.broken:
            raise ValueError("sample is broken")
        return {"tokens": torch.full((S,), index), "labels": torch.full((S,), index + 1), "loss_mask": torch.ones(S)}


def loader(
    samples: int,
    micro_batch: int,
    accumulation: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    broken: int | None = None,
    collate: Callable[[Sequence[Item]], Batch] = collate,
) -> TrainLoader[int]:
    """As many whole steps as there are in so many samples."""
    deal, step = Deal(micro_batch, accumulation, rank, ranks), micro_batch * accumulation * ranks
    shares = (deal.share(range(first, first + step)) for first in range(0, samples - step + 1, step))
    return TrainLoader(Numbered(samples, broken), shares, micro_batch, workers, collate)


def read(loader: Iterable[list[Batch]], steps: int | None = None) -> list[list[list[int]]]:
    """Sample numbers by step and accumulation step."""
    return [[batch.ids[:, 0].tolist() for batch in step] for step in islice(loader, steps)]


def test_batches() -> None:
    step = next(iter(loader(50, 3, 2)))
    assert len(step) == 2
    for batch in step:
        assert batch.ids.shape == batch.labels.shape == batch.real.shape == batch.scored.shape == (3, S)
        assert (batch.ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
        assert batch.real.all()
        assert batch.scored.all()
        assert torch.equal(batch.labels, batch.ids + 1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_together_read_what_one_reads(ranks: int) -> None:
    one = read(loader(100, 6, 2))
    parts = [read(loader(100, 6 // ranks, 2, r, ranks)) for r in range(ranks)]
    together = [
        [[n for part in micro for n in part] for micro in zip(*step, strict=True)] for step in zip(*parts, strict=True)
    ]
    assert together == one
    assert [n for step in one for micro in step for n in micro] == list(range(96))


def test_ranks_deal_without_looking_further_than_their_step() -> None:
    assert Deal(2, 2, 1, 2).share("abcdefgh") == ["c", "d", "g", "h"]


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_worker_is_raised_here(workers: int) -> None:
    with pytest.raises(ValueError, match="sample is broken"):
        read(loader(20, 2, 2, workers=workers, broken=9))


@pytest.mark.parametrize("broken", [None, 9])
def test_workers_end_with_the_iteration(broken: int | None) -> None:
    """Also while an exception still refers to the iteration: left to the garbage collector they stay on."""
    others = set(multiprocessing.active_children())
    steps = iter(loader(400, 2, 2, workers=2, broken=broken))
    next(steps)
    assert len(set(multiprocessing.active_children()) - others) == 2
    if broken is None:
        steps.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(ValueError, match="sample is broken") as caught:
            list(steps)
        assert caught.tb is not None
    assert set(multiprocessing.active_children()) <= others


LEFT_BEHIND = """
import gc
from tests.data.test_loader import loader
gc.disable()
steps = iter(loader(400, 2, 2, workers=2))
next(steps)
cycle = [steps]
cycle.append(cycle)
"""


def test_workers_end_with_the_process() -> None:
    """Also when something refers to the iteration to the very end: they are deaf to what Python ends processes by."""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", LEFT_BEHIND], cwd=root, check=True, timeout=200)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    read(loader(20, 2, 2))
    assert torch.equal(torch.get_rng_state(), before)


def _shift(items: Sequence[Item]) -> Batch:
    batch = collate(items)
    return Batch(batch.ids + 1000, batch.labels, batch.real, batch.scored)


def test_own_collate_runs_in_the_worker() -> None:
    assert read(loader(4, 2, 2, workers=1, collate=_shift)) == [[[1000, 1001], [1002, 1003]]]


def _pairs(batch: Batch) -> Tensor:
    return torch.stack((batch.ids[batch.scored], batch.labels[batch.scored]), dim=1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("length", [5, 64])
def test_evaluation_covers_every_token_once(corpus: Callable[..., str], ranks: int, length: int) -> None:
    info = PreparedInfo.read(corpus("evaluated", 23))
    data = EvalDataset([Source(path=info.prefix)], length)
    loaders = [EvalLoader(data, 2, rank, ranks) for rank in range(ranks)]
    batches = [list(loader) for loader in loaders]
    assert {len(b) for b in batches} == {len(loaders[0])}
    assert all(batch.ids.shape == (2, length) for rank in batches for batch in rank)
    assert all(torch.equal(batch.real, batch.scored) for rank in batches for batch in rank)
    found = torch.cat([_pairs(batch) for turn in zip(*batches, strict=True) for batch in turn])
    stream = torch.tensor(info.stream().astype(int))
    assert torch.equal(found, torch.stack((stream[:-1], stream[1:]), dim=1))


def test_evaluation_with_more_ranks_than_windows(corpus: Callable[..., str]) -> None:
    data = EvalDataset([Source(path=corpus("few", 1))], 1000)
    first, last = (list(EvalLoader(data, 2, rank, 4)) for rank in (0, 3))
    assert len(first) == len(last) == 1
    assert first[0].scored.sum() == data.tokens
    assert not last[0].real.any()
