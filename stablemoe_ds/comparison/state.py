"""What a run of a suite has come to so far, read from its directory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from stablemoe_ds.comparison.suite import SuiteRun
from stablemoe_ds.config.complaints import show
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.metrics import MetricsLog
from stablemoe_ds.launch.restart import newest_saved

State = Literal["new", "begun", "finished"]
WITHOUT_EFFECT: dict[str, Any] = {
    "name": True,
    "run_dir": True,
    "logging": True,
    "checkpoint": True,
    "data": {"workers"},
    "parallel": {"timeout_minutes"},
}
"""Settings that change nothing of what is learned."""


def state_of(wanted: SuiteRun) -> State:
    """Finished: all updates made and the last validation, and test if there is one, written down.

    Raises UserError if the directory holds a run of other settings: to go on with it would compare something else.
    """
    saved = newest_saved(wanted.folder)
    if saved is None:
        return "new"
    if found := next(differences(wanted.run, saved.run), None):
        key, ours, theirs = found
        raise UserError(
            f"{wanted.folder}: holds a run with {key} {show(theirs)}, the suite has {show(ours)}: "
            "move that directory away, or give the suite another output"
        )
    steps = wanted.run.schedule.steps
    needed = {"valid", "test"} if wanted.run.data.test else {"valid"}
    last = {line["kind"] for line in MetricsLog(wanted.folder / "metrics.jsonl").read() if line["step"] == steps}
    return "finished" if saved.step == steps and needed <= last else "begun"


def differences(ours: RunConfig, theirs: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """(key, ours, theirs) of every setting that has an effect and is not the same."""
    one, other = (_flat(run.model_dump(mode="json", exclude=WITHOUT_EFFECT)) for run in (ours, theirs))
    for key in one.keys() | other.keys():
        if key == "model.vocab_size" and one[key] is None:
            continue  # the tokenizer has said it when the run began
        if key.startswith("stages.") and not ours.moe.facts.distilled:
            continue  # routers of one stage do not look at it
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Values by dotted key; a list is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found
