"""Perplexity on validation and test text, on the way and at the end."""

from __future__ import annotations

from typing import Any

from stablemoe_ds.config.schema import LoggingConfig
from stablemoe_ds.data.run_data import EvalSet, RunData
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.evaluation.perplexity import evaluate, word_perplexity
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.source import FixedSource, RouteMaker
from stablemoe_ds.run_directory.metrics import Kind
from stablemoe_ds.training.callback import Callback, RunState, Update
from stablemoe_ds.training.reporter import Reporter


class Validation(Callback):
    """Every ``logging.eval_every`` updates on some of the validation text; in the end on all of it, and on the test's.

    In stage 1 with the learned routers and, if a switch is to come, along what it would freeze now.
    """

    def __init__(
        self,
        logging: LoggingConfig,
        data: RunData,
        groups: Groups,
        model: StableMoEGPT,
        routes: RouteMaker,
        state: RunState,
        reporter: Reporter,
    ) -> None:
        self._every, self._groups, self._model = logging.eval_every, groups, model
        self._maker, self._state, self._reporter = routes, state, reporter
        self._valid, self._test = data.valid(None), data.test(None)
        self._sample = data.valid(logging.eval_tokens) if logging.eval_tokens else self._valid
        # Trackers join what they are given by one name, so perplexities of all the text get a name of their own.
        self._whole = "valid" if self._sample is self._valid else "valid_whole"

    def after_update(self, update: Update) -> None:
        if self._every and update.step % self._every == 0 and not update.last:
            self._measure("valid", self._sample, self._frozen_now())

    def before_switch(self, frozen: FixedSource) -> None:
        """On all validation text, with the learned routers and along what is about to be followed."""
        self._measure("valid", self._valid, frozen, self._whole)

    def finish(self) -> None:
        self._measure("valid", self._valid, self._frozen_now(), self._whole)
        self._measure("test", self._test, self._frozen_now())

    def _frozen_now(self) -> FixedSource | None:
        if self._state.progress.stage == 2 or not self._maker.can_freeze:
            return None
        return self._maker.frozen(self._state.routes.table)

    def _measure(self, kind: Kind, data: EvalSet | None, frozen: FixedSource | None, series: str | None = None) -> None:
        """One line of perplexity along the routes of now; next to it, in stage 1, along those of a frozen router."""
        if data is None:
            return
        reduce, device = self._groups.sum_over_data_ranks, self._groups.world.device
        step, routes = self._state.progress.step, self._state.routes
        outcome = evaluate(self._model, data.loader, routes, reduce, device)
        values: dict[str, Any] = {
            "stage": self._state.progress.stage,
            "perplexity": outcome.perplexity,
            "loss": outcome.loss,
            "tokens": outcome.tokens,
            "words": data.words,
            "word_perplexity": word_perplexity(outcome, data.words) if data.words else None,
            "agreement": outcome.agreement,
            "load": outcome.load,
        }
        text = f"{kind} perplexity {outcome.perplexity:.3f}"
        if frozen is not None:
            distilled = evaluate(self._model, data.loader, frozen, reduce, device).perplexity
            values["perplexity_distilled"] = distilled
            text += f" (learned router), {distilled:.3f} (distilled), agreement {outcome.agreement or 0:.1%}"
        self._reporter.say(f"step {step}: {text} over {outcome.tokens:,} tokens")
        self._reporter.log(kind, step, values, series)
