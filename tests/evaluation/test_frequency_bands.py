"""Losses and gates by band are those of the tokens, one by one."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from stablemoe_ds.evaluation.frequency_bands import bands_of, measure_bands, render_bands
from stablemoe_ds.routing.source import LEARNED
from tests.evaluation.test_perplexity import random_batch
from tests.tiny import VOCAB


def same(total):
    return total


def test_bands_have_equal_shares_of_the_text():
    counts = np.array([1, 0, 40, 9, 25, 5, 20])
    assert bands_of(counts, 1).tolist() == [0] * 7
    # In order of count: 40, 25, 20, 9, 5, 1, 0; before them stand 0, 40, 65, 85, 94, 99, 100 of 100.
    assert bands_of(counts, 4).tolist() == [3, 3, 0, 3, 1, 3, 2]
    assert bands_of(np.array([97, 1, 1, 1]), 4).tolist() == [0, 3, 3, 3]
    assert bands_of(np.zeros(3, np.int64), 2).tolist() == [0, 0, 0]


@pytest.mark.parametrize("moe", [{}, {"top_k": 2, "gate": "learned"}, {"router": "expert_choice", "top_k": 2}], ids=str)
def test_a_band_is_the_mean_of_its_tokens(build, moe):
    model, counts, bands = build(moe=moe).eval(), np.random.default_rng(0).integers(0, 90, VOCAB), 3
    batches = [random_batch(3), random_batch(2, seed=5)]
    scored = batches[0].scored.clone()
    scored[1, 12:] = False
    batches[0] = replace(batches[0], scored=scored)
    band = bands_of(counts, bands)
    losses, gates = defaultdict(list), defaultdict(list)
    for batch in batches:
        output = model(batch)
        for row, position in np.argwhere(batch.scored.numpy()):
            losses[band[batch.labels[row, position]]].append(float(output.loss_BS[row, position]))
        for number, layer in enumerate(output.layers):
            for token, pairs in enumerate(zip(layer.expert_TK.tolist(), layer.gate_TK.tolist(), strict=True)):
                read = band[batch.ids[token % len(batch.ids), token // len(batch.ids)]]
                for expert, gate in zip(*pairs, strict=True):
                    if expert >= 0:
                        gates[number, read, expert].append(gate)
                        gates[number, read].append(gate)
    found = measure_bands(model, batches, LEARNED, same, "cpu", counts, bands)
    for number, one in enumerate(found):
        assert one.ids == (band == number).sum()
        assert one.share == pytest.approx(counts[band == number].sum() / counts.sum())
        assert one.tokens == len(losses[number])
        assert one.loss == pytest.approx(np.mean(losses[number]), rel=1e-6)
        for layer in range(2):
            assert one.gates[layer] == pytest.approx(np.mean(gates[layer, number]), rel=1e-6)
            for expert, mean in enumerate(one.gates_of_experts[layer]):
                seen = gates[layer, number, expert]
                assert mean == (pytest.approx(np.mean(seen), rel=1e-6) if seen else None)


def test_a_dense_model_has_losses_alone(build):
    found = measure_bands(
        build(moe={"router": "dense", "layers": []}), [random_batch(2)], LEARNED, same, "cpu", np.ones(VOCAB, int), 2
    )
    assert [one.gates for one in found] == [[], []]
    assert all(one.loss is not None for one in found)


def test_two_models_are_told_apart_by_band():
    def bands(losses, gates):
        return [
            {"ids": 3, "share": 0.5, "loss": loss, "gates": gates, "gates_of_experts": [[0.5, None]] * len(gates)}
            for loss in losses
        ]

    facts = [{"run": "dense", "bands": bands([3.0, 6.0], [])}, {"run": "moe", "bands": bands([2.5, None], [0.75])}]
    head, first, second = render_bands(facts).splitlines()
    assert "second lower by" in head
    assert first.split() == ["1", "3", "50.0%", "3.000", "2.500", "0.500", "0.750", "(0.500", "to", "0.500)"]
    assert second.split()[3:6] == ["6.000", "-", "-"]
