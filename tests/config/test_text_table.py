"""Aligned text: the same on a terminal and in a file, and every value whole."""

from __future__ import annotations

import pytest

from stablemoe_ds.config.text_table import aligned


def test_columns_stand_below_one_another() -> None:
    rows = [["name", "1,000", "first"], ["a", "7", ""], ["", "", "last"]]
    assert aligned(rows, right={1}) == "name  1,000  first\na         7\n             last"
    assert aligned([]) == ""


@pytest.mark.parametrize(
    "terminal", [{"COLUMNS": "20"}, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}, {"TERM": "dumb"}]
)
def test_nothing_is_cut_wrapped_or_coloured_on_any_terminal(
    terminal: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in terminal.items():
        monkeypatch.setenv(name, value)
    long = "runs/" + "a b/" * 3000
    assert aligned([["x", long, "1.5"]]) == f"x  {long}  1.5"


def test_a_cell_is_text_and_as_wide_as_it_looks() -> None:
    rows = [["[bold]x[/bold] :smile:", "1"], ["文字", "2"]]
    assert aligned(rows) == "[bold]x[/bold] :smile:  1\n文字                    2"
