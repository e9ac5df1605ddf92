"""What a long build shows of itself: a bar for each phase on a terminal, nothing elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from stablemoe_ds.progress_bar import progress_bar
from stablemoe_ds.tables.balanced_choice import balanced_choices, steps_of_choice
from stablemoe_ds.tables.builders import build_table
from stablemoe_ds.tables.kmeans import RESTARTS, ROUNDS, spherical_kmeans
from stablemoe_ds.tables.placing import greedy_choices
from stablemoe_ds.tables.resize import resized_table
from tests.tables.texts import text_of_kinds

TEXT = text_of_kinds(tokens=5000)


def said(capsys: pytest.CaptureFixture[str], builder: str, **options: str) -> str:
    TEXT._followers.clear()
    build_table(builder, {"dims": 8, **options}, TEXT, experts=4, top_k=1, blocks=[1], seed=0)
    written = capsys.readouterr()
    assert written.out == "", "answers alone are written to standard output"
    return written.err


@pytest.mark.parametrize(
    ("builder", "choice"), [("scattered", None), ("cooccurrence", "balanced"), ("cooccurrence", "greedy")]
)
def test_a_terminal_shows_every_phase(
    builder: str, choice: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {} if choice is None else {"choice": choice}
    assert said(capsys, builder, **options) == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    shown = said(capsys, builder, **options)
    phases = ["neighbours", "vectors", "experts", *(["clusters"] if builder == "cooccurrence" else [])]
    assert [phase for phase in phases if phase not in shown] == []


def test_a_table_that_is_resized_shows_them_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = build_table("even", {}, TEXT, experts=4, top_k=1, blocks=[1], seed=0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    resized_table(table, TEXT, 8)
    shown = capsys.readouterr().err
    assert "clusters" in shown
    assert "experts" in shown


def test_a_bar_inside_a_bar_is_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("outer", 1) as outer, progress_bar("inner", 1) as inner:
        inner(1)
        outer(1)
    with progress_bar("later", 1):
        pass
    shown = capsys.readouterr().err
    assert ("outer" in shown, "inner" in shown, "later" in shown) == (True, False, True)


@pytest.mark.parametrize("ids", [1, 2, 3, 64, 65])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_bar_comes_to_its_end(ids: int, top_k: int) -> None:
    random, steps = np.random.default_rng(ids), list[int]()
    scores, counts = random.normal(size=(70, 4)), np.zeros(70, np.int64)
    counts[:ids] = random.integers(1, 100, ids)
    balanced_choices(scores, counts, 4.0, top_k, steps.append)
    assert sum(steps) == top_k * steps_of_choice(counts)
    steps.clear()
    greedy_choices(scores, counts, 4.0, top_k, steps.append)
    assert sum(steps) == ids
    steps.clear()
    spherical_kmeans(scores / np.linalg.norm(scores, axis=1, keepdims=True), np.sqrt(counts), 4, 0, steps.append)
    assert sum(steps) == RESTARTS * ROUNDS
