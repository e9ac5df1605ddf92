from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.batch import Batch
from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.data.dataset import EvalDataset, Item, build_train_dataset
from stablemoe_ds.data.loader import EvalLoader, TrainLoader, collate
from stablemoe_ds.errors import UserError

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


def read(loader: TrainLoader, steps: int | None = None) -> list[list[list[int]]]:
    """Sample numbers by step and accumulation step."""
    return [[batch.ids[:, 0].tolist() for batch in step] for step in islice(loader, steps)]


def test_batches() -> None:
    step = next(iter(TrainLoader(Numbered(50), 3, 2, 0, 1)))
    assert len(step) == 2
    for batch in step:
        assert batch.ids.shape == batch.labels.shape == batch.real.shape == batch.scored.shape == (3, S)
        assert (batch.ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
        assert batch.real.all()
        assert batch.scored.all()
        assert torch.equal(batch.labels, batch.ids + 1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_together_read_what_one_reads(ranks: int) -> None:
    one = read(TrainLoader(Numbered(100), 6, 2, 0, 1))
    parts = [read(TrainLoader(Numbered(100), 6 // ranks, 2, r, ranks)) for r in range(ranks)]
    together = [
        [[n for part in micro for n in part] for micro in zip(*step, strict=True)] for step in zip(*parts, strict=True)
    ]
    assert together == one
    assert [n for step in one for micro in step for n in micro] == list(range(96))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_equals_uninterrupted(workers: int) -> None:
    whole = read(TrainLoader(Numbered(70), 2, 2, 1, 2))
    loader = TrainLoader(Numbered(70), 2, 2, 1, 2, workers=workers)
    assert loader.state() == {"samples": 0}
    start = read(loader, 3)
    assert loader.state() == {"samples": 24}, "what was read ahead must not count"
    resumed = TrainLoader(Numbered(70), 2, 2, 1, 2, start_sample=loader.state()["samples"], workers=workers)
    assert len(resumed) == len(whole) - 3
    assert start + read(resumed) == whole
    assert start + read(loader) == whole, "iterating anew goes on"


def test_state_counts_the_step_in_hand() -> None:
    loader = TrainLoader(Numbered(20), 2, 1, 0, 2)
    assert [loader.state()["samples"] for _ in loader] == [4, 8, 12, 16, 20]


def test_start_outside_the_data() -> None:
    assert read(TrainLoader(Numbered(8), 2, 1, 0, 1, start_sample=8)) == []
    with pytest.raises(UserError, match="sample 9: the training data has 8"):
        TrainLoader(Numbered(8), 2, 1, 0, 1, start_sample=9)


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_worker_is_raised_here(workers: int) -> None:
    loader = TrainLoader(Numbered(20, broken=9), 2, 2, 0, 1, workers=workers)
    with pytest.raises(ValueError, match="sample is broken"):
        read(loader)
    assert loader.state() == {"samples": 8}


@pytest.mark.parametrize("broken", [None, 9])
def test_workers_end_with_the_iteration(broken: int | None) -> None:
    """Also while an exception still refers to the iteration: left to the garbage collector they stay on."""
    others = set(multiprocessing.active_children())
    steps = iter(TrainLoader(Numbered(400, broken=broken), 2, 2, 0, 1, workers=2))
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
from tests.data.test_loader import Numbered, TrainLoader
gc.disable()
steps = iter(TrainLoader(Numbered(400), 2, 2, 0, 1, workers=2))
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
    read(TrainLoader(Numbered(20), 2, 2, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)


def _shift(items: Sequence[Item]) -> Batch:
    batch = collate(items)
    return Batch(batch.ids + 1000, batch.labels, batch.real, batch.scored)


def test_own_collate_runs_in_the_worker() -> None:
    assert read(TrainLoader(Numbered(4), 2, 2, 0, 1, workers=1, collate=_shift)) == [[[1000, 1001], [1002, 1003]]]


def test_real_corpus_through_workers(corpus: Callable[..., str], tmp_path: Path) -> None:
    sources = [Source(path=corpus("left")), Source(path=corpus("right", 100, 700))]
    data = build_train_dataset(sources, 16, 24, 1, tmp_path)
    inline, ahead = (list(TrainLoader(data, 2, 2, 0, 2, workers=w)) for w in (0, 2))
    assert len(inline) == len(ahead) == 3
    for step, other in zip(inline, ahead, strict=True):
        assert all(
            torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels) for a, b in zip(step, other, strict=True)
        )


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
