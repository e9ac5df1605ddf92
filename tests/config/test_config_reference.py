"""docs/configuration.md is what the schema says."""

from __future__ import annotations

from pathlib import Path

from stablemoe_ds.config.reference import reference

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_reference_is_current() -> None:
    command = "python -m stablemoe_ds.config.reference > docs/configuration.md"
    assert DOCUMENT.read_text(encoding="utf-8") == reference(), f"the schema has changed; run {command}"


def test_every_key_has_a_meaning_and_a_type() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    for row in rows:
        _, key, kind, _, meaning, _ = (cell.strip() for cell in row.replace("\\|", "/").split("|"))
        assert kind, key
        assert meaning, key


def test_bounds_and_choices_are_told() -> None:
    text = reference()
    assert "| `betas` | list of 2, each number ≥ 0 < 1 | `[0.9, 0.98]` |" in text
    assert "| `capacity_factor` | number > 0 or `null` | `null` |" in text
    assert "| `zero_stage` | `0`, `1`, `2`, `3` | `1` |" in text
