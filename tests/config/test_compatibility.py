"""Every cell of the compatibility matrix is trained by a test, refused in words, or needs a GPU; and docs show it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

from stablemoe_ds.config.compatibility import REFUSALS, SETTINGS, Refusal, document, facts, verdict
from stablemoe_ds.config.rules import check
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.errors import UserError
from tests.distributed.cases import run_of
from tests.distributed.test_invariance import BF16
from tests.distributed.test_parity import COMPILED, LAYOUTS

DOCUMENT = Path(__file__).parents[2] / "docs" / "parallelism.md"
OVERRIDES = {
    **{f"ZeRO {stage}": f"parallel.zero_stage={stage}" for stage in range(4)},
    **{dtype: f"precision.dtype={dtype}" for dtype in ("fp32", "bf16", "fp16")},
    "compile": "parallel.compile=true",
    "offload": "parallel.offload=all",
}


def together(run: RunConfig) -> set[frozenset[str]]:
    """The pairs of settings that a run has."""
    return {frozenset(pair) for pair in combinations([s.name for s in SETTINGS if s.holds(run)], 2)}


def test_every_cell_is_trained_refused_or_needs_a_gpu() -> None:
    runs = [run_of(shape, **layout) for _, shape, layout in [*LAYOUTS, *(case.values for case in COMPILED)]]
    runs += [run_of("modern", None, "bf16", **layout) for _, layout in BF16]
    trained = set[frozenset[str]]().union(*map(together, runs))
    trained.add(frozenset({"bf16", "compile"}))  # in tests/model/test_compile.py
    allowed = {frozenset((a.name, b.name)) for a, b in combinations(SETTINGS, 2) if verdict(a, b) == "yes"}
    assert sorted(map(sorted, allowed - trained)) == []


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: f"{refusal.first}, {refusal.second}")
def test_what_is_refused_is_refused_by_the_rules(make: Callable[..., RunConfig], refusal: Refusal) -> None:
    key = next(setting.key for setting in SETTINGS if setting.name == refusal.first)
    with pytest.raises(UserError) as caught:
        check(make(OVERRIDES[refusal.first], OVERRIDES[refusal.second]))
    assert str(caught.value).startswith(f"{key}: got ")
    assert str(caught.value).endswith(f"{refusal.reason}; nearest that works: {refusal.nearest}")
    for alone in (refusal.first, refusal.second):
        check(make(f"parallel.zero_stage={3 if alone == 'offload' else 1}", OVERRIDES[alone]))


def test_the_page_is_current() -> None:
    command = "python -m stablemoe_ds.config.compatibility > docs/parallelism.md"
    assert DOCUMENT.read_text(encoding="utf-8") == document(), f"the matrix has changed; run {command}"
    verdicts = [pair["verdict"] for pair in facts()["pairs"]]
    assert verdicts.count("no") == document().count("| no ") == len(REFUSALS)
