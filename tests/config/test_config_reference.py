"""docs/configuration.md is what the schema says."""

from __future__ import annotations

from pathlib import Path

from stablemoe_ds.config.reference import reference
from stablemoe_ds.config.table_options import OPTIONS, options_help

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_reference_is_current() -> None:
    command = "python -m stablemoe_ds.config.reference > docs/configuration.md"
    assert DOCUMENT.read_text(encoding="utf-8") == reference(), f"the schema has changed; run {command}"


def test_every_key_has_a_meaning_and_a_type() -> None:
    keys, _, _ = reference().partition("## moe.table_options")
    rows = [line for line in keys.splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    for row in rows:
        _, key, kind, _, meaning, _ = (cell.strip() for cell in row.replace("\\|", "/").split("|"))
        assert kind, key
        assert meaning, key


def test_every_option_of_a_table_builder_is_listed() -> None:
    listed = {}
    for line in reference().partition("## moe.table_options")[2].splitlines():
        if line.startswith("| `"):
            key, builders, _, default, _ = (cell.strip() for cell in line.strip("|").split(" | "))
            listed[key.strip("`")] = (builders, default)
    for builder, options in OPTIONS.items():
        said = options_help(builder)
        for key, field in options.model_fields.items():
            builders, default = listed[key]
            assert f"`{builder}`" in builders
            assert default.strip('`"') == str(field.default)
            assert f"\n  {key}={field.default} " in said
        assert [key for key, (builders, _) in listed.items() if f"`{builder}`" in builders] == [*options.model_fields]
        assert options.model_fields or said == f"The builder {builder} has no options."
    assert max(map(len, options_help("cooccurrence").splitlines())) <= 80


def test_bounds_and_choices_are_told() -> None:
    text = reference()
    assert "| `betas` | list of 2, each number ≥ 0 < 1 | `[0.9, 0.98]` |" in text
    assert "| `capacity_factor` | number > 0 or `null` | `null` |" in text
    assert "| `zero_stage` | `0`, `1`, `2`, `3` | `1` |" in text
