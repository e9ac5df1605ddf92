"""The routing report: one JSON-serialisable dict of how routing came about and what it became.

``report_text`` prints it, ``plots`` draws it. Whatever was not recorded is None or an empty list.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from stablemoe_ds.evaluation.fluctuation import changed_since, churn, fluctuation_curve, last_fluctuation_step
from stablemoe_ds.evaluation.specialisation import IdUse, Piece, describe_experts
from stablemoe_ds.run_directory.metrics import Kind, Line, plain, probe_seconds, training_seconds, validations
from stablemoe_ds.run_directory.probe_records import RouteRecords

MARKS = (0.2, 0.5, 0.8)
"""Fractions of a run after which the paper counts last fluctuations."""


def routing_report(
    *,
    name: str,
    steps: int,
    tokens_per_step: int,
    metrics: Sequence[Line],
    records: RouteRecords | None,
    uses: Sequence[IdUse],
    piece: Piece,
    top_k: int = 1,
    pieces_per_expert: int = 12,
) -> dict[str, Any]:
    """Everything the project says about one run.

    steps, tokens_per_step: updates of the whole run, tokens of each. metrics: lines of its ``metrics.jsonl``.
    records: of its probe tokens, in layers that can fluctuate. uses: which ids each expert serves, one an MoE layer.
    piece: an id in readable form. top_k: experts of a token, of which ``uses`` from records know the first alone.
    """
    switch = _last(metrics, "switch")
    since = switch["step"] if switch else None
    stage1 = _last(metrics, "valid", stage=1) or {}
    alike, others = validations(metrics)
    speeds = [speed for _, speed in _series(metrics, "train", "tokens_per_second")]
    report = {
        "run": name,
        "steps": steps,
        "switch": switch,
        "valid_ppl": {
            "stage1": stage1.get("perplexity"),
            "stage1_distilled": stage1.get("perplexity_distilled"),
            "final": (_last(metrics, "valid") or {}).get("perplexity"),
        },
        "test_ppl": (_last(metrics, "test") or {}).get("perplexity"),
        "changed_after_switch": changed_since(records, since) if records and since is not None else None,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "probe_share": _probe_share(metrics, tokens_per_step),
        "history": {
            "loss": _series(metrics, "train", "loss"),
            "agreement": _series(metrics, "train", "agreement"),
            "valid_ppl": _series(alike, "valid", "perplexity"),
            "valid_tokens": alike[-1].get("tokens") if alike else None,
            "other_valid_ppl": _series(others, "valid", "perplexity"),
            "other_valid_tokens": others[-1].get("tokens") if others else None,
            "churn": list(zip(records.steps[1:], churn(records), strict=True)) if records else [],
        },
        "fluctuation": _fluctuation(records, steps, since) if records else None,
        "layers": [_layer(use, piece, top_k, pieces_per_expert) for use in uses],
    }
    return plain(report)


def _fluctuation(records: RouteRecords, steps: int, since: int | None) -> dict[str, Any]:
    last_LP = last_fluctuation_step(records)
    fractions = np.linspace(0, 1, 51)
    return {
        "records": len(records.steps),
        "records_after_switch": int((records.steps >= since).sum()) if since is not None else 0,
        "tokens": records.expert_HLP.shape[2],
        "unserved": (records.expert_HLP[-1] < 0).mean(),
        "exceeds": {
            f"{mark:.0%}": share for mark, share in zip(MARKS, fluctuation_curve(last_LP, steps, MARKS), strict=True)
        },
        "curve": list(zip(fractions, fluctuation_curve(last_LP, steps, list(fractions)), strict=True)),
    }


def _probe_share(metrics: Sequence[Line], tokens_per_step: int) -> float | None:
    """What recording the probe took, as a share of it and the updates together."""
    probes, updates = probe_seconds(metrics), training_seconds(metrics, tokens_per_step)
    return probes / (probes + updates[-1][1]) if probes is not None and updates else None


def _layer(use: IdUse, piece: Piece, top_k: int, pieces_per_expert: int) -> dict[str, Any]:
    return {
        "block": use.block,
        "top_k": top_k,
        "counted": use.top_k,
        "load": use.load_N,
        "max_load": use.load_N.max(),
        "least_load": use.least_load,
        "load_cv": use.load_cv,
        "load_entropy": use.load_entropy,
        "id_decides": use.id_decides,
        "cohesion_bits": use.cohesion_bits,
        "experts": [asdict(profile) for profile in describe_experts(use, piece, pieces_per_expert)],
    }


def _series(metrics: Sequence[Line], kind: Kind, key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have the value."""
    return [(line["step"], line[key]) for line in metrics if line["kind"] == kind and line.get(key) is not None]


def _last(metrics: Sequence[Line], kind: Kind, **wanted: Any) -> Line | None:
    """The newest line of a kind whose fields are as wanted."""
    for line in reversed(metrics):
        if line["kind"] == kind and all(line.get(key) == value for key, value in wanted.items()):
            return line
    return None
