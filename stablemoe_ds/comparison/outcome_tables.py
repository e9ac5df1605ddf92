"""The outcomes of a suite as CSV, one line a run, and as Markdown, one line a variant."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from stablemoe_ds.comparison.outcome import Outcome
from stablemoe_ds.comparison.statistics import paired_difference, spread

COLUMNS = (
    *("tokens", "valid_ppl", "test_ppl", "seconds"),
    *("active_parameters", "total_parameters", "flops_per_token"),
    *("load", "load_cv", "drop_rate", "unserved", "churn", "exceeds_20", "exceeds_50", "exceeds_80"),
    *("nmi", "nmi_chance", "cohesion", "agreement", "probe_seconds"),
)
Format = Callable[[float], str]
ROUTING: dict[str, tuple[str, Format]] = {
    "load": ("load, max/mean", "{:.2f}".format),
    "load_cv": ("load, CV", "{:.2f}".format),
    "drop_rate": ("dropped", "{:.1%}".format),
    "unserved": ("unserved", "{:.1%}".format),
    "exceeds_20": ("moves after 20 %", "{:.1%}".format),
    "exceeds_50": ("after 50 %", "{:.1%}".format),
    "exceeds_80": ("after 80 %", "{:.1%}".format),
    "churn": ("churn at the end", "{:.1%}".format),
    "nmi": ("NMI", "{:.3f}".format),
    "nmi_chance": ("by chance", "{:.3f}".format),
    "cohesion": ("cohesion, bits", "{:.2f}".format),
    "agreement": ("agreement", "{:.1%}".format),
}
PERPLEXITY_NOTE = (
    "Mean ± standard deviation over seeds; differences to the reference are paired over seeds, with a 95 % confidence "
    "interval of Student's t. Seconds are spent in updates: validation and probes are not in them."
)
ROUTING_NOTE = (
    "Table: what fixes the routes. Gate: `moe.gate`, or the router's own. Means over seeds, on the probe tokens at the "
    "last record; of several MoE layers the mean; of several experts of a token all count as load, the first alone "
    "elsewhere. Moves after 20 %: tokens whose last change of expert comes later in the run. NMI: mutual information "
    "of token id and expert over the entropy of the expert; by chance: with the experts shuffled over the tokens. "
    "Cohesion: entropy of the ids an expert sees. Dropped: by capacity, in training. Agreement of the two routers: "
    "last of stage 1."
)


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """One line a run; what was not measured is empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("router", "seed", *COLUMNS, "table", "gate"))
        for outcome in outcomes:
            row = [outcome.figures.get(name) for name in COLUMNS]
            numbers = ["" if value is None else f"{value:.12g}" for value in row]
            writer.writerow((outcome.label, outcome.seed, *numbers, outcome.table, outcome.gate))


def markdown(outcomes: Sequence[Outcome], labels: Sequence[str], reference: str) -> str:
    """Two tables, perplexities and routing. labels: variants in their order; one without outcomes is left out."""
    by_label = {label: [one for one in outcomes if one.label == label] for label in labels}
    by_label = {label: ours for label, ours in by_label.items() if ours}
    parts = [*_perplexities(by_label, reference), "", PERPLEXITY_NOTE]
    if routing := _routing(by_label):
        parts += ["", *routing, "", ROUTING_NOTE]
    return "\n".join(parts) + "\n"


def _perplexities(by_label: dict[str, list[Outcome]], reference: str) -> list[str]:
    head = ["", "seeds", "active / all parameters", "MFLOPs/token", "valid PPL", "difference", "test PPL", "difference"]
    rows = [[*head, "seconds"]]
    for label, ours in by_label.items():
        first = ours[0].figures
        cells = [label, str(len(ours)), f"{_count(first['active_parameters'])} / {_count(first['total_parameters'])}"]
        cells.append(f"{(first['flops_per_token'] or 0) / 1e6:,.1f}")
        for key in ("valid_ppl", "test_ppl"):
            cells += [_spread(ours, key, "{:.2f}".format)]
            cells += ["reference" if label == reference else _difference(ours, by_label.get(reference, []), key)]
        rows.append([*cells, _spread(ours, "seconds", "{:,.0f}".format)])
    return _table(rows)


def _routing(by_label: dict[str, list[Outcome]]) -> list[str]:
    """Variants without a routing are left out, and columns that no run has a number for; nothing is left: nothing."""
    known = {
        label: {key for key in ROUTING if ours[0].figures.get(key) is not None} for label, ours in by_label.items()
    }
    routed = {label: ours for label, ours in by_label.items() if known[label]}
    if not routed:
        return []
    measured = set.union(*known.values())
    columns = [key for key in ROUTING if key in measured]
    rows = [("", "table", "gate", *(ROUTING[key][0] for key in columns))]
    for label, ours in routed.items():
        numbers = [_mean(ours, key, ROUTING[key][1]) for key in columns]
        rows.append((label, ours[0].table, ours[0].gate, *numbers))
    return _table(rows)


def _by_seed(outcomes: Sequence[Outcome], key: str) -> dict[int, float]:
    return {one.seed: value for one in outcomes if (value := one.figures.get(key)) is not None}


def _mean(outcomes: Sequence[Outcome], key: str, text: Format) -> str:
    values = list(_by_seed(outcomes, key).values())
    return text(spread(values).mean) if values else "–"


def _spread(outcomes: Sequence[Outcome], key: str, text: Format) -> str:
    values = list(_by_seed(outcomes, key).values())
    if not values:
        return "–"
    found = spread(values)
    return text(found.mean) + (f" ± {text(found.deviation)}" if found.deviation is not None else "")


def _difference(ours: Sequence[Outcome], reference: Sequence[Outcome], key: str) -> str:
    found = paired_difference(_by_seed(ours, key), _by_seed(reference, key))
    if found is None:
        return "–"
    if found.half_width is None:
        return f"{found.mean:+.2f}"
    return f"{found.mean:+.2f} [{found.mean - found.half_width:+.2f}, {found.mean + found.half_width:+.2f}]"


def _count(value: float | None) -> str:
    return f"{(value or 0) / 1e6:,.2f} M"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
