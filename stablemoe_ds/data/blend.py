"""Corpora of a blend: what they are called, and what part of the sequences each gives."""

from __future__ import annotations

from collections.abc import Sequence

from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.corpus import PreparedInfo


def content(info: PreparedInfo) -> str:
    """Names a corpus by what it holds, wherever it is."""
    return f"{info.sha256[:16]}-{info.documents}"


def shares(infos: Sequence[PreparedInfo], sources: Sequence[Source]) -> dict[str, float]:
    """Part of each corpus in a blend, by content; one that is named twice has the sum of its weights."""
    weights = dict.fromkeys(map(content, infos), 0.0)
    total = sum(source.weight for source in sources)
    for info, source in zip(infos, sources, strict=True):
        weights[content(info)] += source.weight / total
    return weights
