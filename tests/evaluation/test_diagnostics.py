"""The diagnostics of a record against counting by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from stablemoe_ds.evaluation.diagnostics import RoutingSeries, routing_series
from stablemoe_ds.evaluation.specialisation import use_of_pairs
from stablemoe_ds.run_directory.metrics import MetricsLog, probe_seconds, training_seconds
from stablemoe_ds.run_directory.probe_records import RouteRecords

EXPERTS, TOKENS = 4, 600


def entropy(values) -> float:
    counts = Counter(values)
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


@pytest.fixture
def ids() -> np.ndarray:
    return (np.random.default_rng(3).zipf(1.6, TOKENS) % 50).astype(np.int32)


@pytest.fixture
def records(ids: np.ndarray) -> RouteRecords:
    """Two records of two layers: at random with some tokens unserved, by id, all to one expert, none served."""
    rng = np.random.default_rng(4)
    at_random = rng.integers(-1, EXPERTS, TOKENS)
    layers = [[at_random, ids % EXPERTS], [np.full(TOKENS, 2), np.full(TOKENS, -1)]]
    return RouteRecords(np.array([10, 20]), np.array(layers).astype(np.int16))


@pytest.fixture
def series(records: RouteRecords, ids: np.ndarray) -> RoutingSeries:
    return routing_series(records, ids, EXPERTS)


def test_numbers_of_a_random_routing(series, records, ids):
    pairs = [(i, e) for i, e in zip(ids.tolist(), records.expert_HLP[0, 0].tolist(), strict=True) if e >= 0]
    by_expert = {e: [i for i, other in pairs if other == e] for e in range(EXPERTS)}
    served = [len(by_expert[e]) for e in range(EXPERTS)]
    mean = sum(served) / EXPERTS
    assert series.unserved[0, 0] == pytest.approx(1 - len(pairs) / TOKENS)
    assert series.unserved[0, 0] > 0.1
    assert series.load[0, 0] == pytest.approx(max(served) / mean)
    deviation = math.sqrt(sum((n - mean) ** 2 for n in served) / EXPERTS)
    assert series.load_cv[0, 0] == pytest.approx(deviation / mean)
    bits = [entropy(by_expert[e]) for e in range(EXPERTS)]
    assert series.expert_bits[0, 0] == pytest.approx(bits)
    assert series.cohesion[0, 0] == pytest.approx(sum(b * n for b, n in zip(bits, served, strict=True)) / len(pairs))
    of_expert = entropy([e for _, e in pairs])
    mutual = entropy([i for i, _ in pairs]) + of_expert - entropy(pairs)
    assert series.nmi[0, 0] == pytest.approx(mutual / of_expert)


def test_chance_explains_a_random_routing_and_not_one_by_id(series):
    assert series.nmi[0, 0] == pytest.approx(series.nmi_chance[0, 0], abs=0.03)
    assert series.nmi[0, 1] == pytest.approx(1)
    assert series.nmi_chance[0, 1] < 0.3


def test_cohesion_is_what_the_expert_leaves_open_of_the_id(series, ids):
    assert series.cohesion[0, 1] == pytest.approx(entropy(ids.tolist()) - entropy((ids % EXPERTS).tolist()))


def test_one_expert_or_none_is_no_error(series, ids):
    assert (series.load[1, 0], series.unserved[1, 0]) == (EXPERTS, 0)
    assert series.cohesion[1, 0] == pytest.approx(entropy(ids.tolist()))
    assert (series.load[1, 1], series.unserved[1, 1], series.cohesion[1, 1]) == (0, 1, 0)
    assert all(np.isfinite(values).all() for values in vars(series).values())


def test_tokens_without_an_expert_are_in_no_profile(ids):
    experts = np.where(np.arange(TOKENS) < 100, 1, -1)
    use = use_of_pairs(ids, experts, EXPERTS, block=2)
    assert use.served_N.tolist() == [0, 100, 0, 0]
    assert sorted(use.ids.tolist()) == sorted(set(ids[:100].tolist()))


def test_ids_of_another_probe_are_refused(records, ids):
    with pytest.raises(ValueError, match="600 probe tokens"):
        routing_series(records, ids[:-1], EXPERTS)


def test_training_seconds_leave_out_what_no_update_took(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("train", 10, tokens_per_second=200.0)
    log.append("valid", 10, perplexity=5.0)
    log.append("probe", 10, seconds=0.25)
    log.append("train", 30, tokens_per_second=400.0)
    log.append("probe", 30, seconds=0.5)
    # 10 updates of 100 tokens at 200 tokens/s, then 20 at 400 tokens/s.
    assert training_seconds(log.read(), 100) == [(10, 5.0), (30, 10.0)]
    assert probe_seconds(log.read()) == 0.75
    assert probe_seconds([]) is None
