"""Pictures of what benchmarks.moe_layer, benchmarks.step and benchmarks.routers have measured.

    python -m benchmarks.pictures FOLDER

Reads moe_layer.json, step.json and routers.json in FOLDER, whichever is there, and writes a PNG of the same name next
to each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from stablemoe_ds.evaluation.plots import STYLE, save_figure

Bars = dict[str, dict[str, float]]
"""By group of bars and by contestant; a contestant may be missing from a group."""


def layer_bars(result: dict[str, Any]) -> Bars:
    """A group a shape: time relative to the dense layer's."""
    names = ("tokens", "hidden_size", "experts")
    return {
        " x ".join(str(row["shape"][name]) for name in names)
        + f"\n{row['shape']['load']}, {row['shape']['dtype']}": row["ratio_to_dense"]
        for row in result["rows"]
    }


def step_bars(result: dict[str, Any]) -> Bars:
    """A group a number of processes: milliseconds of an update."""
    return {
        f"{row['processes']} processes": {name: 1000 * f["seconds"] for name, f in row["contestants"].items()}
        for row in result["rows"]
    }


def draw(bars: Bars, title: str, unit: str, line: float | None, path: Path) -> None:
    """One group of bars below another, each bar with its figure. line: where to draw a line across, such as a bound."""
    contestants = list(dict.fromkeys(name for group in bars.values() for name in group))
    thickness = 0.8 / len(contestants)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(10, 1.5 + 0.22 * len(bars) * len(contestants)), layout="constrained")
        for number, name in enumerate(contestants):
            places = [place + number * thickness for place, group in enumerate(bars.values()) if name in group]
            drawn = axis.barh(places, [group[name] for group in bars.values() if name in group], thickness, label=name)
            axis.bar_label(drawn, fmt="%.2f" if line else "%.0f", padding=3, fontsize=8)
        axis.set_yticks([place + 0.4 - thickness / 2 for place in range(len(bars))], list(bars))
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        if line:
            axis.axvline(line, color="black", linewidth=1)
        axis.set(title=title, xlabel=unit)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
        save_figure(figure, path)


def draw_curves(result: dict[str, Any], path: Path) -> None:
    """Perplexity against tokens read: a colour for each recipe, a line for each seed.

    The point at the end of a run is of the whole validation text, the others of its first tokens: no line joins them.
    """
    recipes = list(dict.fromkeys(row["recipe"] for row in result["rows"]))
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
        for row in result["rows"]:
            number = recipes.index(row["recipe"])
            for whole, style in ((False, "-"), (True, "x")):
                points = [point for point in row["points"] if point["whole"] is whole]
                tokens = [point["tokens"] / 1e6 for point in points]
                axis.plot(tokens, [point["perplexity"] for point in points], style, color=f"C{number}")
        axis.set(xlabel="million tokens", ylabel="validation perplexity", yscale="log")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter("{x:.0f}")
        for number, recipe in enumerate(recipes):
            axis.plot([], [], color=f"C{number}", label=recipe)
        axis.legend(title="x: the whole validation text")
        save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    kinds = {
        "moe_layer": (layer_bars, "MoE layer by tokens x width x experts", "time / dense layer of equal FLOPs", 1.0),
        "step": (step_bars, "Training step", "ms an update", None),
    }
    for name, (bars, title, unit, line) in kinds.items():
        if (folder / f"{name}.json").exists():
            result = json.loads((folder / f"{name}.json").read_text())
            draw(bars(result), title, unit, line, folder / f"{name}.png")
    if (folder / "routers.json").exists():
        draw_curves(json.loads((folder / "routers.json").read_text()), folder / "routers.png")


if __name__ == "__main__":
    main()
