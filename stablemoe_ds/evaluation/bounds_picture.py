"""Load against bound by number of experts, a panel for each number of choices of an id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.evaluation.bounds_report import EVEN_OF_ITSELF, EVEN_SPLIT, Judged
from stablemoe_ds.evaluation.plots import (
    BLUE,
    DARK_PURPLE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILLION,
    save_figure,
)
from stablemoe_ds.tables.load_bounds import bound

LOOKS = {
    "round-robin": (VERMILLION, "s"),
    "random": (ORANGE, "^"),
    "cooccurrence": (GREEN, "D"),
    "even": (BLUE, "o"),
    EVEN_SPLIT: (PURPLE, "*"),
    EVEN_OF_ITSELF: (SKY, "x"),
}
"""Colour and mark of the tables that are made here; given ones take the others in turn."""
OTHERS = ((DARK_PURPLE, "P"), ("#000000", "v"), (GREY, "X"))


def draw_bounds(judged: Sequence[Judged], token_counts: NDArray[np.int64], path: str | Path) -> None:
    """Write a PNG. token_counts: int64 [V] of the held-out text. Raises UserError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    choices = sorted({shape.bound.top_k for shape in judged})
    looks = _looks(judged)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            *(1, len(choices)), figsize=(2.2 + 4.6 * len(choices), 5.2), sharey=True, squeeze=False
        )
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
        for axis, top_k in zip(axes[0], choices, strict=True):
            _draw_panel(axis, [shape for shape in judged if shape.bound.top_k == top_k], token_counts, looks)
        axes[0, 0].set_ylabel("load of the busiest expert, multiple of the mean")
        named: dict[str, Any] = {}
        for axis in axes[0]:
            marks, labels = axis.get_legend_handles_labels()
            named |= dict(zip(labels, marks, strict=True))
        figure.legend(
            list(named.values()), list(named), loc="outside right upper", title="max/mean load", alignment="left"
        )
        figure.suptitle("How even is a table of token ids on text that it was not made from?", x=0.01, ha="left")
        save_figure(figure, path)


def _looks(judged: Sequence[Judged]) -> dict[str, tuple[str, str]]:
    names = dict.fromkeys(table.name for shape in judged for table in shape.tables)
    given = [name for name in names if name not in LOOKS]
    return LOOKS | {name: OTHERS[number % len(OTHERS)] for number, name in enumerate(given)}


def _draw_panel(
    axis: Any, shapes: Sequence[Judged], token_counts: NDArray[np.int64], looks: dict[str, tuple[str, str]]
) -> None:
    """The bound as a line over all numbers of experts, each table as a line through those it was judged with."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    sizes, top_k = [shape.bound.experts for shape in shapes], shapes[0].bound.top_k
    low, high = max(top_k, min(sizes) / 1.5), max(sizes) * 1.5
    line = np.geomspace(low, high, 200)
    commonest = bound(token_counts, 1, top_k).forced
    least = np.maximum(1, commonest * line)
    axis.fill_between(line, 0.9, least, color=GREY, alpha=0.14, linewidth=0, label="below: no table gets there")
    axis.plot(line, least, color=GREY, linestyle="--", linewidth=1.6, label="max(1, p_max N / k)")
    for name in dict.fromkeys(table.name for shape in shapes for table in shape.tables):
        points = [(s.bound.experts, t.max_load) for s in shapes for t in s.tables if t.name == name]
        color, mark = looks[name]
        made_here = name in LOOKS
        axis.plot(
            *zip(*points, strict=True),
            color=color,
            marker=mark,
            markersize=7 if made_here else 13,
            markeredgecolor=color if made_here else "white",
            zorder=2.2 if made_here else 3,
            linewidth=1.4,
            label=name,
        )
    axis.set_title(f"top-{top_k}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(bottom=0.9)
    axis.set_xlabel("experts")
    axis.xaxis.set_major_locator(FixedLocator(sizes))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000]))
    axis.yaxis.set_minor_locator(NullLocator())
    for ruler in (axis.xaxis, axis.yaxis):
        ruler.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
