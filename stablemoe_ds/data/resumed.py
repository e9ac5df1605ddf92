"""What a continued run reports about the data that it has read, in tokens and epochs, before training continues."""

from __future__ import annotations

from stablemoe_ds.data.position import Position, SourcePosition


def resumption(before: Position, now: Position, seed: int) -> list[str]:
    """Lines for the user. before: the position of the checkpoint. now: the same, under the settings of this run."""
    lines = []
    for name in now.weights:
        here = now.sources[name]
        if name in before.sources:
            lines += _continued(here, before, now, seed)
        else:
            lines += _begun(here, before, now)
    for name in before.sources.keys() - now.weights.keys():
        there = before.sources[name]
        lines.append(f"data: {there.path} is no longer read; its position is kept: {_place(there)}")
    return lines


def _place(here: SourcePosition) -> str:
    read = max(0, here.epoch.read - here.epoch.carried)
    return f"epoch {here.epoch.number + 1}, {read:,} of {here.tokens:,} tokens read; {here.total:,} in all epochs"


def _continued(here: SourcePosition, before: Position, now: Position, seed: int) -> list[str]:
    lines = [f"data: {here.path}: {_place(here)}"]
    if before.length != now.length:
        lines.append(
            f"data: {here.path}: the {here.left:,} tokens that are left of this epoch are cut into sequences of "
            f"{now.length} instead of {before.length}: 0 tokens are read again, 0 left out"
        )
    if here.seed != seed:
        lines.append(f"data: {here.path}: its order stays that of seed {here.seed}, which it was begun with")
    return lines


def _begun(here: SourcePosition, before: Position, now: Position) -> list[str]:
    """A corpus that the run has not read; its path may have held another text before."""
    lines = [f"data: {here.path}: not read before, begins at its start"]
    for name, there in before.sources.items():
        if there.path == here.path and name not in now.weights:
            again = min(there.total, there.tokens, here.tokens)
            lines.append(
                f"WARNING: {here.path} holds another text than before, of which {there.total:,} tokens were read: as "
                f"far as the new text has the same, up to {again:,} tokens are read again in its first epoch"
            )
    return lines
