"""What is counted of a router's choices is what its layers report, id by id."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stablemoe_ds.evaluation.observed_routes import count_routes
from stablemoe_ds.routing.fixed import TableRouting, freeze
from stablemoe_ds.routing.source import LEARNED
from stablemoe_ds.tables.observed import explained, observed_table
from tests.evaluation.test_perplexity import random_batch
from tests.tiny import VOCAB


def same(total):
    return total


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"router": "switch"},
        {"router": "base"},
        {"router": "topk", "top_k": 2},
        {"router": "expert_choice", "top_k": 2},
    ],
    ids=str,
)
def test_counts_are_those_of_the_layers(build, moe):
    model = build(moe=moe).eval()
    batches = [random_batch(3), random_batch(2, seed=5)]
    real = batches[0].real.clone()
    real[1, 12:] = False
    batches[0] = replace(batches[0], real=real)
    wanted = np.zeros((2, VOCAB, model.run_config.moe.experts), np.int64)
    for batch in batches:
        for counts, layer in zip(wanted, model(batch).layers, strict=True):
            for token, experts in enumerate(layer.expert_TK.tolist()):
                row, position = token % len(batch.ids), token // len(batch.ids)
                for expert in experts:
                    if expert >= 0:
                        assert batch.real[row, position]
                        counts[int(batch.ids[row, position]), expert] += 1
    found = count_routes(model.train(), batches, LEARNED, same, "cpu")
    assert np.array_equal(found, wanted)
    assert model.training


def test_a_table_is_observed_as_it_is(tiny_model):
    routing = freeze(tiny_model.distilled_routers, 1, (2, 3))
    assert isinstance(routing, TableRouting)
    served = count_routes(tiny_model, [random_batch(4)], routing, same, "cpu")
    table, seen = observed_table(served, 1, None), served.sum(2) > 0
    assert np.array_equal(table[seen], routing.table.expert_LVK[seen])
    assert explained(served, table) == [1.0, 1.0]
    assert explained(count_routes(tiny_model, [random_batch(4)], LEARNED, same, "cpu"), table) < [1.0, 1.0]
