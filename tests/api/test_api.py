"""What ``import stablemoe_ds`` shows: documented names, imported when they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import stablemoe_ds
from stablemoe_ds.api.api_reference import api_reference

ROOT = Path(__file__).parents[2]


def test_names_are_there_and_no_other() -> None:
    assert all(getattr(stablemoe_ds, name).__doc__ for name in stablemoe_ds.__all__)
    assert set(stablemoe_ds.__all__) <= set(dir(stablemoe_ds))
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = stablemoe_ds.no_such_name


@pytest.mark.parametrize("name", ["load_run", "RoutingTable", "UserError"])
def test_what_needs_no_torch_brings_none(name: str) -> None:
    code = f"from stablemoe_ds import {name}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "deepspeed", "megatron"} & set(loaded) == set()


def test_reference_is_current() -> None:
    command = "python -m stablemoe_ds.api.api_reference > docs/api.md"
    document = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert document == api_reference(), f"a docstring has changed; run {command}"


def test_reference_names_everything() -> None:
    text = api_reference()
    for name in stablemoe_ds.__all__:
        assert f"\n## {name}\n" in text
    for member in ("OpenedModel.logits", "OpenedModel.table", "MoELayer.freeze", "RoutingTable.read"):
        assert f"\n### {member}\n" in text
