"""Each layer frozen alone, against the model called with that layer's routes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stablemoe_ds.evaluation.layer_tables import _perplexities, layers_text
from stablemoe_ds.routing.fixed import TableRouting
from stablemoe_ds.routing.source import LEARNED
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.table import RoutingTable
from tests.evaluation.test_perplexity import random_batch
from tests.tiny import VOCAB


@pytest.mark.parametrize("follows", [[], [2]])
def test_perplexities_with_each_layer_frozen(build: Any, world_groups: Any, follows: list[int]) -> None:
    moe: dict[str, Any] = {"router": "topk", "top_k": 2, "layers": [1, 2, 3]}
    model = build(moe=moe | ({"table_layers": follows, "table": "even"} if follows else {})).eval()
    table, batch = RoutingTable(random_table(VOCAB, 4, 2, 3, seed=1), 4, (1, 2, 3)), random_batch(3)
    learn = [block for block in (1, 2, 3) if block not in follows]

    def perplexity(blocks: list[int]) -> float:
        rows = {b: torch.tensor(table.expert_LVK[b - 1]).long()[batch.ids.t().flatten()] for b in blocks}
        with torch.no_grad():
            log_p = model.logits(batch.ids, rows).double().log_softmax(-1)
        return math.exp(-log_p.gather(-1, batch.labels[..., None])[batch.scored].mean())

    trained_with = TableRouting(table.only(follows)) if follows else LEARNED
    trained = SimpleNamespace(model=model, groups=world_groups, trained_with=trained_with)
    found = _perplexities(trained, table.only(learn), SimpleNamespace(loader=[batch]))  # type: ignore[arg-type]
    wanted = [perplexity(follows + blocks) for blocks in ([], *([block] for block in learn), learn)]
    assert [outcome.perplexity for outcome in found] == pytest.approx(wanted, rel=1e-5)
    assert len(set(wanted)) == len(wanted)


def test_what_is_said_of_them() -> None:
    layers = [
        {"block": block, "explained": 0.9, "explained_held_out": 0.8, "max_load": 1.5, "perplexity": perplexity}
        for block, perplexity in ((2, 10.1), (4, 12.0))
    ]
    facts = {"checkpoint": "run", "step": 4, "watched": ["train"], "held_out": ["valid"], "tokens": 1000}
    said = layers_text(facts | {"perplexity": 10.0, "layers": layers, "perplexity_all_frozen": 13.0}).splitlines()
    assert said[1] == "perplexity over 1,000 tokens of valid"
    rows = [line.split() for line in said[3:]]
    assert rows[1] == ["block", "2", "90.0%", "80.0%", "1.50", "10.100", "+1.00%"]
    assert rows[3] == ["all", "of", "these", "13.000", "+30.00%"]
