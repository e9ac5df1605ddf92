"""How two routing tables differ, layer by layer: facts, and the same as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stablemoe_ds.config.text_table import aligned
from stablemoe_ds.evaluation.specialisation import Piece
from stablemoe_ds.tables.counted_corpus import Corpus
from stablemoe_ds.tables.measures import LayerDifference, difference, measure
from stablemoe_ds.tables.table import RoutingTable


def difference_facts(
    one: RoutingTable, other: RoutingTable, corpus: Corpus | None, piece: Piece, top: int
) -> dict[str, Any]:
    """Both tables, and for each layer what moved after the best matching of experts.

    With a text also load and cohesion of both, and the ``top`` ids of which most tokens moved. piece: an id in readable
    form.
    """
    moved = difference(one, other, corpus)
    layers: list[dict[str, Any]] = [
        {"block": layer.block, "ids_moved": layer.ids_moved, "tokens_moved": layer.tokens_moved} for layer in moved
    ]
    if corpus is not None:
        measured = zip(measure(one, corpus), measure(other, corpus), strict=True)
        for number, (layer, (left, right)) in enumerate(zip(layers, measured, strict=True)):
            layer |= {"load": [left.max_load, right.max_load], "cohesion": [left.cohesion, right.cohesion]}
            layer["moved"] = _heaviest(moved[number], number, (one, other), corpus, piece, top)
    return {"one": _shape(one), "other": _shape(other), "layers": layers}


def _shape(table: RoutingTable) -> dict[str, Any]:
    return {
        "sha256": table.sha256,
        "layers": len(table.blocks),
        "vocab_size": table.vocab_size,
        "top_k": table.top_k,
        "experts": table.experts,
        "builder": table.made.get("builder"),
    }


def _heaviest(
    layer: LayerDifference,
    number: int,
    tables: tuple[RoutingTable, RoutingTable],
    corpus: Corpus,
    piece: Piece,
    top: int,
) -> list[dict[str, Any]]:
    """The ids of which most tokens moved: how many of how many, and the id's experts by each table's own numbers."""
    assert layer.moved_V is not None
    heaviest = np.argsort(-layer.moved_V, kind="stable")[:top]
    return [
        {
            "id": index,
            "piece": piece(index),
            "count": int(corpus.token_counts[index]),
            "moved": float(layer.moved_V[index]),
            "experts": [np.unique(table.expert_LVK[number, table.id_of_row == index]).tolist() for table in tables],
        }
        for index in heaviest[layer.moved_V[heaviest] > 0].tolist()
    ]


def difference_text(facts: Mapping[str, Any]) -> str:
    """:func:`difference_facts` for a person."""
    one, other = facts["one"], facts["other"]
    rows = [["", "builder", "sha256", "layers", "ids", "experts of an id", "experts"]]
    rows += [[name, *_cells(shape)] for name, shape in (("one", one), ("other", other))]
    lines = [aligned(rows, right=(3, 4, 5, 6))]
    if one["experts"] != other["experts"]:
        fewer, more = sorted((one["experts"], other["experts"]))
        lines.append(
            f"No more than {fewer} of the {more} experts have a counterpart: the ids of the others count as moved"
        )
    for layer in facts["layers"]:
        lines += ["", *_layer_lines(layer)]
    return "\n".join(lines)


def _cells(shape: Mapping[str, Any]) -> list[str]:
    numbers = [str(shape[name]) for name in ("layers", "vocab_size", "top_k", "experts")]
    return [shape["builder"] or "not said", shape["sha256"][:12], *numbers]


def _layer_lines(layer: Mapping[str, Any]) -> list[str]:
    tokens = "" if layer["tokens_moved"] is None else f" and {layer['tokens_moved']:.1%} of tokens"
    lines = [f"MoE layer at block {layer['block']}: {layer['ids_moved']:.1%} of ids{tokens} at another expert"]
    if "load" in layer:
        lines.append("  max/mean load  {:.2f} and {:.2f}".format(*layer["load"]))
        lines.append("  cohesion       {:.3f} and {:.3f}".format(*layer["cohesion"]))
    if layer.get("moved"):
        rows = [["piece", "tokens", "moved", "experts in one", "in the other"]]
        for found in layer["moved"]:
            experts = [",".join(map(str, numbers)) for numbers in found["experts"]]
            rows.append([found["piece"], f"{found['count']:,}", f"{found['moved'] / found['count']:.0%}", *experts])
        lines.append(aligned(rows, right=(1, 2, 3, 4)))
    return lines
