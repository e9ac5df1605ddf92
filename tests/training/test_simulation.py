"""A simulated run against counting token by token, and against what the processes of a real one did."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.moe.capacity import capacity_of
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.table import RoutingTable
from stablemoe_ds.training.simulation import Layout, count_dispatches, judge_update
from tests.cli.test_bad_input import complaint
from tests.distributed.launch import run_distributed
from tests.tables.texts import split_at_random
from tests.training.runs import STEPS, SWITCH, VOCAB, TinyData, command_here, run_file, small_run, train_here


def observed_here(run: RunConfig) -> list[tuple[int, list[int], list[int]]]:
    """What a rank of a real run does: for each dispatch of a training pass the layer, rows by expert, rows it sends."""
    from stablemoe_ds.moe.layer import MoELayer

    seen: list[tuple[int, list[int], list[int]]] = []
    original = MoELayer._ask_experts

    def watched(self: Any, rows: Any, plan: Any, seed: int) -> Any:
        if self.training:
            assert rows.shape[0] == sum(plan.recv_splits)
            seen.append((self.index, list(plan.offsets.sizes), list(plan.send_splits)))
        return original(self, rows, plan, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoELayer, "_ask_experts", watched)
        train_here(run)
    return seen


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "parallel", "top_k", "steps", "splits"),
    [
        (2, {"expert": 2}, 1, 12, False),
        (4, {"expert": 4, "micro_batch": 1}, 2, 12, False),
        (4, {"expert": 2, "tensor": 2, "dispatch_parts": 2}, 1, 12, True),
        (4, {"expert": 4, "expert_placement": "load"}, 1, 36, False),
        (4, {"expert": 4, "sequence": 2, "micro_batch": 2}, 2, 12, True),
        (4, {"expert": 2, "expert_placement": "load", "replicated_experts": 1}, 2, 12, True),
    ],
    ids=str,
)
def test_served_and_sent_rows_are_those_of_a_real_run(
    ranks: int, parallel: dict[str, Any], top_k: int, steps: int, splits: bool, data: TinyData, tmp_path: Path
) -> None:
    """Over an epoch's end, too, and over three of them in 36 updates: the text has fewer tokens than are read."""
    assert PreparedInfo.read(data.train).tokens < steps * 1024
    fingerprint = Tokenizer(data.tokenizer).fingerprint
    table = RoutingTable(random_table(VOCAB, 4, top_k, 2, seed=7), 4, (1, 2), fingerprint)
    (split_at_random(table, list(range(0, VOCAB, 2)), 2) if splits else table).save(tmp_path / "table")
    run = small_run(
        data,
        tmp_path / "run",
        moe={"router": "table", "table": str(tmp_path / "table"), "layers": [1, 2], "top_k": top_k},
        data={"tokenizer": data.tokenizer},
        schedule={"steps": steps, "tokens_per_step": 1024},
        logging={"probe_every": 1000, "eval_every": 1000},
        parallel=parallel,
    )
    words = ("--ranks", str(ranks), "--nodes", "2", "--output", str(tmp_path / "updates"))
    facts = command_here("table", "simulate", run_file(run, tmp_path / "run.yaml"), *words, "--json").json
    served = same_rows(run_distributed(ranks, observed_here, run), tmp_path / "updates", 1, steps, parallel["expert"])
    assert facts["updates"] == steps
    assert served.sum((2, 3)).tolist() == [[1024 * top_k] * 2] * steps


