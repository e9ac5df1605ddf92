"""Tables that are not learned, by name: from a corpus, from counts of its ids, or from neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.config.table_options import CooccurrenceOptions, CrossedOptions, ScatteredOptions, read_options
from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.cooccurrence import cooccurrence_table, crossed_table, scattered_table
from stablemoe_ds.tables.counted_corpus import Corpus
from stablemoe_ds.tables.table import RoutingTable

if TYPE_CHECKING:
    from stablemoe_ds.config.schema import RunConfig


def build_table(
    builder: str,
    options: Mapping[str, Any],
    corpus: Corpus,
    *,
    experts: int,
    top_k: int,
    blocks: Sequence[int],
    seed: int,
) -> RoutingTable:
    """The table that a builder makes of a corpus, with a layer for each of ``blocks``.

    builder: one of ``config.table_options.OPTIONS``. options: the builder's; what is not given has its default. The
    same arguments give the same table.
    Raises UserError for a builder or option that does not exist, a value that is out of range, or a corpus of counts
    alone where neighbours are needed.
    """
    if experts < 1:
        raise UserError(f"table builder {builder}: experts are {experts}, expected 1 or more")
    if not 1 <= top_k <= experts:
        raise UserError(f"table builder {builder}: top_k is {top_k}, expected 1 to the number of experts, {experts}")
    checked = read_options(builder, options, top_k)
    if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 1:
        raise UserError(
            f"table builder {builder}: layers are {list(blocks)}, expected block numbers from 1 on, ascending, e.g. [2]"
        )
    if seed < 0:
        raise UserError(f"table builder {builder}: seed is {seed}, expected 0 or more")
    shape = (experts, top_k, len(blocks), seed)
    if isinstance(checked, ScatteredOptions) and not corpus.streams:
        raise UserError(f"table builder {builder} counts neighbours: it needs a prepared corpus, not counts alone")
    match checked:
        case CrossedOptions():
            expert_LVK = crossed_table(corpus, checked, *shape)
        case CooccurrenceOptions():
            expert_LVK = cooccurrence_table(corpus, checked, *shape)
        case ScatteredOptions():
            expert_LVK = scattered_table(corpus, checked, *shape)
        case _ if builder == "even":
            expert_LVK = even_table(corpus.token_counts, *shape)
        case _:
            expert_LVK = random_table(corpus.vocab_size, *shape)
    made = how_made(builder, options=checked.model_dump(), seed=seed, corpus=corpus.fingerprint)
    return RoutingTable(expert_LVK, experts, tuple(blocks), corpus.tokenizer, made)


def how_made(builder: str, **facts: Any) -> dict[str, Any]:
    """What a table says of itself: builder, what it was made of, and the version of this package."""
    try:
        version = metadata.version("stablemoe_ds")
    except metadata.PackageNotFoundError:  # imported from a folder, not installed
        version = "unknown"
    return {"builder": builder, **facts, "version": version}


def of_run(run: RunConfig, text: str = "") -> dict[str, Any]:
    """What a table that comes from a run says of it, for :func:`how_made`. text: digest of what was read, if any."""
    facts = {"run": run.directory, "router": run.moe.router}
    return {**facts, "corpus": text} if text else facts


def random_table(vocab: int, experts: int, top_k: int, layers: int, seed: int) -> NDArray[np.int32]:
    """int32 [L, V, K]: different experts drawn uniformly for each id, in each layer by itself."""
    draw = np.random.default_rng(seed).random((layers, vocab, experts))
    return np.ascontiguousarray(draw.argsort(-1, kind="stable")[..., :top_k], dtype=np.int32)


def even_table(token_counts: NDArray[np.int64], experts: int, top_k: int, layers: int, seed: int) -> NDArray[np.int32]:
    """int32 [L, V, K]: the heaviest id first, each to the experts with the fewest tokens so far.

    token_counts: int64 [V]. Ids of equal count come in random order, and so do experts of equal load.
    """
    random = np.random.default_rng(seed)
    table_LVK = np.empty((layers, len(token_counts), top_k), dtype=np.int32)
    for layer in range(layers):
        load_N = random.random(experts) * 1e-6
        for index in np.lexsort((random.random(len(token_counts)), -token_counts)):
            emptiest = np.argsort(load_N, kind="stable")[:top_k]
            table_LVK[layer, index] = emptiest
            # Ids that do not occur are spread as well: they weigh a little.
            load_N[emptiest] += max(int(token_counts[index]), 1e-3)
    return table_LVK
