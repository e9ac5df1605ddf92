"""When a run saves itself, and what it says of that."""

from __future__ import annotations

from collections.abc import Mapping

from stablemoe_ds.checkpoint.saver import Saved, Saver
from stablemoe_ds.config.schema import CheckpointConfig
from stablemoe_ds.training.callback import Callback, RunState, Update
from stablemoe_ds.training.engine import Engine
from stablemoe_ds.training.reporter import Reporter


class Saving(Callback):
    """A checkpoint every ``checkpoint.every`` updates, and where the run ends.

    step: of the newest checkpoint.
    """

    def __init__(
        self,
        settings: CheckpointConfig,
        state: RunState,
        engine: Engine,
        tokenizer: str,
        attached: Mapping[str, bytes],
        reporter: Reporter,
    ) -> None:
        """Collective. tokenizer: its fingerprint. attached: content of the files that a checkpoint carries, by name."""
        self._settings, self._state, self._reporter = settings, state, reporter
        self._saver = Saver(engine, tokenizer, self._tell, attached)
        self.step = 0

    def after_update(self, update: Update) -> None:
        """Raises OSError if the last checkpoint of a run cannot be written."""
        self._saver.poll()
        if not (update.ends or (self._settings.every and update.step % self._settings.every == 0)):
            return
        if update.dropped and not update.last:
            return  # if it is the weights that are wrong, they must not become the newest checkpoint
        self._saver.begin(self._state.progress, self._state.routes.table)
        if update.ends or not self._settings.asynchronous:
            saved = self.wait()
            if update.ends and saved is not None and saved.error is not None:
                raise saved.error

    def wait(self) -> Saved | None:
        """Wait for the save that is under way; the outcome of the last one. Collective."""
        return self._saver.finish()

    def close(self) -> None:
        self._saver.close()

    def _tell(self, saved: Saved) -> None:
        if saved.error is None:
            self.step = saved.step
            self._reporter.say(f"step {saved.step}: saved {saved.path}", "dim")
            return
        reason = f"{saved.error.strerror or saved.error}: {saved.error.filename or saved.path}"
        self._reporter.fault(self._state.progress.step, f"step {saved.step} could not be saved: {reason}")
