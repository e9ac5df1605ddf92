"""Pictures show every variant, in its own colour, with nothing on top of anything else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stablemoe_ds.comparison.outcome import Outcome
from stablemoe_ds.comparison.pictures import PICTURES, draw_all, mean_curve
from stablemoe_ds.errors import UserError

LABELS = [f"variant_{number}" for number in range(12)]


def points(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    return list(zip(x.tolist(), y.tolist(), strict=True))


def outcome(number: int, seed: int) -> Outcome:
    """Falling curves; the first variant the lowest. The last two have no routing."""
    tokens = np.arange(1, 11) * 1e5
    perplexities = 40 + 2 * number + seed + 300 * np.exp(-tokens / 2e5)
    curves = {p.curve: points(tokens, perplexities) for p in PICTURES[:2]}
    shares = np.linspace(1, 0.01 * number, 10)
    curves |= {p.curve: points(tokens, shares) for p in PICTURES[2:] if number < 10}
    curves |= {"unserved": points(tokens, np.zeros(10))}
    figures = {"valid_ppl": float(40 + 2 * number), "exceeds_20": 0.5}
    return Outcome(LABELS[number], seed, figures, curves, np.linspace(2, 6, 16) if number < 10 else np.empty(0))


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [outcome(number, seed) for number in range(12) for seed in (1, 2, 3)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that are closed after they have been written, kept open to be looked at."""
    import matplotlib.pyplot as plt

    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    for figure in figures:
        plt.close(figure)


def thick(axis: Any) -> dict[str, Any]:
    """Lines of means by variant."""
    return {line.get_label().split()[0]: line for line in axis.lines if line.get_linewidth() > 1}


def test_one_file_a_diagnostic(outcomes: list[Outcome], tmp_path: Path):
    written = draw_all(outcomes, LABELS, tmp_path)
    expected = {f"{p.curve}.png" for p in PICTURES} - {"unserved.png"} | {"cohesion_experts.png"}
    assert {path.name for path in written} == expected, "nothing was unserved, so there is nothing to draw"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_variant_looks_the_same_everywhere_and_like_no_other(outcomes: list[Outcome], tmp_path: Path, drawn: list):
    draw_all(outcomes, LABELS, tmp_path)
    looks: dict[str, set[tuple[Any, ...]]] = {}
    for figure in drawn[: len(PICTURES) - 1]:
        for axis in figure.axes:
            for label, line in thick(axis).items():
                looks.setdefault(label, set()).add((line.get_color(), str(line._unscaled_dash_pattern)))
    assert set(looks) == set(LABELS)
    assert all(len(found) == 1 for found in looks.values())
    assert len(set.union(*looks.values())) == len(LABELS)


def test_missing_variants_do_not_change_the_colours(outcomes: list[Outcome], tmp_path: Path, drawn: list):
    draw_all(outcomes[-3:], LABELS, tmp_path)
    draw_all(outcomes, LABELS, tmp_path)
    one, other = (thick(figure.axes[0])[LABELS[-1]] for figure in (drawn[0], drawn[2]))
    assert one.get_color() == other.get_color()


def test_lines_are_means_over_seeds(outcomes: list[Outcome], tmp_path: Path, drawn: list):
    draw_all(outcomes, LABELS, tmp_path)
    axis = drawn[0].axes[0]
    assert len(axis.lines) == 12 * (3 + 1)
    expected = [40 + 2 * 5 + 2 + 300 * np.exp(-x / 2e5) for x in np.arange(1, 11) * 1e5]
    assert thick(axis)[LABELS[5]].get_ydata() == pytest.approx(expected)


def test_legend_is_sorted_and_lies_on_nothing(outcomes: list[Outcome], tmp_path: Path, drawn: list):
    draw_all(outcomes, LABELS, tmp_path)
    for figure in drawn[: len(PICTURES) - 1]:
        figure.canvas.draw()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts[0] == "variant_11  62.00"
    assert texts[-1] == "variant_0  40.00"


def test_no_tick_lies_on_another(outcomes: list[Outcome], tmp_path: Path, drawn: list):
    draw_all(outcomes, LABELS, tmp_path)
    for figure in drawn:
        figure.canvas.draw()
        for axis in figure.axes:
            for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
                boxes = [text.get_window_extent() for text in labels if text.get_text() and text.get_visible()]
                assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])


def test_mean_curve_stays_within_what_all_curves_span():
    one = (np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0]))
    two = (np.array([1.0, 3.0]), np.array([3.0, 5.0]))
    x, y = mean_curve([one, two])
    assert x.tolist() == [1.0, 2.0, 3.0]
    assert y.tolist() == [2.0, 3.0, 4.0]


def test_a_place_that_cannot_be_written_is_named(outcomes: list[Outcome], tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere.perplexity_tokens\.png"):
        draw_all(outcomes, LABELS, tmp_path / "nowhere")
