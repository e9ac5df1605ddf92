"""What happens between updates, one concern a class; :class:`~stablemoe_ds.training.trainer.Trainer` calls them."""

from __future__ import annotations

from dataclasses import dataclass

from stablemoe_ds.checkpoint.reader import Progress
from stablemoe_ds.routing.source import LEARNED, RouteSource
from stablemoe_ds.training.update_figures import UpdateFigures


@dataclass
class RunState:
    """What changes as a run goes on: how far it is, and where its routes come from now."""

    progress: Progress
    routes: RouteSource = LEARNED


@dataclass(frozen=True)
class Update:
    """An update that was made.

    step: its number, from 1. lr: the learning rate. figures: what it saw, on the device until they are read. dropped:
    it changed nothing, since its numbers went wrong. last: the run has no other. stop: a rank was asked to stop, and
    this is where the run ends. seconds: from asking for its batch to here.
    """

    step: int
    lr: float
    figures: UpdateFigures
    dropped: bool
    last: bool
    stop: bool
    seconds: float

    @property
    def ends(self) -> bool:
        return self.last or self.stop


class Callback:
    """A concern of a run besides its updates. Every rank calls all of them, in the order of one list."""

    def begin(self) -> None:
        """Training goes on from where ``RunState`` says, at the start of a run or after it went back."""

    def after_update(self, update: Update) -> None:
        """An update was made, or dropped."""

    def finish(self) -> None:
        """The last update of the run was made."""
