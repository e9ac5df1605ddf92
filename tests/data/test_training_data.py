"""Training sequences of real corpora, and what a run that goes on says of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stablemoe_ds.config.batch_plan import batch_plan
from stablemoe_ds.config.schema import RunConfig, Source
from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.data.position import Position
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.data.training_data import TrainingData
from stablemoe_ds.errors import UserError
from tests.tiny import tiny_run

S = 16
PER_STEP = 8


def configured(folder: Path, *sources: tuple[str, float], **changes: Any) -> RunConfig:
    """A run over corpora and their weights. changes: seed, length, per_step (sequences), micro_batch, workers."""
    length = changes.get("length", S)
    return tiny_run(
        seed=changes.get("seed", 1),
        run_dir=str(folder),
        data={
            "train": [{"path": path, "weight": weight} for path, weight in sources],
            "sequence_length": length,
            "workers": changes.get("workers", 0),
        },
        schedule={"steps": changes.get("steps", 4), "tokens_per_step": length * changes.get("per_step", PER_STEP)},
        parallel={"micro_batch": changes.get("micro_batch")},
    )


def open_data(run: RunConfig, rank: int = 0, ranks: int = 1) -> TrainingData:
    return TrainingData(run, batch_plan(run, ranks), rank, ranks, None)


def micro_batches(data: TrainingData, position: Position, count: int) -> list[list[list[list[int]]]]:
    """By update and micro-batch, each sequence and the label behind its last token."""
    return [
        [torch.cat([b.ids, b.labels[:, -1:]], 1).tolist() for b in update] for update in data.updates(position, count)
    ]


def sequences(data: TrainingData, position: Position, count: int) -> list[list[int]]:
    return [row for update in micro_batches(data, position, count) for micro in update for row in micro]


def megatron(run: RunConfig, samples: int, folder: Path) -> list[list[int]]:
    """The same by megatron-core's own datasets, as versions up to 0.1.0 used them."""
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class NoTokenizer:
        unique_identifiers, vocab_size, eod, pad = "none", 350, -2, -1

    config = GPTDatasetConfig(
        random_seed=run.seed,
        sequence_length=run.data.sequence_length,
        blend=([source.path for source in run.data.train], None),
        split="1,0,0",
        path_to_cache=str(folder),
        tokenizer=NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    parts = []
    for source in run.data.train:
        info = PreparedInfo.read(source.path)
        documents = np.arange(info.documents, dtype=np.int32)
        parts.append(GPTDataset(IndexedDataset(source.path), source.path, documents, None, Split.train, config))
    config.path_to_cache = None
    weights = [source.weight for source in run.data.train]
    data = parts[0] if len(parts) == 1 else BlendedDataset(parts, weights, samples, config)
    return [[*data[i]["tokens"].tolist(), int(data[i]["labels"][-1])] for i in range(samples)]


def test_an_epoch_has_every_token_once(corpus: Callable[..., str], tmp_path: Path) -> None:
    """As an input and as a label; what is too short for a sequence comes first in the next epoch."""
    info = PreparedInfo.read(corpus("epoch"))
    data = open_data(configured(tmp_path, (info.prefix, 1), per_step=1))
    rest = info.tokens % S
    assert rest
    count = info.tokens // S + 1
    read = [batch for update in data.updates(data.start(), count) for batch in update]
    for rows in ([batch.ids for batch in read], [batch.labels for batch in read]):
        epoch = torch.cat([*rows[:-1], rows[-1][:, :rest]], 1)
        assert torch.equal(epoch.sort().values[0], torch.tensor(info.stream().astype(int)).sort().values)
    position = data.start()
    for _ in range(count):
        position = data.after(position)
    (source,) = position.sources.values()
    assert (source.epoch.number, source.epoch.carried, source.left) == (1, rest, info.tokens + rest - S)


@pytest.mark.parametrize("weights", [(1,), (2, 1), (0.3, 0.3, 0.4)])
def test_first_epoch_is_that_of_megatron(
    weights: tuple[float, ...], corpus: Callable[..., str], tmp_path: Path
) -> None:
    names = [corpus(name, 200 + 50 * n, 1000 * n) for n, name in enumerate(("left", "middle", "right")[: len(weights)])]
    run = configured(tmp_path, *zip(names, weights, strict=True))
    data = open_data(run)
    assert sequences(data, data.start(), 10) == megatron(run, 10 * PER_STEP, tmp_path / "index")


def test_layout_decides_only_who_reads_what(corpus: Callable[..., str], tmp_path: Path) -> None:
    sources = ((corpus("left"), 2), (corpus("right", 100, 700), 1))
    one = open_data(configured(tmp_path, *sources))
    rows = sequences(one, one.start(), 5)
    for ranks, micro_batch, workers in ((2, 4, 0), (2, 1, 2), (4, 2, 1), (8, 1, 0)):
        run = configured(tmp_path, *sources, micro_batch=micro_batch, workers=workers)
        parts = [open_data(run, rank, ranks) for rank in range(ranks)]
        shares = [micro_batches(part, part.start(), 5) for part in parts]
        dealt = [
            row
            for updates in zip(*shares, strict=True)
            for micro in zip(*updates, strict=True)
            for share in micro
            for row in share
        ]
        assert dealt == rows
        assert {str(part.after(part.start())) for part in parts} == {str(one.after(one.start()))}


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_at_a_position(workers: int, corpus: Callable[..., str], tmp_path: Path) -> None:
    """Over the end of an epoch, in updates of another size."""
    sources = ((corpus("short", 10), 1), (corpus("left"), 1))
    data = open_data(configured(tmp_path, *sources))
    whole = sequences(data, data.start(), 12)
    other = open_data(configured(tmp_path, *sources, per_step=4, workers=workers, steps=1000))
    position = data.after(data.start())
    assert sequences(data, data.start(), 1) + sequences(other, position, 22) == whole
    for _ in range(22):
        position = other.after(position)
    assert max(source.epoch.number for source in position.sources.values()) >= 2


def test_blend_honours_weights(corpus: Callable[..., str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = open_data(configured(tmp_path, (corpus("heavy", 300), 3), (corpus("light", 20, 9000), 1), length=32))
    light = [re.search(r"90\d\d:", tokenizer.decode(row)) is not None for row in sequences(data, data.start(), 25)]
    assert abs(sum(light) - 50) <= 2
    assert abs(sum(light[:100]) - 25) <= 2, "sources are not mixed evenly"


def test_a_corpus_that_is_named_twice_is_read_once(corpus: Callable[..., str], tmp_path: Path) -> None:
    path = corpus("twice")
    twice, once = open_data(configured(tmp_path, (path, 1), (path, 2))), open_data(configured(tmp_path, (path, 1)))
    assert sequences(twice, twice.start(), 4) == sequences(once, once.start(), 4)


def test_corpus_shorter_than_a_sequence(corpus: Callable[..., str], tmp_path: Path) -> None:
    info = PreparedInfo.read(corpus("tiny", 1))
    with pytest.raises(UserError, match=rf"has {info.tokens} tokens.*sequence_length={info.tokens} at most"):
        open_data(configured(tmp_path, (info.prefix, 1), length=info.tokens + 1))
    data = open_data(configured(tmp_path, (info.prefix, 1), length=info.tokens))
    assert len(sequences(data, data.start(), 2)) == 2 * PER_STEP


def resumed(data: TrainingData, position: Position, run: RunConfig) -> tuple[Position, str]:
    now, lines = data.resume(position, 0, run)
    return now, "\n".join(lines)


def test_says_where_it_goes_on(corpus: Callable[..., str], tmp_path: Path) -> None:
    path, other = corpus("left"), corpus("right", 100, 700)
    tokens = PreparedInfo.read(path).tokens
    run = configured(tmp_path, (path, 1))
    position = open_data(run).after(open_data(run).start())
    place = f"epoch 1, 128 of {tokens:,} tokens read; 128 in all epochs"
    _, said = resumed(open_data(configured(tmp_path, (path, 1), per_step=2, steps=9)), position, run)
    assert said == f"data: {path}: {place}"
    _, said = resumed(open_data(configured(tmp_path, (path, 1), length=32)), position, run)
    assert f"the {tokens - 128:,} tokens that are left of this epoch are cut into sequences of 32 instead of 16" in said
    assert "0 tokens are read again, 0 left out" in said
    _, said = resumed(open_data(configured(tmp_path, (path, 1), seed=2)), position, run)
    assert said.endswith(f"{path}: its order stays that of seed 1, which it was begun with")
    now, said = resumed(open_data(configured(tmp_path, (other, 1))), position, run)
    assert said == (
        f"data: {other}: not read before, begins at its start\n"
        f"data: {path} is no longer read; its position is kept: {place}"
    )
    assert now.tokens == 128


def test_a_corpus_is_known_by_what_it_holds(corpus: Callable[..., str], tmp_path: Path) -> None:
    path = corpus("edited")
    run = configured(tmp_path, (path, 1))
    position = open_data(run).after(open_data(run).start())
    moved = corpus("moved")
    now, said = resumed(open_data(configured(tmp_path, (moved, 1))), position, run)
    assert said.startswith(f"data: {moved}: epoch 1, 128 of ")
    assert [source.total for source in now.sources.values()] == [128]
    corpus("edited", 150)
    now, said = resumed(open_data(run), position, run)
    assert f"WARNING: {path} holds another text than before, of which 128 tokens were read" in said
    assert "up to 128 tokens are read again in its first epoch" in said
    assert [source.total for source in now.sources.values()] == [128, 0]


@pytest.mark.parametrize("weights", [(1,), (2, 1)])
def test_goes_on_from_counted_sequences(weights: tuple[float, ...], corpus: Callable[..., str], tmp_path: Path) -> None:
    """As checkpoints up to 0.1.0 have them; within the first epoch nothing is lost."""
    names = [corpus(name, 200 + 50 * n, 1000 * n) for n, name in enumerate(("left", "right")[: len(weights)])]
    run = configured(tmp_path, *zip(names, weights, strict=True))
    data = open_data(run)
    position, lines = data.resume(Position(), 43, run)
    assert not any("WARNING" in line for line in lines)
    assert position.tokens == 43 * S
    assert sequences(data, position, 5) == megatron(run, 43 + 5 * PER_STEP, tmp_path / "index")[43:]


def test_counted_sequences_of_several_epochs(corpus: Callable[..., str], tmp_path: Path) -> None:
    info = PreparedInfo.read(corpus("left"))
    run = configured(tmp_path, (info.prefix, 1), steps=1 + info.tokens // S // PER_STEP)
    count = info.tokens // S - 3
    position, lines = open_data(run).resume(Position(), count, run)
    left = info.tokens - count * S
    assert position.tokens == count * S
    assert f"of the {left} tokens that count as left of epoch 1, up to {left} may have been read" in lines[-1]
    gone = run.model_copy(update={"data": run.data.model_copy(update={"train": [Source(path="gone")]})})
    position, lines = open_data(run).resume(Position(), count, gone)
    assert position.tokens == 0
    assert lines == [f"data: {info.prefix}: not read before, begins at its start"]