@pytest.mark.distributed
def test_a_run_that_has_frozen_its_routing_is_simulated_from_its_switch_on(data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run", parallel={"expert": 2}, data={"tokenizer": data.tokenizer})
    seen = run_distributed(2, observed_here, run)
    words = ("--ranks", "2", "--output", str(tmp_path / "updates"), "--json")
    facts = command_here("table", "simulate", run_file(run, tmp_path / "run.yaml"), *words).json
    assert facts["updates"] == STEPS - SWITCH
    same_rows(seen, tmp_path / "updates", SWITCH + 1, STEPS, 2)


def same_rows(observed: list[Any], path: Path, first: int, steps: int, expert: int) -> NDArray[np.int64]:
    """What was simulated from the first of these updates on, [updates, L, W, E], if it is what every rank has done."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(first, steps + 1))
    served = np.array([line["served"] for line in lines])  # [updates, L, W, E]
    sent = np.array([line["sent"] for line in lines])  # [updates, L, X, G, G]
    for rank, seen in enumerate(observed):
        for layer in range(served.shape[1]):
            mine = [(sizes, splits) for index, sizes, splits in seen if index == layer]
            each = len(mine) // steps
            assert each * steps == len(mine) > 0
            mine = mine[(first - 1) * each :]
            for update in range(steps + 1 - first):
                dispatches = mine[update * each : (update + 1) * each]
                assert np.array_equal(np.sum([sizes for sizes, _ in dispatches], 0), served[update, layer, rank])
                sends = sent[update, layer, rank // expert, rank % expert]
                assert np.array_equal(np.sum([splits for _, splits in dispatches], 0), sends)
    return served


def slow_counts(ids: NDArray[np.int64], table: RoutingTable, tensor: int, parts: int) -> NDArray[np.int64]:
    """Token by token; shares are whole, the last one smaller, and so parts that come first are larger by one."""
    ranks, micro_batches, tokens = ids.shape
    shape = (len(table.blocks), ranks * tensor, micro_batches, parts, table.experts)
    counts = np.zeros(shape, np.int64)
    share = -(-tokens // tensor)
    for rank in range(ranks):
        for micro in range(micro_batches):
            for holder in range(tensor):
                mine = ids[rank, micro, holder * share : (holder + 1) * share]
                for part, some in enumerate(np.array_split(mine, parts)):
                    for layer, expert_VK in enumerate(table.expert_LVK):
                        for token in some:
                            for one in expert_VK[token]:
                                counts[layer, rank * tensor + holder, micro, part, one] += 1
    return counts


@pytest.mark.parametrize(("tensor", "parts", "top_k"), [(1, 1, 1), (1, 3, 2), (2, 1, 2), (2, 2, 1), (4, 3, 1)])
def test_counts_are_those_of_counting_token_by_token(tensor: int, parts: int, top_k: int) -> None:
    table = RoutingTable(random_table(50, 6, top_k, 2, seed=1), 6, (1, 2))
    ids = np.random.default_rng(2).integers(0, 50, (2, 3, 35))
    counts = count_dispatches(ids, table, tensor, parts)
    assert np.array_equal(counts, slow_counts(ids, table, tensor, parts))


def test_links_waiting_and_capacity_are_those_of_going_through_every_dispatch() -> None:
    """Eight ranks in two groups of four, on one node, a node a group, and nodes that cut groups apart."""
    layers, ranks, micro, parts, experts, size = 2, 8, 2, 2, 12, 4
    counts = np.random.default_rng(3).integers(0, 9, (layers, ranks, micro, parts, experts))
    for nodes in (1, 2, 4, 8):
        layout = Layout(ranks, size, nodes, row_bytes=10, trips=4)
        update = judge_update(5, counts, layout)
        inside = between = rows_sum = waited = most = 0
        capacity, pairs = 0.0, np.zeros((ranks, ranks))
        for layer, m, c in np.ndindex(layers, micro, parts):
            for group in range(ranks // size):
                members = range(group * size, (group + 1) * size)
                served = {
                    holder: [sum(counts[layer, sender, m, c, e] for sender in members) for e in held(holder, size)]
                    for holder in members
                }
                rows = [sum(served[holder]) for holder in members]
                rows_sum, waited, most = rows_sum + sum(rows), waited + size * max(rows), max(most, *rows)
                routed, busiest = sum(rows), max(map(max, served.values()))
                capacity = max(capacity, busiest * experts / routed)
                for sender in members:
                    for holder in members:
                        sent = sum(counts[layer, sender, m, c, e] for e in held(holder, size))
                        if sender == holder:
                            continue
                        pairs[min(sender, holder), max(sender, holder)] += sent * 40
                        if sender // (ranks // nodes) == holder // (ranks // nodes):
                            inside += sent * 40
                        else:
                            between += sent * 40
        assert (update.inside, update.between, update.most_rows) == (inside, between, most)
        assert update.busiest_pair == pairs.max()
        assert update.idle == pytest.approx(1 - rows_sum / waited)
        assert update.capacity == pytest.approx(capacity)
    assert update.number == 5


def held(rank: int, size: int) -> range:
    """The three experts of a rank."""
    return range(rank % size * 3, rank % size * 3 + 3)


def test_the_capacity_it_names_is_the_smallest_that_drops_nothing() -> None:
    counts = np.array([5, 1, 0, 4]).reshape(1, 1, 1, 1, 4)
    factor = judge_update(1, counts, Layout(1, 1, 1, 4, 4)).capacity
    assert capacity_of(factor, 10, 4) == 5
    assert capacity_of(factor * 0.99, 10, 4) == 5, "rounded up"
    assert capacity_of(4 / 5 * factor, 10, 4) == 4


def test_what_it_says(data: TinyData, tmp_path: Path) -> None:
    run = small_run(data, tmp_path / "run", moe={"router": "hash"}, parallel={"expert": 2}, stages={"at_step": None})
    simulate = partial(command_here, "table", "simulate", run_file(run, tmp_path / "run.yaml"))
    facts = simulate("--updates", "3", "--json").json
    said = simulate("--updates", "3").out
    assert (facts["updates"], facts["ranks"], facts["nodes"], facts["experts_of_a_rank"]) == (3, 2, 1, 2)
    assert f"3 updates of 128 tokens along table {facts['table'][:12]}" in said
    assert "2 ranks, 2 a node; 2 of them share the experts, 2 each, placed by number" in said
    assert facts["figures"]["between"] == {"mean": 0.0, "worst": 0.0}
    assert facts["figures"]["inside"]["worst"] > 0
    assert not (tmp_path / "run").exists(), "it leaves nothing where the run will be"


def test_what_cannot_be_simulated_is_refused_in_one_line(data: TinyData, tmp_path: Path) -> None:
    path = run_file(small_run(data, tmp_path / "run"), tmp_path / "run.yaml")
    complaint(command_here("table", "simulate", path), "moe.router: got stablemoe, which learns .* --table")
    none = str(tmp_path / "none")
    complaint(command_here("table", "simulate", path, "--table", none), "nothing at .*none: expected a table file")
    complaint(command_here("table", "simulate", path, "--updates", "0"), "--updates: got 0: expected at least 1")
    complaint(command_here("table", "simulate", path, "--first", "0"), "--first: got 0: expected at least 1")
    complaint(command_here("table", "simulate", path, "--first", "99"), f"--first: got 99: the run has {STEPS} updates")
    complaint(command_here("table", "simulate", path, "--ranks", "4", "--nodes", "3"), "nearest that works: 2")
