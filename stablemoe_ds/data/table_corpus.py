"""Prepared corpora as the routing tables' builders and measures see them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.corpus import read_sources, token_counts
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.counted_corpus import Corpus, IdStream


def table_corpus(
    sources: Sequence[Source], tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> Corpus:
    """A blend of corpora, weighted as in training; their ids stay on disk.

    vocab_size: ids of the model, if it has more than the tokenizer. The corpora are read through first, to see that the
    ids are those that were prepared.
    Raises UserError for a corpus that is missing, damaged, of another tokenizer, or of more ids than the model.
    """
    infos = read_sources(sources, tokenizer)
    largest = max(info.vocab_size for info in infos)
    if vocab_size is not None and vocab_size < largest:
        raise UserError(f"corpus {infos[0].prefix} was prepared with {largest} ids, the table is to have {vocab_size}")
    tokens, weights = sum(info.tokens for info in infos), sum(source.weight for source in sources)
    streams = []
    for source, info in zip(sources, infos, strict=True):
        info.verify()
        weight = source.weight / weights * tokens / info.tokens
        streams.append(IdStream(info.stream(), info.lengths(), weight))
    counts = token_counts(sources, tokenizer, vocab_size or largest)
    return Corpus(counts, streams, infos[0].tokenizer, text_digest(sources, tokenizer))


def text_digest(sources: Sequence[Source], tokenizer: Tokenizer | None = None) -> str:
    """What a table says of the text that it was made from: sha256 of the corpora's own and of their shares.

    Raises UserError for a corpus that is missing or of another tokenizer.
    """
    weights, digest = sum(source.weight for source in sources), hashlib.sha256()
    for source, info in zip(sources, read_sources(sources, tokenizer), strict=True):
        digest.update(f"{info.sha256} {source.weight / weights}\n".encode())
    return digest.hexdigest()
