"""What a routing table is, alone and on a text: facts, and the same as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from stablemoe_ds.config.text_table import aligned
from stablemoe_ds.evaluation.report_text import bound_text, expert_lines
from stablemoe_ds.evaluation.specialisation import Piece, describe_experts, use_of_table
from stablemoe_ds.tables.counted_corpus import Corpus
from stablemoe_ds.tables.measures import measure
from stablemoe_ds.tables.split_ids import SplitIds
from stablemoe_ds.tables.table import RoutingTable


def table_facts(table: RoutingTable) -> dict[str, Any]:
    """What a table says of itself."""
    return {
        "layers": len(table.blocks),
        "blocks": list(table.blocks),
        "vocab_size": table.vocab_size,
        "top_k": table.top_k,
        "experts": table.experts,
        "tokenizer": table.tokenizer,
        "sha256": table.sha256,
        **({"split": _split_facts(table.split)} if table.split else {}),
        "made": dict(table.made),
    }


def _split_facts(split: SplitIds) -> dict[str, Any]:
    return {"ids": split.ids_J.tolist(), "rows": len(split.ids_J) + split.further_rows}


def measured_facts(table: RoutingTable, corpus: Corpus, piece: Piece, top: int) -> list[dict[str, Any]]:
    """Each layer on a text: load, its bound, cohesion, and a profile of each expert with ``top`` pieces."""
    counts = corpus.row_counts(table.split)
    uses = [use_of_table(table, layer, counts) for layer in range(len(table.blocks))]
    return [
        {**asdict(layer), "experts": [asdict(profile) for profile in describe_experts(use, piece, top)]}
        for layer, use in zip(measure(table, corpus), uses, strict=True)
    ]


def facts_text(facts: Mapping[str, Any]) -> str:
    """:func:`table_facts`, a line each; how the table was made as ``name value`` pairs."""
    shown = {**facts, "made": _made_text(facts["made"])}
    if split := facts.get("split"):
        shown["split"] = f"{len(split['ids'])} ids follow one of {split['rows']} rows, by the id before them"
    return aligned([[name, str(value)] for name, value in shown.items()])


def measured_text(layers: Sequence[Mapping[str, Any]], experts: bool = True) -> str:
    """:func:`measured_facts`, with or without a line for each expert."""
    lines: list[str] = []
    for layer in layers:
        lines += [
            "",
            f"MoE layer at block {layer['block']}: max/mean load {layer['max_load']:.2f}; "
            + bound_text(layer["max_load"], layer["least_load"]),
            f"Cohesion {layer['cohesion']:.3f}, at random {layer['cohesion_random']:.3f}: the share of what an id says "
            "about its neighbours that its expert still says",
        ]
        if experts:
            lines += ["", *expert_lines(layer["experts"], layer["max_load"])]
    return "\n".join(lines)


def _made_text(made: Mapping[str, Any]) -> str:
    if not made:
        return "not said"
    parts = []
    for name, value in made.items():
        if isinstance(value, Mapping):
            value = f"({_made_text(value)})" if value else "none"
        parts.append(f"{name} {value}")
    return ", ".join(parts)
