"""Runs in which one layer follows a table from the first update while the other learns to the end."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.table import RoutingTable
from tests.distributed.launch import run_distributed
from tests.training.runs import (
    STEPS,
    SWITCH,
    VOCAB,
    TinyData,
    checkpoint_of,
    command,
    command_here,
    differing,
    history,
    restarted,
    run_file,
    small_run,
    tensors_of,
    train_run,
)
from tests.training.test_expert_order import LARGE_EPSILON, assert_same_training
from tests.training.test_simulation import observed_here, same_rows

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
TABLE = "routing_table.safetensors"


def mixed_run(data: TinyData, folder: Path, **sections: Any) -> RunConfig:
    """Block 1 follows a random table, block 2 has the router; checkpoints at half of the run and at its end."""
    file = folder.parent / "table.safetensors"
    rows = random_table(VOCAB, 4, 2, 1, seed=7)
    RoutingTable(rows, 4, (1,), Tokenizer(data.tokenizer).fingerprint).save(file)
    moe = {"router": "topk", "top_k": 2, "layers": [1, 2], "table_layers": [1], "table": str(file)}
    return small_run(
        data,
        folder,
        moe=moe | sections.pop("moe", {}),
        data={"tokenizer": data.tokenizer},
        checkpoint={"every": SWITCH, "keep": 9},
        optimizer=LARGE_EPSILON,
        logging={"probe_every": 3, "eval_every": 1000},
        **sections,
    )


@pytest.fixture(scope="module")
def trained(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run = mixed_run(data, tmp_path_factory.mktemp("mixed") / "run")
    train_run(run)
    return run


def test_only_the_layer_that_learns_moves(trained: RunConfig) -> None:
    folder = Path(trained.directory)
    table = RoutingTable.read(trained.moe.table or "")
    ids_P = np.load(folder / "probe_ids.npy")
    records = [np.load(path) for path in sorted((folder / "probe").glob("*.npy"))]
    assert len(records) == STEPS // 3
    assert all(np.array_equal(record[0], table.expert_LVK[0, ids_P, 0]) for record in records)
    moved = [float((now[1] != before[1]).mean()) for before, now in pairwise(records)]
    assert max(moved) > 0
    assert [line["churn"] for line in history(trained, "probe")][1:] == pytest.approx(moved)
    report = command_here("routing", "report", trained.directory, "--json").json
    assert [layer["block"] for layer in report["layers"]] == [1, 2]
    counts_V = np.load(checkpoint_of(trained, STEPS) / "token_counts.npy")
    assert report["layers"][0]["load"] == pytest.approx(table.expert_load(counts_V)[0].tolist())
    assert [share for _, share in report["history"]["churn"]] == pytest.approx(moved)


def test_a_checkpoint_has_the_table_and_nothing_to_choose_by_in_its_layer(trained: RunConfig) -> None:
    checkpoint, table = checkpoint_of(trained, STEPS), RoutingTable.read(trained.moe.table or "")
    assert RoutingTable.read(checkpoint / TABLE).sha256 == table.sha256
    assert RoutingTable.read(Path(trained.directory) / TABLE).sha256 == table.sha256
    routers = sorted(name for name in tensors_of(checkpoint) if ".router." in name and "/" not in name)
    at = {1: "decoder.layers.1.moe.router.", 2: "decoder.layers.3.moe.router."}
    assert routers == [at[1] + "centroids", at[2] + "bias_N", at[2] + "centroids"]
    assert {line["stage"] for line in history(trained, "train")} == {1}


def test_a_run_that_continues_is_the_same_to_the_bit(trained: RunConfig, tmp_path: Path) -> None:
    """Also without the file of the table, which is in the checkpoint."""
    resumed = restarted(trained, tmp_path / "resumed", SWITCH)
    moe = resumed.moe.model_copy(update={"table": str(tmp_path / "gone")})
    assert "the run continues along table" in " ".join(train_run(resumed.model_copy(update={"moe": moe})).split())
    assert history(resumed) == history(trained)
    assert differing(tensors_of(checkpoint_of(resumed, STEPS)), tensors_of(checkpoint_of(trained, STEPS))) == []


def test_two_processes_train_what_one_does_and_what_was_simulated(
    trained: RunConfig, data: TinyData, tmp_path: Path
) -> None:
    spread = mixed_run(data, tmp_path / "spread", parallel={"expert": 2})
    words = ("--ranks", "2", "--output", str(tmp_path / "updates"), "--json")
    facts = command_here("table", "simulate", run_file(spread, tmp_path / "run.yaml"), *words).json
    assert (facts["updates"], facts["learned_layers"]) == (STEPS, [2])
    seen = run_distributed(2, observed_here, spread)
    same_rows(seen, tmp_path / "updates", 1, STEPS, 2)
    assert_same_training(trained, spread)


def test_evaluation_generation_and_the_exported_table(trained: RunConfig, tmp_path: Path) -> None:
    (final,) = (line for line in history(trained, "valid") if line["step"] == STEPS)
    assert command("eval", trained.directory, "--json").json["perplexity"] == pytest.approx(final["perplexity"])
    (measured,) = command("routing", "bands", trained.directory, "--json").json["checkpoints"]
    bands = measured["bands"]
    total = sum(band["loss"] * band["tokens"] for band in bands if band["tokens"])
    assert total / final["tokens"] == pytest.approx(final["loss"])
    asked = ("generate", trained.directory, "--prompt", "def wrap(self", "--tokens", "6", "--json")
    assert command(*asked).json == command(*asked, "--no-cache").json
    output = tmp_path / "tid2eid.safetensors"
    command_here("table", "export", trained.directory, "--format", "deepseek-v4", "--output", str(output))
    shown = command_here("table", "show", str(output), "--json").json
    assert (shown["blocks"], shown["top_k"]) == ([1], 2)


def test_a_switch_joins_what_was_learned_to_the_table(data: TinyData, tmp_path: Path) -> None:
    """Updates planned along the table of one layer are planned once more along that of both, and none is lost."""
    run = mixed_run(data, tmp_path / "run", moe={"router": "stablemoe"})
    train_run(run)
    given = RoutingTable.read(run.moe.table or "")
    early, late = (RoutingTable.read(checkpoint_of(run, step) / TABLE) for step in (SWITCH, STEPS))
    lines = history(run, "train")
    assert [line["stage"] for line in lines] == [1] * SWITCH + [2] * (STEPS - SWITCH)
    assert [line["agreement"] is None for line in lines] == [False] * SWITCH + [True] * (STEPS - SWITCH)
    assert early.blocks == late.blocks == (1, 2)  # a checkpoint comes after the switch
    assert early.only((1,)).sha256 == given.sha256
    assert early.sha256 == late.sha256
    assert command("eval", run.directory, "--json").json["stage"] == 2
    resumed = restarted(run, tmp_path / "resumed", SWITCH)
    train_run(resumed)
    assert history(resumed) == history(run)
    assert differing(tensors_of(checkpoint_of(resumed, STEPS)), tensors_of(checkpoint_of(run, STEPS))) == []


def test_a_layer_that_was_distilled_goes_on_as_a_table(data: TinyData, tmp_path: Path) -> None:
    moe = {"router": "topk", "top_k": 2, "layers": [1, 2]}
    named, logging = {"tokenizer": data.tokenizer}, {"probe_every": 100}
    learned = small_run(data, tmp_path / "run", moe=moe, data=named, logging=logging)
    train_run(learned)
    tables = tmp_path / "tables.safetensors"
    facts = command("table", "distil", learned.directory, "--output", str(tables), "--json").json
    (final,) = (line for line in history(learned, "valid") if line["step"] == STEPS)
    assert facts["perplexity"] == pytest.approx(final["perplexity"])
    observed = ("table", "build", "observed", learned.directory, "--output", str(tmp_path / "observed"), "--json")
    assert [layer["explained"] for layer in facts["layers"]] == pytest.approx(
        command(*observed).json["made"]["explained"]
    )
    assert np.array_equal(RoutingTable.read(tables).expert_LVK, RoutingTable.read(tmp_path / "observed").expert_LVK)

    goes_on = {"table_layers": [2], "table": str(tables)}
    longer = {"steps": STEPS + 2, "tokens_per_step": 128}
    mixed = small_run(data, tmp_path / "run", moe=moe | goes_on, data=named, logging=logging, schedule=longer)
    assert "blocks 2 follow table" in " ".join(train_run(mixed).split())
    kept = RoutingTable.read(checkpoint_of(mixed, STEPS + 2) / TABLE)
    assert kept.sha256 == RoutingTable.read(tables).only((2,)).sha256
    folder = Path(mixed.directory)
    last, ids_P = np.load(folder / "probe" / f"{STEPS + 2:08d}.npy"), np.load(folder / "probe_ids.npy")
    assert np.array_equal(last[1], kept.expert_LVK[0, ids_P, 0])
