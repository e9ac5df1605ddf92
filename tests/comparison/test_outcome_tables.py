"""Tables of outcomes whose numbers are known."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from stablemoe_ds.comparison.outcome import Outcome
from stablemoe_ds.comparison.outcome_tables import COLUMNS, markdown, write_csv

SIZES = {"tokens": 5e6, "active_parameters": 2e6, "total_parameters": 8.25e6, "flops_per_token": 12_345_678_901}


def outcome(label: str, seed: int, valid: float, **figures: float | None) -> Outcome:
    known = {**SIZES, "valid_ppl": valid, "test_ppl": valid + 1, "seconds": 100.0 * seed, **figures}
    return Outcome(label, seed, known, {}, np.empty(0), table="random", gate="one")


@pytest.fixture
def outcomes() -> list[Outcome]:
    ours = [outcome("ours", seed, valid, load=1.5, exceeds_20=0.0) for seed, valid in ((1, 30.0), (2, 32.0), (3, 34.0))]
    theirs = [outcome("theirs", 1, 31.0, load=1.25, exceeds_20=0.4), outcome("theirs", 2, 34.0, load=1.75)]
    return [*ours, *theirs, outcome("dense", 1, 40.0, test_ppl=None)]


def rows(text: str) -> dict[str, list[str]]:
    """Cells of every table row by the label in front; of two tables the second follows the first."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("|"):
            label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(label, []).extend(cells)
    return found


def test_markdown_by_hand(outcomes: list[Outcome]):
    found = rows(markdown(outcomes, ["ours", "theirs", "dense", "unfinished"], "ours"))
    sizes = ["2.00 M / 8.25 M", "12,345.7"]
    assert found["ours"][:3] == ["3", *sizes]
    assert found["ours"][3:8] == ["32.00 ± 2.00", "reference", "33.00 ± 2.00", "reference", "200 ± 100"]
    # Theirs minus ours is 1 and 2 for the seeds that both have: mean 1.5, deviation 0.5 * sqrt 2. Student's t is
    # 12.7062 for two pairs, so half the interval is 12.7062 * 0.5 * sqrt 2 / sqrt 2.
    assert found["theirs"][3:5] == ["32.50 ± 2.12", "+1.50 [-4.85, +7.85]"]
    assert found["dense"][3:8] == ["40.00", "+10.00", "–", "–", "100"]
    assert "unfinished" not in found


def test_routing_table_has_what_was_measured(outcomes: list[Outcome]):
    text = markdown(outcomes, ["ours", "theirs", "dense"], "ours")
    assert "| load, max/mean | moves after 20 % |" in text
    found = rows(text)
    assert found["ours"][8:] == ["random", "one", "1.50", "0.0%"]
    assert found["theirs"][8:] == ["random", "one", "1.50", "40.0%"], "means over the seeds that have a number"
    assert len(found["dense"]) == 8, "no routing, no row"
    assert "load" not in markdown([outcomes[-1]], ["dense"], "dense")


def test_csv_has_a_line_a_run(outcomes: list[Outcome], tmp_path: Path):
    write_csv(outcomes, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0])[:6] == ["router", "seed", "tokens", "valid_ppl", "test_ppl", "seconds"]
    assert list(lines[0])[2:] == [*COLUMNS, "table", "gate"]
    assert (lines[0]["table"], lines[0]["gate"]) == ("random", "one")
    assert [(line["router"], line["seed"], float(line["valid_ppl"])) for line in lines] == [
        (one.label, str(one.seed), one.figures["valid_ppl"]) for one in outcomes
    ]
    assert (lines[-1]["test_ppl"], lines[-1]["load"]) == ("", ""), "not measured is not zero"
    assert lines[0]["exceeds_20"] == "0"
    assert lines[0]["flops_per_token"] == "12345678901", "no digit is lost"
