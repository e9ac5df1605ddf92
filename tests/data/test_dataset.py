from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.data.dataset import EvalDataset, build_train_dataset
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError

S = 32


def rows(dataset: Any) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset))]


def test_one_epoch_predicts_every_token_once(corpus: Callable[..., str], tmp_path: Path) -> None:
    info = PreparedInfo.read(corpus("epoch"))
    samples = (info.tokens - 1) // S
    data = build_train_dataset([Source(path=info.prefix)], S, samples, 1, tmp_path)
    assert len(data) == samples  # type: ignore[arg-type]
    seen: Counter[int] = Counter()
    for i in range(samples):
        item = data[i]
        assert item["tokens"][1:].tolist() == item["labels"][:-1].tolist()
        assert item["loss_mask"].all()
        seen.update(item["labels"].tolist())
    missing = Counter(info.stream().tolist()) - seen
    assert not seen - Counter(info.stream().tolist())
    assert missing.total() == info.tokens - samples * S


def test_order_follows_seed_and_content_only(corpus: Callable[..., str], tmp_path: Path) -> None:
    source = [Source(path=corpus("seeded"))]
    first = rows(build_train_dataset(source, S, 40, 1, tmp_path / "a"))
    assert rows(build_train_dataset(source, S, 40, 1, tmp_path / "a")) == first
    assert rows(build_train_dataset(source, S, 40, 1, tmp_path / "b")) == first
    assert rows(build_train_dataset(source, S, 40, 2, tmp_path / "a")) != first
    corpus("seeded", start=5000)
    assert rows(build_train_dataset(source, S, 40, 1, tmp_path / "a")) != first, "index of the old text was used"
    assert not list(tmp_path.glob("*/.index-*"))


def test_short_corpus_is_repeated(corpus: Callable[..., str], tmp_path: Path) -> None:
    info = PreparedInfo.read(corpus("short", 10))
    samples = 5 * info.tokens // S
    data = build_train_dataset([Source(path=info.prefix)], S, samples, 1, tmp_path)
    counts = np.bincount(np.concatenate(rows(data)), minlength=info.vocab_size)
    np.testing.assert_allclose(counts, 5 * info.token_counts(), atol=2 * S)


def test_blend_honours_weights(corpus: Callable[..., str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    sources = [Source(path=corpus("heavy", 300), weight=3.0), Source(path=corpus("light", 20, 9000), weight=1.0)]
    samples = 200
    data = build_train_dataset(sources, S, samples, 1, tmp_path)
    ids = rows(data)
    from_light = [re.search(r"90\d\d:", tokenizer.decode(row)) is not None for row in ids]
    assert len(ids) == samples
    assert abs(sum(from_light) - samples / 4) <= 2
    assert abs(sum(from_light[: samples // 2]) - samples / 8) <= 2, "sources are not mixed evenly"


def test_corpus_shorter_than_a_sequence(corpus: Callable[..., str], tmp_path: Path) -> None:
    info = PreparedInfo.read(corpus("tiny", 1))
    with pytest.raises(UserError, match=rf"{info.tokens} tokens.*sequence_length={info.tokens - 1} at most"):
        build_train_dataset([Source(path=info.prefix)], info.tokens, 4, 1, tmp_path)
    assert len(rows(build_train_dataset([Source(path=info.prefix)], info.tokens - 1, 4, 1, tmp_path))) == 4


def test_unwritable_cache(corpus: Callable[..., str], text_file: Path) -> None:
    with pytest.raises(UserError, match="cannot write the sample index"):
        build_train_dataset([Source(path=corpus("cacheless"))], S, 4, 1, text_file / "cache")


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
