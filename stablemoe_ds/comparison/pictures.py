"""One picture per diagnostic with all variants: the mean over seeds as a thick line, each seed as a thin one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.comparison.outcome import Curve, Outcome
from stablemoe_ds.evaluation.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, STYLE, VERMILLION, save_figure

COLORS = (VERMILLION, BLUE, GREEN, ORANGE, PURPLE, SKY, "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
"""Seven colours in four dash patterns: a variant has the same in every picture, by its place in the suite."""
ZOOM = 0.6
"""The second panel of a picture that has one begins at this share of the curves."""
PERPLEXITY = "validation perplexity"
Points = tuple[NDArray[np.float64], NDArray[np.float64]]
Group = dict[str, list[Outcome]]


@dataclass(frozen=True)
class Picture:
    """One diagnostic.

    curve: its name. figure: what the legend tells of each variant. x, y: what the axes say. when: what that figure is
    of. percent: shares, shown as such. zoom: show the end in a panel of its own.
    """

    curve: str
    figure: str
    title: str
    x: str
    y: str
    when: str = "at the end"
    percent: bool = False
    zoom: bool = False


PICTURES = (
    Picture("perplexity_tokens", "valid_ppl", "Perplexity against tokens", "tokens", PERPLEXITY, zoom=True),
    Picture("perplexity_time", "valid_ppl", "Perplexity against time", "seconds of training", PERPLEXITY, zoom=True),
    Picture(
        *("fluctuation", "exceeds_20", "When does a token last change its expert?", "share of the run"),
        *("tokens that change later", "after 20 % of the run"),
        percent=True,
    ),
    Picture("churn", "churn", "Churn", "tokens", "tokens with a new expert since the last record", percent=True),
    Picture("load", "load", "Load of the busiest expert", "tokens", "multiple of the mean"),
    Picture("load_cv", "load_cv", "Unevenness of the load", "tokens", "standard deviation / mean"),
    Picture("drop_rate", "drop_rate", "Dropped by capacity", "tokens", "choices", "mean of the run", percent=True),
    Picture("unserved", "unserved", "Served by no expert", "tokens", "tokens", percent=True),
    Picture("agreement", "agreement", "Do the two routers agree?", "tokens", "tokens of the update", percent=True),
    Picture("nmi", "nmi", "Does the token id decide?", "tokens", "mutual information / entropy of the expert"),
    Picture("cohesion", "cohesion", "How varied is what an expert sees?", "tokens", "entropy of its ids (bits)"),
)


def draw_all(outcomes: Sequence[Outcome], labels: Sequence[str], folder: Path) -> list[Path]:
    """Write every picture there is something to draw for; returns their paths. Raises UserError where it cannot.

    labels: all variants in the suite's order, which decides their colours.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = {
        label: {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
        for i, label in enumerate(labels)
    }
    written = []
    with plt.rc_context(STYLE):
        for picture in PICTURES:
            shown = _shown(outcomes, labels, picture)
            if shown:
                written.append(_save(_draw(shown, picture, looks), folder / f"{picture.curve}.png"))
        specialised = {label: ours for label in labels if (ours := _of(outcomes, label)) and len(ours[0].expert_bits)}
        if specialised:
            written.append(_save(_draw_experts(specialised, looks), folder / "cohesion_experts.png"))
    return written


def mean_curve(curves: Sequence[Points]) -> Points:
    """Mean over curves at the points of the first, within what all of them span; straight lines between points."""
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    first = curves[0][0]
    grid = np.unique(np.concatenate([[low], first[(first > low) & (first < high)], [high]]))
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)


def _of(outcomes: Sequence[Outcome], label: str) -> list[Outcome]:
    return [one for one in outcomes if one.label == label]


def _shown(outcomes: Sequence[Outcome], labels: Sequence[str], picture: Picture) -> Group:
    """Variants that have the curve, the largest figure first; none if all of it is zero."""
    curve = picture.curve
    found = {label: [one for one in _of(outcomes, label) if one.curves.get(curve)] for label in labels}
    found = {label: ours for label, ours in found.items() if ours}
    if not any(y for ours in found.values() for one in ours for _, y in one.curves[curve]):
        return {}
    return dict(sorted(found.items(), key=lambda item: -(_figure(item[1], picture) or 0.0)))


