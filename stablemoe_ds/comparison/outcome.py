"""The results of a finished run of a suite: its figures, and the curves of its diagnostics."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.comparison.suite import SuiteRun
from stablemoe_ds.config.costs import flops_per_token, parameters
from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.config.rules import two_stages
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.config.table_options import named_with_options
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.diagnostics import routing_series
from stablemoe_ds.evaluation.fluctuation import churn, fluctuation_curve, last_fluctuation_step
from stablemoe_ds.evaluation.report import MARKS
from stablemoe_ds.run_directory.metrics import Line, MetricsLog, probe_seconds, training_seconds, validations
from stablemoe_ds.run_directory.probe_records import PROBE_IDS, RecordFolder
from stablemoe_ds.run_directory.progress import newest_saved
from stablemoe_ds.run_directory.rewind import TABLE

FRACTIONS = np.linspace(0, 1, 51)
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Outcome:
    """One finished run.

    figures: a number by the name of its column; None where there is nothing to measure.
    curves: (x, y) by name; x is tokens, but seconds for ``perplexity_time`` and a share of the run for ``fluctuation``.
    expert_bits: float64 [L * N], entropy of the ids each expert sees in the end; empty without experts.
    table, gate: what fixes the routes, and what weighs the experts, as text; empty without experts.
    """

    label: str
    seed: int
    figures: dict[str, float | None]
    curves: dict[str, Curve]
    expert_bits: NDArray[np.float64]
    table: str = ""
    gate: str = ""


def outcome_of(finished: SuiteRun) -> Outcome:
    """Read a finished run. Raises UserError where its history or its records are damaged."""
    saved = newest_saved(finished.folder)
    if saved is None:
        raise UserError(f"{finished.folder}: no complete checkpoint; expected a finished run")
    run, lines = saved.run, MetricsLog(finished.folder / "metrics.jsonl").read()
    counts, tokens_per_step = parameters(run), run.schedule.tokens_per_step
    clock = training_seconds(lines, tokens_per_step)
    figures: dict[str, float | None] = {
        "tokens": run.schedule.steps * tokens_per_step,
        "valid_ppl": _last(lines, "valid", "perplexity"),
        "test_ppl": _last(lines, "test", "perplexity"),
        "seconds": clock[-1][1] if clock else None,
        "probe_seconds": probe_seconds(lines),
        "active_parameters": counts.active,
        "total_parameters": counts.total,
        "flops_per_token": flops_per_token(run),
        "drop_rate": _mean(value for _, value in _series(lines, "train", "drop_rate")),
        "agreement": _last(lines, "train", "agreement"),
    }
    valid, tokens = _series(validations(lines)[0], "valid", "perplexity"), run.schedule.tokens_per_step
    steps, seconds = zip(*clock, strict=True) if clock else ((0,), (0.0,))
    curves: dict[str, Curve] = {
        "perplexity_tokens": _by_tokens(valid, tokens),
        "perplexity_time": [(float(np.interp(step, steps, seconds)), ppl) for step, ppl in valid],
        "drop_rate": _by_tokens(_series(lines, "train", "drop_rate"), tokens),
        "agreement": _by_tokens(_series(lines, "train", "agreement"), tokens),
    }
    of_routing, more_curves, expert_bits = _routing(finished, run, lines)
    moe = run.moe
    return Outcome(
        finished.label,
        finished.seed,
        figures | of_routing,
        curves | more_curves,
        expert_bits,
        table=_table(run),
        gate=moe.gate_name if moe.facts.routed else "",
    )


def _table(run: RunConfig) -> str:
    """What fixes the routes, with every setting that decides how."""
    moe = run.moe
    if moe.facts.fixed:
        return moe.hash_table if moe.facts.table_from == "counts" else _named_table(moe)
    followed = f"{_named_table(moe)} at blocks {', '.join(map(str, moe.table_layers))}" if moe.table_layers else ""
    learned = "none" if moe.facts.routed and not followed else ""
    if two_stages(run):
        learned = "distilled" if moe.distilled.kind == "word" else f"distilled {moe.distilled.kind}"
        if moe.facts.needs_counts:
            learned += f", balanced to {moe.table_load:g}"
    started = f"from {_named_table(moe)}" if moe.start_table else ""
    return ", ".join(filter(None, [followed, learned, started]))


def _named_table(moe: MoEConfig) -> str:
    """The table that a run follows or starts from: its builder with its options, or its file without the suffix.

    The tables of runs have one file name, so they go by their folder.
    """
    if moe.table_builder is not None:
        return named_with_options(moe.table_builder, moe.table_options)
    file = Path(moe.table_file or "")
    return f"table of {file.parent}" if file.name == TABLE else file.stem


def _routing(
    finished: SuiteRun, run: RunConfig, lines: Sequence[Line]
) -> tuple[dict[str, float | None], dict[str, Curve], NDArray[np.float64]]:
    """Figures of the last record, curves over all of them, bits of each expert; nothing without records."""
    records = RecordFolder(finished.folder / "probe").load_all()
    if records is None:
        return {}, {}, np.empty(0)
    ids_path = finished.folder / PROBE_IDS
    try:
        ids = np.load(ids_path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read the ids of the probe {ids_path}: {error}; train the run again") from error
    measured = routing_series(records, ids, run.moe.experts)
    names = ("load", "load_cv", "unserved", "nmi", "nmi_chance", "cohesion")
    series = {name: list(zip(records.steps, getattr(measured, name).mean(1), strict=True)) for name in names}
    if run.moe.top_k > 1:  # records have first experts alone
        for name in ("load", "load_cv"):
            series[name] = [(step, statistics.fmean(of_layer)) for step, of_layer in _series(lines, "probe", name)]
    figures: dict[str, float | None] = {name: float(of[-1][1]) if of else None for name, of in series.items()}
    curves = {name: _by_tokens(of, run.schedule.tokens_per_step) for name, of in series.items()}
    records = records.of_layers(run.moe.restless_rows)
    moved = churn(records)
    curves["churn"] = _by_tokens(zip(records.steps[1:], moved, strict=True), run.schedule.tokens_per_step)
    figures["churn"] = float(moved[-1]) if len(moved) else None
    last_LP = last_fluctuation_step(records)
    exceeding = fluctuation_curve(last_LP, run.schedule.steps, MARKS)
    figures |= {f"exceeds_{mark * 100:.0f}": float(share) for mark, share in zip(MARKS, exceeding, strict=True)}
    shares = fluctuation_curve(last_LP, run.schedule.steps, list(FRACTIONS))
    curves["fluctuation"] = list(zip(FRACTIONS.tolist(), shares.tolist(), strict=True))
    return figures, curves, measured.expert_bits[-1].reshape(-1)


def _series(lines: Sequence[Line], kind: str, key: str) -> list[tuple[int, Any]]:
    return [(line["step"], line[key]) for line in lines if line["kind"] == kind and line.get(key) is not None]


def _last(lines: Sequence[Line], kind: str, key: str) -> float | None:
    series = _series(lines, kind, key)
    return series[-1][1] if series else None


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


def _by_tokens(series: Iterable[tuple[int, float]], tokens_per_step: int) -> Curve:
    return [(float(step * tokens_per_step), float(value)) for step, value in series]
