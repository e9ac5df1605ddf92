"""What splitting the commonest ids of a table has done to its load: facts, and the same as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stablemoe_ds.config.text_table import aligned
from stablemoe_ds.evaluation.specialisation import Piece
from stablemoe_ds.evaluation.table_report import facts_text, table_facts
from stablemoe_ds.tables.counted_corpus import Corpus
from stablemoe_ds.tables.table import RoutingTable, least_load


def split_facts(before: RoutingTable, after: RoutingTable, texts: Mapping[str, Corpus], piece: Piece) -> dict[str, Any]:
    """The table ``after``, its split ids, and the load of both on each text.

    piece: an id in readable form. Each load is the largest max/mean load of a layer; each bound is what the commonest
    id, or the commonest row, forces on any table with these rows.
    """
    assert after.split is not None
    experts, top_k = after.experts, after.top_k
    loads = []
    for name, corpus in texts.items():
        counts = corpus.row_counts(after.split)
        loads.append(
            {
                "text": name,
                "tokens": int(corpus.token_counts.sum()),
                "before": float(before.expert_load(corpus.token_counts).max()),
                "before_bound": least_load(corpus.token_counts, experts, top_k),
                "after": float(after.expert_load(counts).max()),
                "after_bound": least_load(counts, experts, top_k),
            }
        )
    return {**table_facts(after), "split_ids": _split_ids(after, texts["corpus"], piece), "loads": loads}


def _split_ids(table: RoutingTable, corpus: Corpus, piece: Piece) -> list[dict[str, Any]]:
    """Each split id: its share of the text's tokens, its rows, and how many experts serve it in the first layer."""
    assert table.split is not None
    share_V = corpus.token_counts / max(1, corpus.token_counts.sum())
    found = []
    for index in table.split.ids_J.tolist():
        rows = np.flatnonzero(table.id_of_row == index)
        experts = len(np.unique(table.expert_LVK[0, rows]))
        facts = {"id": index, "piece": piece(index), "share": float(share_V[index])}
        found.append({**facts, "rows": len(rows), "experts": experts})
    return sorted(found, key=lambda one: -one["share"])


def split_text(facts: Mapping[str, Any]) -> str:
    """:func:`split_facts` for a person."""
    ids = [["split id", "share of tokens", "rows", "experts"]]
    ids += [[one["piece"], f"{one['share']:.2%}", str(one["rows"]), str(one["experts"])] for one in facts["split_ids"]]
    loads = [["max/mean load on", "before", "at least", "after", "at least"]]
    for text in facts["loads"]:
        numbers = (text[name] for name in ("before", "before_bound", "after", "after_bound"))
        loads.append([f"{text['text']}, {text['tokens']:,} tokens", *(f"{number:.2f}" for number in numbers)])
    alone = {name: value for name, value in facts.items() if name not in ("split_ids", "loads")}
    return "\n".join([facts_text(alone), "", aligned(ids, right=(1, 2, 3)), "", aligned(loads, right=(1, 2, 3, 4))])
