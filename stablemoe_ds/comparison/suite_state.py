"""Whether a run of a suite is finished, read from its directory."""

from __future__ import annotations

from typing import Literal

from stablemoe_ds.comparison.suite import SuiteRun
from stablemoe_ds.config.difference import differences
from stablemoe_ds.config.messages import show_both
from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.metrics import MetricsLog
from stablemoe_ds.run_directory.progress import newest_saved

State = Literal["new", "begun", "finished"]


def state_of(wanted: SuiteRun) -> State:
    """Finished: all updates made and the last validation, and test if there is one, written down.

    Raises UserError if the directory holds a run of other settings: to go on with it would compare something else.
    """
    saved = newest_saved(wanted.folder)
    if saved is None:
        return "new"
    if found := next(differences(wanted.run, saved.run), None):
        key, *values = found
        ours, theirs = show_both(*values)
        raise UserError(
            f"{wanted.folder}: holds a run with {key} {theirs}, the suite has {ours}: "
            "move that directory away, or give the suite another output"
        )
    steps = wanted.run.schedule.steps
    needed = {"valid", "test"} if wanted.run.data.test else {"valid"}
    last = {line["kind"] for line in MetricsLog(wanted.folder / "metrics.jsonl").read() if line["step"] == steps}
    return "finished" if saved.step == steps and needed <= last else "begun"