def _figure(ours: Sequence[Outcome], picture: Picture) -> float | None:
    values = [value for one in ours if (value := one.figures.get(picture.figure)) is not None]
    return statistics.fmean(values) if values else None


def _draw(shown: Group, picture: Picture, looks: dict[str, dict[str, Any]]) -> Any:
    import matplotlib.pyplot as plt

    panels = 2 if picture.zoom else 1
    figure, (axes,) = plt.subplots(1, panels, figsize=(3 + 5.2 * panels, 5.2), squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    handles, means = [], []
    for label, ours in shown.items():
        points = [_points(one.curves[picture.curve]) for one in ours]
        means.append(mean_curve(points))
        for axis in axes:
            for x, y in points if len(points) > 1 else []:
                axis.plot(x, y, linewidth=0.7, alpha=0.35, **looks[label])
            (line,) = axis.plot(*means[-1], linewidth=1.9, label=_legend(label, ours, picture), **looks[label])
        handles.append(line)
    for axis in axes:
        _label_axes(axis, picture)
    axes[0].set_ylabel(picture.y)
    axes[0].set_title(picture.title)
    axes[0].set_xlim(left=0)
    if picture.zoom:
        _logarithmic(axes[0])
        axes[1].set_title("The end of it")
        _show_the_end(axes[1], means)
    else:
        axes[0].set_ylim(bottom=0)
    style = {"handlelength": 3.2, "labelspacing": 0.75, "alignment": "left", "title_fontsize": "medium"}
    figure.legend(handles=handles, loc="outside right center", title=picture.when, **style)
    return figure


def _legend(label: str, ours: Sequence[Outcome], picture: Picture) -> str:
    value = _figure(ours, picture)
    if value is None:
        return label
    return f"{label}  {value:.1%}" if picture.percent else f"{label}  {value:.{3 if value < 1 else 2}f}"


def _label_axes(axis: Any, picture: Picture) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    axis.set_xlabel(picture.x)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter(PercentFormatter(1) if picture.x.startswith("share") else EngFormatter(sep=" "))
    if picture.percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1))


def _points(curve: Curve) -> Points:
    x, y = np.array(curve, dtype=np.float64).T
    return x, y


def _logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain round numbers on it."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _show_the_end(axis: Any, means: Sequence[Points]) -> None:
    """Limit the axis to where the curves end, whatever their lengths."""
    starts = [x[0] + ZOOM * (x[-1] - x[0]) for x, _ in means]
    highest = max(float(np.interp(start, x, y)) for start, (x, y) in zip(starts, means, strict=True))
    lowest, last = min(float(y.min()) for _, y in means), max(float(x[-1]) for x, _ in means)
    margin = 0.04 * (highest - lowest) or 1.0
    axis.set_xlim(min(starts), last + 0.02 * (last - min(starts)))
    axis.set_ylim(lowest - margin, highest + margin)


def _draw_experts(shown: Group, looks: dict[str, dict[str, Any]]) -> Any:
    """A dot an expert and seed: how varied the ids are that it sees at the end."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.42 * len(shown)))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    ordered = sorted(shown, key=lambda label: -np.mean([one.expert_bits.mean() for one in shown[label]]))
    for row, label in enumerate(ordered):
        bits = np.concatenate([one.expert_bits for one in shown[label]])
        color = looks[label]["color"]
        axis.plot(bits, np.full(len(bits), row), "o", color=color, alpha=0.35, markersize=6, markeredgewidth=0)
        axis.plot(bits.mean(), row, "|", color=color, markersize=20, markeredgewidth=2.4)
    axis.set_yticks(range(len(ordered)), ordered)
    axis.set_ylim(len(ordered) - 0.4, -0.6)
    axis.set_xlim(left=0)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("entropy of the ids an expert sees (bits); the bar is the mean over experts")
    axis.set_title("Cohesion of single experts, at the end")
    return figure


def _save(figure: Any, path: Path) -> Path:
    save_figure(figure, path)
    return path
