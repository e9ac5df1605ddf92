"""Corpora on disk as tables see them: documents, weights, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.corpus import PreparedInfo, token_counts
from stablemoe_ds.data.prepare import prepare
from stablemoe_ds.data.table_corpus import table_corpus
from stablemoe_ds.data.tokenizer import Tokenizer, train_tokenizer
from stablemoe_ds.errors import UserError
from tests.training.runs import TinyData, tiny_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return tiny_data(tmp_path_factory.getbasetemp() / "tiny-data")


@pytest.fixture
def lines(data: TinyData, tmp_path: Path) -> PreparedInfo:
    """A corpus of many documents, a line each."""
    text = tmp_path / "lines.txt"
    text.write_text("one two\nthree\n\nfour five six\none two\n")
    return prepare([text], Tokenizer(data.tokenizer), tmp_path / "lines", documents="line")


def test_neighbours_are_those_of_the_documents(data: TinyData, lines: PreparedInfo) -> None:
    tokenizer = Tokenizer(data.tokenizer)
    corpus = table_corpus([Source(path=lines.prefix)], tokenizer)
    wanted = np.zeros((tokenizer.vocab_size,) * 2)
    for line in ("one two", "three", "four five six", "one two"):
        ids = [*tokenizer.encode(line), tokenizer.eos_id]
        np.add.at(wanted, (ids[:-1], ids[1:]), 1)
    assert lines.lengths().tolist() == [
        len(tokenizer.encode(line)) + 1 for line in ("one two", "three", "four five six", "one two")
    ]
    assert np.array_equal(corpus.followers().toarray(), wanted)
    assert not corpus.followers()[[tokenizer.eos_id]].nnz, "nothing follows the end of a document"


def test_a_blend_counts_as_in_training(data: TinyData) -> None:
    sources = [Source(path=data.train, weight=3), Source(path=data.valid)]
    corpus = table_corpus(sources)
    assert np.array_equal(corpus.token_counts, token_counts(sources, None, corpus.vocab_size))
    followers, pairs = corpus.followers(), corpus.token_counts.sum()
    alone = [table_corpus([source]).followers().sum() for source in sources]
    by_stream = [stream.weight * count for stream, count in zip(corpus.streams, alone, strict=True)]
    assert followers.sum() == pytest.approx(sum(by_stream))
    assert by_stream[0] / pairs == pytest.approx(0.75, abs=0.01)


def test_a_model_may_have_more_ids_than_the_tokenizer(data: TinyData) -> None:
    small = table_corpus([Source(path=data.train)])
    large = table_corpus([Source(path=data.train)], vocab_size=small.vocab_size + 32)
    assert large.vocab_size == small.vocab_size + 32
    assert large.followers().shape == (large.vocab_size,) * 2
    assert np.array_equal(large.token_counts[: small.vocab_size], small.token_counts)
    with pytest.raises(UserError, match="the table is to have 10"):
        table_corpus([Source(path=data.train)], vocab_size=10)


def test_fingerprint_is_of_the_text_and_its_weights(data: TinyData) -> None:
    def fingerprint(*sources: Source) -> str:
        return table_corpus(list(sources)).fingerprint

    one, other = Source(path=data.train), Source(path=data.valid)
    assert fingerprint(one) == fingerprint(one.model_copy(update={"weight": 2.0}))
    texts = [(one,), (other,), (one, other), (one.model_copy(update={"weight": 2.0}), other)]
    assert len({fingerprint(*sources) for sources in texts}) == len(texts)


def test_a_corpus_of_another_tokenizer_is_refused(data: TinyData, tmp_path: Path) -> None:
    other = train_tokenizer([data.text], tmp_path / "other.model", 400)
    with pytest.raises(UserError, match=r"was made by tokenizer .* name the tokenizer it was made by"):
        table_corpus([Source(path=data.train)], other)


def test_damaged_ids_are_refused(lines: PreparedInfo) -> None:
    path = lines.path("bin")
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(UserError, match="damaged"):
        table_corpus([Source(path=lines.prefix)])
