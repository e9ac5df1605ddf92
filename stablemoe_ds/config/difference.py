"""The settings in which two runs differ, as far as they affect what is learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stablemoe_ds.config.idle_settings import idle_keys
from stablemoe_ds.config.schema import RunConfig

WITHOUT_EFFECT: dict[str, Any] = {
    "name": True,
    "run_dir": True,
    "logging": True,
    "checkpoint": True,
    "data": {"workers"},
    "parallel": {"timeout_minutes"},
}
"""Settings that change nothing of what is learned."""


def differences(ours: RunConfig, theirs: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """(key, ours, theirs) of every setting that has an effect and is not the same."""
    one, other = (flat(run.model_dump(mode="json", exclude=WITHOUT_EFFECT)) for run in (ours, theirs))
    idle = idle_keys(ours.moe)
    for key in sorted(one.keys() | other.keys()):
        if key == "model.vocab_size" and one[key] is None:
            continue  # the tokenizer has said it when the run began
        if key in idle:
            continue  # this router does not look at it
        if key.startswith("stages.") and not ours.moe.facts.distilled:
            continue  # routers of one stage do not look at it
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The values of a tree by dotted key; a list is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return found
