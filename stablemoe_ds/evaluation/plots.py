"""The routing report as one picture: loss, fluctuation, load, last changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.table import is_below

# Okabe and Ito's palette, distinguishable with every common colour blindness.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY, DARK_PURPLE, DARK_BLUE = "#555555", "#7A3F63", "#003B5C"
MOST_NAMES = 6
"""With more layers than this, only colour distinguishes them: dark at the bottom of the stack, bright at the top."""

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "figure.dpi": 110,
}


def draw(report: dict[str, Any], path: str | Path) -> None:
    """Write a PNG of what ``routing_report`` made. Raises UserError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    history = report["history"]
    panels = (
        ("Loss and perplexity", history["loss"] or history["valid_ppl"], _draw_loss),
        ("Do tokens stay, and do the two routers agree?", history["churn"] or history["agreement"], _draw_restlessness),
        ("Load of the final routing", report["layers"], _draw_load),
        ("When does a token last change its expert?", report["fluctuation"], _draw_last_changes),
    )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(13, 8.4))
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)
        for axis, (title, data, panel) in zip(axes.flat, panels, strict=True):
            axis.set_title(title)
            if data:
                panel(axis, report)
            else:
                axis.set_axis_off()
                axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color=GREY)
        save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG and close it. Raises UserError if it cannot be written."""
    import matplotlib.pyplot as plt

    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"cannot write picture {path}: {error}") from error
    finally:
        plt.close(figure)


def _draw_loss(axis: Any, report: dict[str, Any]) -> None:
    """Training loss and validation perplexity on one axis: its logarithm is the validation loss."""
    history = report["history"]
    loss, valid, others = history["loss"], history["valid_ppl"], history["other_valid_ppl"]
    if loss:
        axis.plot(*_columns(loss), color=SKY, linewidth=1.4, label="training")
    if valid:
        line = {"color": BLUE, "marker": "o", "markersize": 5, "linewidth": 1.8, "clip_on": False}
        axis.plot(*_in_nats(valid), **line, label=f"validation{_over(history['valid_tokens']) if others else ''}")
    if others:  # of other tokens, so no line joins them with those of the curve
        alone = {"color": DARK_BLUE, "marker": "D", "markersize": 6, "linestyle": "", "clip_on": False, "zorder": 3}
        axis.plot(*_in_nats(others), **alone, label=f"validation{_over(history['other_valid_tokens'])}")
    if valid or others:
        step, ppl = max(valid[-1:] + others[-1:])
        axis.annotate(f"{ppl:,.1f}", (step, np.log(ppl)), (-5, 8), textcoords="offset points", ha="right", color=BLUE)
    _axis_of_updates(axis, report)
    axis.set_ylabel("loss (nats a token)")
    right = axis.secondary_yaxis("right", functions=(_perplexity, _nats))
    right.set_ylabel("perplexity")
    _label_perplexities(right, *axis.get_ylim())
    axis.legend(loc="best")


def _draw_restlessness(axis: Any, report: dict[str, Any]) -> None:
    churn, agreement = report["history"]["churn"], report["history"]["agreement"]
    if agreement:
        axis.plot(*_percent(agreement), color=GREEN, linewidth=1.8, label="routers agree (stage 1)")
    if churn:
        label = "churn: new expert since the last record"
        axis.plot(*_percent(churn), color=VERMILLION, marker=".", linewidth=1.4, label=label)
    _axis_of_updates(axis, report)
    axis.set_ylim(-3, 103)
    axis.set_ylabel("% of tokens")
    axis.legend(loc="best")


def _draw_load(axis: Any, report: dict[str, Any]) -> None:
    """Experts of each layer, busiest first, against the mean and what the commonest id forces on any table."""
    layers = report["layers"]
    rank = np.arange(1, len(layers[0]["load"]) + 1)
    if len(layers) == 1:
        axis.bar(rank, sorted(layers[0]["load"], reverse=True), color=SKY, edgecolor=BLUE, width=0.8)
    else:
        for layer, color in zip(layers, _colors(len(layers)), strict=True):
            label = f"block {layer['block']}" if len(layers) <= MOST_NAMES else None
            load = sorted(layer["load"], reverse=True)
            axis.plot(rank, load, color=color, marker="o", markersize=3.5, linewidth=1.4, label=label)
    least = max(layer["least_load"] for layer in layers)
    axis.axhline(1, color=GREY, linewidth=1.2, label="mean")
    below = is_below(max(layer["max_load"] for layer in layers), least)
    best = "best without split ids" if below else "best of tables"
    label = f"the busiest, in the {best}: {least:.2f}"
    axis.axhline(least, color=VERMILLION, linestyle="--", linewidth=1.4, label=label)
    # The legend gets the top of the panel to itself.
    axis.set_ylim(0, 1.45 * max(least, *(layer["max_load"] for layer in layers)))
    axis.set_xlim(0.3, len(rank) + 0.7)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("experts, the busiest first")
    first = any(layer["counted"] < layer["top_k"] for layer in layers)
    axis.set_ylabel("multiple of the mean" + (", first experts alone" if first else ""))
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper right", ncols=1 if len(layers) == 1 else 2)


def _draw_last_changes(axis: Any, report: dict[str, Any]) -> None:
    x, y = _percent(report["fluctuation"]["curve"])
    axis.step(x * 100, y, where="post", color=PURPLE, linewidth=2)
    axis.fill_between(x * 100, y, step="post", color=PURPLE, alpha=0.15, linewidth=0)
    for at, share in report["fluctuation"]["exceeds"].items():
        mark = float(at.rstrip("%"))
        axis.plot(mark, share * 100, "o", color=PURPLE, markersize=6, clip_on=False, zorder=3)
        axis.annotate(f"{share:.1%}", (mark, share * 100), (5, 7), textcoords="offset points", color=DARK_PURPLE)
    if report["switch"]:
        _mark_switch(axis, 100 * report["switch"]["step"] / report["steps"])
    axis.set_xlim(0, 100)
    axis.set_ylim(0, min(105.0, max(5.0, 1.25 * float(y.max()))))
    axis.set_xlabel("% of the run")
    axis.set_ylabel("% of tokens that change later")


def _axis_of_updates(axis: Any, report: dict[str, Any]) -> None:
    axis.set_xlim(0, report["steps"])
    axis.set_xlabel("updates")
    if report["switch"]:
        _mark_switch(axis, report["switch"]["step"])


def _mark_switch(axis: Any, x: float) -> None:
    axis.axvline(x, color=GREY, linestyle=":", linewidth=1.6)
    late = x > 0.9 * axis.get_xlim()[1]  # no room on the right of the line
    axis.annotate(
        "switch",
        (x, 0.98),
        (-3 if late else 3, 0),
        xycoords=axis.get_xaxis_transform(),
        textcoords="offset points",
        rotation=90,
        ha="right" if late else "left",
        va="top",
        color=GREY,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
    )


def _label_perplexities(right: Any, low: float, high: float) -> None:
    """Round perplexities on the right axis, about six, evenly spread in the logarithm between ``low`` and ``high``."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    wished = np.exp(np.linspace(low, high, 7))
    for digits in (1, 2, 3):
        unit = 10.0 ** (np.floor(np.log10(wished)) - digits + 1)
        round_values = sorted({float(value) for value in np.round(wished / unit) * unit})
        if len(round_values) >= 4:
            break
    right.yaxis.set_major_locator(FixedLocator(round_values))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))


def _over(tokens: int | None) -> str:
    return "" if tokens is None else f" over {tokens:,} tokens"


def _in_nats(perplexities: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    steps, ppl = _columns(perplexities)
    return steps, np.log(ppl)


def _perplexity(nats: Any) -> Any:
    return np.exp(np.minimum(nats, 700.0))


def _nats(perplexity: Any) -> Any:
    return np.log(np.maximum(perplexity, 1e-300))


def _colors(count: int) -> list[Any]:
    import matplotlib

    palette = [BLUE, ORANGE, GREEN, PURPLE, SKY, "#000000"]
    return (
        palette[:count] if count <= MOST_NAMES else list(matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count)))
    )


def _columns(pairs: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    first, second = zip(*pairs, strict=True)
    return np.array(first), np.array(second)


def _percent(pairs: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    first, second = _columns(pairs)
    return first, 100 * second
