"""Tables that nobody learned: uniform, or as even as token counts allow; and the router that follows them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.routing.fixed import hash_table
from stablemoe_ds.routing.hashed import HashRouter
from stablemoe_ds.tables.builders import even_table, random_table
from stablemoe_ds.tables.table import RoutingTable, least_load
from tests.routing.batch import D, N, T, alone, stream, tokens

VOCAB, EXPERTS, LAYERS = 4000, 16, 3


def zipf_counts(exponent: float, vocab: int = VOCAB) -> NDArray[np.int64]:
    """The rarest quarter of the ids does not occur."""
    counts = (1e6 / np.arange(1, vocab + 1) ** exponent).astype(np.int64)
    counts[-vocab // 4 :] = 0
    return np.random.default_rng(3).permutation(counts)


def loads(table_LVK: NDArray[np.int32], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return RoutingTable(table_LVK, EXPERTS, tuple(range(1, LAYERS + 1))).expert_load(counts)


@pytest.mark.parametrize("top_k", [1, 3])
def test_random_ids_spread_uniformly(top_k: int) -> None:
    table = random_table(VOCAB, EXPERTS, top_k, LAYERS, seed=5)
    assert table.shape == (LAYERS, VOCAB, top_k)
    expected = VOCAB * top_k / EXPERTS
    for layer in table:
        counts = np.bincount(layer.reshape(-1), minlength=EXPERTS)
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert chi_squared < 37.7, "15 degrees of freedom exceed this once in a thousand times"
        assert all(len(set(row)) == top_k for row in layer.tolist())


@pytest.mark.parametrize("kind", ["random", "even"])
def test_seed_and_layer_decide(kind: str) -> None:
    def make(seed: int) -> NDArray[np.int32]:
        if kind == "random":
            return random_table(VOCAB, EXPERTS, 1, LAYERS, seed)
        return even_table(zipf_counts(1.0), EXPERTS, 1, LAYERS, seed)

    one, same, other = make(1), make(1), make(2)
    assert np.array_equal(one, same)
    for pair in ((one, other), (one[0], one[1])):
        assert np.mean(pair[0] == pair[1]) < 0.3


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_even_load_is_the_least_that_frequencies_allow(exponent: float) -> None:
    counts = zipf_counts(exponent)
    least = least_load(counts, EXPERTS, 1)
    even = loads(even_table(counts, EXPERTS, 1, LAYERS, seed=5), counts)
    assert even.max() == pytest.approx(least, rel=5e-3)
    assert loads(random_table(VOCAB, EXPERTS, 1, LAYERS, seed=5), counts).max() > 1.05 * least


def test_even_table_gives_each_id_the_emptiest_experts() -> None:
    """Replayed in plain Python, the heaviest id first: no expert that was passed over had fewer tokens."""
    counts = zipf_counts(1.0, 300)
    for layer in even_table(counts, 5, 2, 2, seed=5).tolist():
        load = [0] * 5
        for index in sorted(np.flatnonzero(counts).tolist(), key=lambda i: -int(counts[i])):
            chosen = layer[index]
            passed_over = [load[i] for i in range(5) if i not in chosen]
            assert len(set(chosen)) == 2
            assert max(load[i] for i in chosen) <= min(passed_over)
            for expert in chosen:
                load[expert] += int(counts[index])


def test_ids_that_do_not_occur_are_spread_as_well() -> None:
    none = np.zeros(100 * EXPERTS, np.int64)
    assert np.bincount(even_table(none, EXPERTS, 1, 1, seed=5)[0, :, 0]).tolist() == [100] * EXPERTS


@pytest.mark.parametrize("kind", ["random", "even"])
def test_configuration_chooses_the_table(kind: str) -> None:
    counts = zipf_counts(1.0)
    moe = MoEConfig.model_validate(
        {"router": "hash", "layers": [2, 5], "experts": EXPERTS, "top_k": 2, "hash_table": kind}
    )
    table = hash_table(moe, counts, 9, "sha")
    made = random_table(VOCAB, EXPERTS, 2, 2, 9) if kind == "random" else even_table(counts, EXPERTS, 2, 2, 9)
    assert np.array_equal(table.expert_LVK, made)
    assert (table.experts, table.blocks, table.tokenizer) == (EXPERTS, (2, 5), "sha")


def test_router_follows_with_a_gate_of_one_and_learns_nothing() -> None:
    router, view = HashRouter(D, N, 1, False), tokens(padding=True)
    fixed_TK = torch.arange(T)[:, None] % N
    routes = router(torch.full((T, D), torch.nan), view, fixed_TK, alone)
    assert torch.equal(routes.expert_TK[view.real_T], fixed_TK[view.real_T])
    assert (routes.expert_TK[~view.real_T] == -1).all()
    assert (routes.gate_TK == 1).all()
    assert routes.loss_sums == {}
    assert list(router.parameters()) == []
    assert routes.counts_N.tolist() == torch.bincount(fixed_TK[view.real_T][:, 0], minlength=N).tolist()


def test_router_decides_nothing_by_itself() -> None:
    with pytest.raises(ValueError, match="pass the routes of its table"):
        HashRouter(D, N, 1, False)(stream(), tokens(), None, alone)
