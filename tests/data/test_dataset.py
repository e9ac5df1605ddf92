from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.data.dataset import EvalDataset


@pytest.mark.parametrize("length", [1, 7, 32, 10_000])
def test_evaluation_predicts_all_but_the_first_once(corpus: Callable[..., str], length: int) -> None:
    infos = [PreparedInfo.read(corpus("first", 30)), PreparedInfo.read(corpus("second", 11, 400))]
    data = EvalDataset([Source(path=i.prefix) for i in infos], length)
    items = [data[i] for i in range(len(data))]
    mask = torch.stack([item["loss_mask"] for item in items]).bool()
    labels = torch.stack([item["labels"] for item in items])[mask]
    ids = torch.stack([item["tokens"] for item in items])[mask]
    assert labels.tolist() == [t for info in infos for t in info.stream()[1:].tolist()]
    assert ids.tolist() == [t for info in infos for t in info.stream()[:-1].tolist()]
    assert data.tokens == mask.sum() == sum(i.tokens - 1 for i in infos)
    assert data.words == sum(i.words for i in infos)


@pytest.mark.parametrize("part", [1, 50, 150, 10_000])
def test_evaluation_of_a_part(corpus: Callable[..., str], part: int) -> None:
    infos = [PreparedInfo.read(corpus("first", 10)), PreparedInfo.read(corpus("second", 11, 400))]
    data = EvalDataset([Source(path=i.prefix) for i in infos], 16, max_tokens=part)
    every = sum(i.tokens - 1 for i in infos)
    assert data.tokens == min(part, every)
    assert sum(int(data[i]["loss_mask"].sum()) for i in range(len(data))) == data.tokens
    assert all(data[i]["loss_mask"].any() for i in range(len(data)))
    assert (data.words is None) == (part < every)
