"""The routing report for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.cells import cell_len

from stablemoe_ds.config.text_table import aligned
from stablemoe_ds.tables.table import is_below

WIDTH = 100
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEIGHTS = "▁▂▃▄▅▆▇█"


def render_text(report: dict[str, Any]) -> str:
    """Text of what ``routing_report`` made, without a line wider than ``WIDTH`` cells."""
    lines = [_title(report), "─" * WIDTH, *_summary(report)]
    for layer in report["layers"]:
        lines += ["", *_layer(layer)]
    return "\n".join(lines) + "\n"


def _title(report: dict[str, Any]) -> str:
    switch = report["switch"]
    stage = f"stage 2 since update {switch['step']:,}" if switch else "stage 1 to the end"
    return _crop(f"{report['run']} · {report['steps']:,} updates" + (f" · {stage}" if report["layers"] else ""))


def _summary(report: dict[str, Any]) -> list[str]:
    ppl, switch, history = report["valid_ppl"], report["switch"], report["history"]
    rows: list[list[str]] = []
    if ppl["final"] is not None:
        rows.append(["Validation perplexity", f"{ppl['final']:,.2f} at the end"])
    if ppl["stage1"] is not None and switch:
        distilled = ppl["stage1_distilled"]
        also = f", {distilled:,.2f} with the distilled one" if distilled is not None else ""
        rows.append(["", f"{ppl['stage1']:,.2f} in stage 1 with the learned router{also}"])
    if report["test_ppl"] is not None:
        rows.append(["Test perplexity", f"{report['test_ppl']:,.2f}"])
    if switch and switch.get("agreement") is not None:
        trace = _sparkline([value for _, value in history["agreement"]])
        rows.append(["The two routers agree", f"on {switch['agreement']:.1%} of tokens at the switch   {trace}"])
    if history["churn"]:
        shares = [value for _, value in history["churn"]]
        trace = _sparkline(shares)
        rows.append(["Churn between records", f"{shares[0]:.1%} at first, {shares[-1]:.1%} at last   {trace}"])
    if report["fluctuation"]:
        marks = " · ".join(f"{at} of the run: {share:.1%}" for at, share in report["fluctuation"]["exceeds"].items())
        rows.append(["Last change comes after", marks])
    if report["changed_after_switch"] is not None:
        rows.append(["After the switch", _changed(report["changed_after_switch"], report["fluctuation"])])
    if report["fluctuation"] and report["fluctuation"]["unserved"]:
        rows.append(["Served by no expert", f"{report['fluctuation']['unserved']:.1%} of the probe tokens"])
    if report["tokens_per_second"] is not None:
        probe = f"; {report['probe_share']:.1%} of the time for the probe" if report["probe_share"] is not None else ""
        rows.append(["Speed", f"{report['tokens_per_second']:,.0f} tokens/s{probe}"])
    if switch and switch.get("table_sha256"):
        rows.append(["Routing table, sha256", switch["table_sha256"]])
    return [_crop(line) for line in aligned(rows).splitlines()]


def _changed(share: float, fluctuation: dict[str, Any]) -> str:
    seen = f"{fluctuation['tokens']:,} probe tokens in {fluctuation['records_after_switch']} records"
    return f"none of {seen} changed its expert" if share == 0 else f"{share:.2%} of {seen} changed their expert"


def _layer(layer: dict[str, Any]) -> list[str]:
    """A head and one line an expert: load, how many ids, how varied they are, and as many pieces as fit."""
    experts, least = layer["experts"], layer["least_load"]
    first = f"Counted by the first of the {layer['top_k']} experts of each token of the probe."
    return [
        f"MoE layer at block {layer['block']}: {len(experts)} experts, the busiest at {layer['max_load']:.2f} times "
        f"the mean; {bound_text(layer['max_load'], least)}",
        f"Load entropy {layer['load_entropy']:.3f} of 1, coefficient of variation {layer['load_cv']:.2f}.",
        f"The token id decides {layer['id_decides']:.1%} of the choice; the ids an expert sees have "
        f"{layer['cohesion_bits']:.2f} bits.",
        *([first] if layer["counted"] < layer["top_k"] else []),
        "",
        *expert_lines(experts, layer["max_load"]),
    ]


def bound_text(max_load: float, least_load: float) -> str:
    """The load that ids force on a table, and whether this one escapes it because it splits them."""
    what = "without split ids, no table goes below" if is_below(max_load, least_load) else "no table goes below"
    return f"{what} {least_load:.2f}"


def expert_lines(experts: Sequence[dict[str, Any]], max_load: float) -> list[str]:
    """A head and one line for each profile that ``describe_experts`` made, as dicts."""
    # Bars are as wide for a load of 2 as there is room, and no wider for the few experts above it.
    scale = 10 / max(2.0, min(max_load, 4.0))
    rows = [["expert", "load", " " * 10, "ids", "bits"]]
    for one in experts:
        bar = _bar(min(one["load"] * scale, 10.0))
        rows.append([str(one["expert"]), f"{one['load']:.2f}", bar, f"{one['ids']:,}", f"{one['entropy_bits']:.1f}"])
    head, *lines = aligned(rows, right={0, 1, 3, 4}).splitlines()
    found = [f"{head}  commonest pieces"]
    for line, one in zip(lines, experts, strict=True):
        pieces = [use["piece"] for use in one["pieces"]]
        found.append(f"{line}  " + (_fit(pieces, WIDTH - len(line) - 2) if pieces else "(serves no token)"))
    return found


def _crop(text: str) -> str:
    while cell_len(text) > WIDTH:
        text = text[:-1]
    return text.rstrip()


def _fit(pieces: Sequence[str], width: int) -> str:
    """As many whole pieces as the width has room for, two spaces apart."""
    text = pieces[0] if cell_len(pieces[0]) <= width else "…"
    for piece in pieces[1:]:
        if cell_len(text) + 2 + cell_len(piece) > width:
            break
        text += "  " + piece
    return text


def _bar(cells: float) -> str:
    """A bar that many cells long, to the eighth."""
    eighths = round(cells * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _sparkline(values: Sequence[float], width: int = 32) -> str:
    """Shares between 0 and 1 as a line of columns, each the mean of its stretch; the tallest fills its cell."""
    if not values or max(values) <= 0:
        return ""
    columns = min(width, len(values))
    cuts = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    top = max(means)
    return "".join(_HEIGHTS[round(mean / top * (len(_HEIGHTS) - 1))] for mean in means)
