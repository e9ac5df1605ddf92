"""The position of a checkpoint that only counted sequences, as versions up to 0.1.0 did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

import numpy as np

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.blend import content, shares
from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.data.position import Position, SourcePosition
from stablemoe_ds.distributed.libraries import import_megatron


def position_of_samples(samples: int, run: RunConfig, infos: Sequence[PreparedInfo]) -> tuple[Position, list[str]]:
    """Where a run is that was trained on ``samples`` sequences, and lines that say what that assumes.

    run: as the checkpoint has it. infos: the corpora of today, which are taken for those of then if their paths are the
    same. Those versions shuffled all epochs of a run together, so the position is exact if there was only one.
    """
    length = run.data.sequence_length
    total = run.schedule.steps * run.schedule.tokens_per_step // length
    sources = run.data.train
    today, weight = {Path(info.prefix).resolve(): info for info in infos}, sum(source.weight for source in sources)
    position, known, lines = Position(length=length), [], []
    for source, count in zip(sources, _given([source.weight for source in sources], samples), strict=True):
        info = today.get(Path(source.path).resolve())
        if info is None:
            continue
        known.append(info)
        name = content(info)
        here = position.sources.get(name, SourcePosition(info.prefix, info.tokens, run.seed)).skip(length, count)
        position.sources[name], position.given[name] = here, position.given.get(name, 0) + count
        indexed = min(total, ceil(total * source.weight / weight) + len(sources))
        if indexed * length >= info.tokens or info.tokens % length == 0:
            again = min(here.left, here.epoch.read)
            lines.append(
                f"WARNING: the checkpoint is of a version that ordered the epochs of {info.prefix} in another way: of "
                f"the {here.left:,} tokens that count as left of epoch {here.epoch.number + 1}, up to {again:,} may "
                "have been read in it"
            )
    if len(known) == len(sources):
        position = replace(position, weights=shares(known, sources))
    return position, lines


def _given(weights: Sequence[float], samples: int) -> list[int]:
    """How many of the first ``samples`` sequences of megatron-core's blend each corpus gave."""
    import_megatron()
    from megatron.core.datasets import helpers
    from megatron.core.datasets.utils import normalize

    corpus, sample = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    helpers.build_blending_indices(corpus, sample, normalize(weights), len(weights), samples, False)
    return np.bincount(corpus, minlength=len(weights)).tolist()
