"""Settings that a run does not look at: each is known, and those that were given are said."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stablemoe_ds.config.cost_report import render, report
from stablemoe_ds.config.idle_settings import LOOKED_AT, idle_text
from stablemoe_ds.config.messages import known_keys
from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.config.rules import check
from stablemoe_ds.config.schema import RunConfig

Make = Callable[..., RunConfig]
ALWAYS = {"router", "layers", "table_layers", "start_table", "table_options"}
"""They have an effect, or are refused where they have none."""


def test_of_every_setting_it_is_known_whether_it_is_looked_at() -> None:
    assert {*LOOKED_AT, *ALWAYS, "distilled"} == set(known_keys(MoEConfig))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("", None),
        ("moe.router=hash moe.router_input=raw", None),
        ("moe.router=hash moe.hash_table=even", None),
        ("moe.hash_table=even", "without effect on router 'stablemoe': moe.hash_table \"even\""),
        ("moe.router=switch moe.balance_weight=0.1 moe.distilled.lr_scale=10", "moe.distilled.lr_scale 10.0"),
        ("moe.router=topk moe.balance_weight=0.1 moe.bias_step=0.01", "router 'topk': moe.balance_weight 0.1"),
        ("moe.router=stablemoe_balanced moe.table_load=1.05", None),
        ("moe.table_load=1.05", "moe.table_load 1.05"),
        ("moe.distilled.layers=2", "moe.distilled.layers 2"),
        ("moe.distilled.layers=2 moe.distilled.kind=transformer", None),
        ("moe.balance_weight=0 moe.balance_over=micro_batch", 'moe.balance_over "micro_batch"'),
    ],
)
def test_what_has_no_effect_is_said_and_not_refused(make: Make, overrides: str, said: str | None) -> None:
    run = make(*overrides.split())
    check(run, 1)
    text, facts = idle_text(run.moe), report(run, 1)
    if said is None:
        assert text is None
        assert facts["notes"] == []
    else:
        assert text is not None
        assert text.endswith(said)
        assert facts["notes"] == [text]
        assert text in render(facts).splitlines()
