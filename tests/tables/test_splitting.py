"""Tables with their hottest ids split: load on unseen text, and which rows and experts they get."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.builders import build_table
from stablemoe_ds.tables.counted_corpus import Corpus, IdStream
from stablemoe_ds.tables.split_ids import WHOLE
from stablemoe_ds.tables.splitting import split_table
from stablemoe_ds.tables.table import RoutingTable, least_load
from tests.tables.texts import corpus_of

VOCAB, EXPERTS, END = 120, 12, 0


def text(seed: int, documents: int = 300) -> Corpus:
    """Ids by Zipf's law, the commonest a sixth of them; every document of 100 ends with the same id."""
    random = np.random.default_rng(seed)
    share = 1 / (np.arange(1, VOCAB) + 0.5)
    ids_DS = random.choice(np.arange(1, VOCAB), (documents, 100), p=share / share.sum())
    ids_DS[:, -1] = END
    return corpus_of(IdStream(ids_DS.reshape(-1), np.full(documents, 100)), VOCAB)


KNOWN, UNSEEN = text(1), text(2, 100)


def even(top_k: int, blocks: tuple[int, ...] = (1,)) -> RoutingTable:
    return build_table("even", {}, KNOWN, experts=EXPERTS * top_k, top_k=top_k, blocks=blocks, seed=0)


def load(table: RoutingTable, corpus: Corpus) -> float:
    return float(table.expert_load(corpus.row_counts(table.split)).max())


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_comes_below_what_binds_every_table_of_whole_ids(top_k: int) -> None:
    before = even(top_k, (1, 3))
    after = split_table(before, KNOWN, 1.1)
    bound = least_load(UNSEEN.token_counts, EXPERTS * top_k, top_k)
    assert bound > 1.2
    assert load(before, UNSEEN) >= bound
    assert load(after, KNOWN) <= 1.1 + 1e-9
    assert load(after, UNSEEN) < 1.2 < bound
    assert all(len(set(row)) == top_k for layer in after.expert_LVK.tolist() for row in layer)
    assert after.made["builder"] == "split"
    assert after.made["table"]["sha256"] == before.sha256
    assert split_table(before, KNOWN, 1.1).sha256 == after.sha256, "the same each time"


def test_only_ids_that_alone_exceed_the_limit_are_split() -> None:
    after = split_table(even(1), KNOWN, 1.3)
    forced = KNOWN.token_counts * EXPERTS / KNOWN.token_counts.sum()
    assert after.split is not None
    assert after.split.ids_J.tolist() == np.flatnonzero(forced > 1.3).tolist()


def test_a_document_sees_nothing_of_the_one_before_it() -> None:
    """Its first token follows the same row as the first of a sequence."""
    split = split_table(even(1), KNOWN, 1.1).split
    assert split is not None
    assert split.row_JV[:, END].tolist() == split.ids_J.tolist()
    for index in split.ids_J:
        alone, behind_end = split.rows(np.array([index])), split.rows(np.array([5, END, index]))
        assert alone[0] == behind_end[2] == index


def test_rows_of_an_id_are_about_equally_heavy_and_shares_say_how_heavy() -> None:
    table = split_table(even(1), KNOWN, 1.1)
    assert table.split is not None
    counts = KNOWN.row_counts(table.split)
    for place, index in enumerate(table.split.ids_J):
        further = table.split.owner_Q == place
        of_rows = np.append(counts[VOCAB:][further], counts[index])
        assert len(of_rows) == np.ceil(KNOWN.token_counts[index] / (0.25 * 1.1 * KNOWN.token_counts.sum() / EXPERTS))
        heaviest_pair = KNOWN.count_before(np.array([index])).max()
        assert of_rows.max() - of_rows.min() <= heaviest_pair
        share = counts[VOCAB:][further] / KNOWN.token_counts[index]
        assert table.split.share_Q[further] / WHOLE == pytest.approx(share, abs=1e-3)
    assert table.expert_load(KNOWN.token_counts).max() == pytest.approx(load(table, KNOWN), abs=0.01)


@pytest.mark.parametrize("ids", [[0, 1] * 50, [0] * 100, [2, 0, 0, 1] * 25, [1, 2, 0, 0, 3, 0] * 9], ids=str)
def test_ids_that_come_behind_few_others_have_no_more_rows_than_those(ids: list[int]) -> None:
    corpus = corpus_of(IdStream(np.array(ids), np.array([len(ids)])), 4)
    plain = build_table("even", {}, corpus, experts=16, top_k=1, blocks=[1], seed=0)
    table = split_table(plain, corpus, 1.1)
    assert table.split is not None
    counts = corpus.row_counts(table.split)
    assert counts.sum() == len(ids)
    assert counts[4:].all(), "no further row is idle"
    for place, index in enumerate(table.split.ids_J):
        seen = np.count_nonzero(corpus.count_before(np.array([index])))
        assert 1 + (table.split.owner_Q == place).sum() <= max(1, seen)


def slow_pairs(ids: NDArray[np.int64], wanted: int) -> list[int]:
    counts = [0] * VOCAB
    for before, index in pairwise(ids):
        counts[before] += index == wanted
    return counts


def test_pairs_are_counted_in_pieces_and_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stablemoe_ds.tables.counted_corpus.PIECE", 1000)
    streams = [KNOWN.streams[0], IdStream(UNSEEN.streams[0].ids, UNSEEN.streams[0].lengths, 0.5)]
    counted = Corpus(KNOWN.token_counts, streams).count_before(np.array([1, 7]))
    for row, wanted in zip(counted, (1, 7), strict=True):
        parts = [np.array(slow_pairs(stream.ids, wanted)) * stream.weight for stream in streams]
        assert row.tolist() == (parts[0] + parts[1]).tolist()


def test_what_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"--max-load: got 9: the commonest id .* use 'stablemoe table build balanced'"):
        split_table(even(1), KNOWN, 9)
    with pytest.raises(UserError, match=r"splits \d+ ids already"):
        split_table(split_table(even(1), KNOWN, 1.1), KNOWN, 1.1)
    with pytest.raises(ValueError, match="counts alone"):
        split_table(even(1), Corpus(KNOWN.token_counts, (), "tokenizer"), 1.1)
