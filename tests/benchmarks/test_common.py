"""What the benchmarks share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common import markdown, medians, parser, publish, ratios, take_turns


def test_contestants_take_turns_and_the_first_round_is_thrown_away() -> None:
    order: list[str] = []

    def contestant(name: str) -> float:
        order.append(name)
        return float(len(order))

    seconds = take_turns({"a": lambda: contestant("a"), "b": lambda: contestant("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_ratio_is_taken_within_a_round() -> None:
    """The machine slows down in the second round and recovers in the third: medians are misled, ratios are not."""
    seconds = {"dense": [1.0, 10.0, 10.0], "ours": [2.0, 20.0, 2.0]}
    assert medians(seconds) == {"dense": 10.0, "ours": 2.0}
    assert ratios(seconds, "dense") == {"dense": 1.0, "ours": 2.0}


def test_output_is_json_and_a_page_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = parser("A title.\n\nWhat it shows.", rounds=3).parse_args(["--output", str(tmp_path / "some.json")])
    table = markdown(["model", "ms"], [["dense", "1.0"]])
    publish(arguments, "A title.\n\nWhat it shows.", {"rows": [1]}, table)
    assert json.loads((tmp_path / "some.json").read_text())["rows"] == [1]
    page = (tmp_path / "some.md").read_text()
    assert page.startswith("# A title\n")
    assert "What it shows." in page
    assert page.endswith("| model | ms |\n| --- | --- |\n| dense | 1.0 |\n")
    assert capsys.readouterr().out == table + "\n"
    assert str(tmp_path) not in page
