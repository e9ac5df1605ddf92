"""Runs along a table from a file: hash's own gives hash's run, and a checkpoint keeps what the file may lose."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stablemoe_ds.config.costs import parameters
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.table_corpus import table_corpus
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.tables.builders import build_table
from stablemoe_ds.tables.table import RoutingTable
from tests.training.runs import (
    STEPS,
    SWITCH,
    TinyData,
    checkpoint_of,
    command,
    differing,
    history,
    probe_records,
    restarted,
    run_file,
    tensors_of,
    train_run,
)
from tests.training.test_routers import run_of, table_of

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def trained(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("table")
    file = shutil.copy(table_of(data), folder / "table.safetensors")
    run = run_of("table", data, folder / "run", moe={"table": str(file)})
    train_run(run)
    return run


def test_the_table_of_hash_gives_its_run_to_the_bit(trained: RunConfig, data: TinyData, tmp_path: Path) -> None:
    hashed = run_of("hash", data, tmp_path / "hash")
    train_run(hashed)
    assert history(trained) == history(hashed)
    assert differing(tensors_of(checkpoint_of(trained, STEPS)), tensors_of(checkpoint_of(hashed, STEPS))) == []
    assert probe_records(trained) == probe_records(hashed)


def test_the_run_and_its_checkpoints_keep_the_table(trained: RunConfig) -> None:
    assert trained.moe.table is not None
    folders = [Path(trained.directory), *(checkpoint_of(trained, step) for step in range(2, STEPS + 1, 2))]
    kept = {RoutingTable.read(folder / "routing_table.safetensors").sha256 for folder in folders}
    assert kept == {RoutingTable.read(trained.moe.table).sha256}


@pytest.mark.parametrize("file", ["the same", "another", "none"])
def test_a_run_that_continues_follows_the_table_of_its_checkpoint(
    file: str, trained: RunConfig, tmp_path: Path
) -> None:
    table = RoutingTable.read(trained.moe.table or "")
    named = tmp_path / "table.safetensors"
    if file != "none":
        moved = table.expert_LVK if file == "the same" else (table.expert_LVK + 1) % np.int32(table.experts)
        RoutingTable(moved, table.experts, table.blocks, table.tokenizer).save(named)
    resumed = restarted(trained, tmp_path / "resumed", 6)
    said = train_run(resumed.model_copy(update={"moe": resumed.moe.model_copy(update={"table": str(named)})}))
    goes_on = f"the run continues along table {table.sha256[:12]} of its checkpoint"
    assert (goes_on in " ".join(said.split())) is (file != "the same")
    assert history(resumed) == history(trained)
    assert differing(tensors_of(checkpoint_of(resumed, STEPS)), tensors_of(checkpoint_of(trained, STEPS))) == []


def test_evaluation_and_generation_need_no_file(trained: RunConfig, tmp_path: Path) -> None:
    copied = restarted(trained, tmp_path / "copied", STEPS)
    file = Path(trained.moe.table or "")
    aside = file.rename(file.with_suffix(".aside"))
    try:
        said = command("eval", copied.directory, "--json").json
        asked = ("generate", copied.directory, "--prompt", "def wrap(self", "--tokens", "6", "--json")
        assert command(*asked).json == command(*asked, "--no-cache").json
    finally:
        aside.rename(file)
    (final,) = (line for line in history(trained, "valid") if line["step"] == STEPS)
    assert said["perplexity"] == pytest.approx(final["perplexity"], rel=1e-6)
    assert said["stage"] == 2


@pytest.mark.distributed
def test_a_table_that_the_run_builds_is_that_of_the_command(data: TinyData, tmp_path: Path) -> None:
    """Of the same text, options and seed; two processes have the same one, and a run that continues builds none."""
    asked = {"table": "cooccurrence", "table_options": {"dims": 8, "max_load": 1.5}}
    alone = run_of("table", data, tmp_path / "alone", moe=asked)
    said = train_run(alone)
    assert "building table cooccurrence from the training text" in said
    two = run_of("table", data, tmp_path / "two", moe=asked, parallel={"expert": 2})
    train_run(two, ranks=2)
    moe, file = alone.moe, tmp_path / "table.safetensors"
    shape = ("--experts", str(moe.experts), "--layers", *map(str, moe.layers), "--seed", str(alone.seed))
    text = ("--data", alone.data.train[0].path)
    command("table", "build", "cooccurrence", "dims=8", "max_load=1.5", *text, *shape, "--output", str(file))
    wanted = RoutingTable.read(file)
    for run in (alone, two):
        assert np.array_equal(
            RoutingTable.read(Path(run.directory) / "routing_table.safetensors").expert_LVK, wanted.expert_LVK
        )
    again = restarted(alone, tmp_path / "again", 6)
    assert "building table" not in train_run(again)
    assert history(again) == history(alone)


STARTED = {"moe": {"start_table": "cooccurrence", "table_options": {"dims": 8}}, "optimizer": {"lr": 1e-6}}


@pytest.fixture(scope="module")
def started(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, str]:
    """A run whose routers started from a table and learned next to nothing, and what it said."""
    run = run_of("stablemoe", data, tmp_path_factory.mktemp("started") / "run", **STARTED)
    return run, train_run(run)


@pytest.mark.distributed
def test_routers_that_start_from_a_table(started: tuple[RunConfig, str], data: TinyData, tmp_path: Path) -> None:
    """Two processes under ZeRO 3 start as one does: with the table, once, and not when the run continues."""
    alone, said = started
    assert "building table cooccurrence" in said
    assert "routers start from table" in said
    two = run_of("stablemoe", data, tmp_path / "two", **STARTED, parallel={"expert": 2, "zero_stage": 3})
    train_run(two, ranks=2)
    built = build_table(
        "cooccurrence",
        {"dims": 8},
        table_corpus(alone.data.train, Tokenizer(data.tokenizer)),
        experts=alone.moe.experts,
        top_k=1,
        blocks=alone.moe.layers,
        seed=alone.seed,
    )
    for run in (alone, two):
        frozen = RoutingTable.read(Path(run.directory) / "routing_table.safetensors")
        assert frozen.sha256 == built.sha256, "so low a learning rate leaves the start as it is"
    for here, there in zip(history(alone, "train")[:SWITCH], history(two, "train"), strict=False):
        for key in ("loss", "agreement", "load"):
            assert here[key] == pytest.approx(there[key], rel=1e-5), key
    again = restarted(alone, tmp_path / "again", 2)
    said = train_run(again)
    assert "building table" not in said
    assert "routers start" not in said
    assert history(again) == history(alone)


def test_the_table_of_a_small_model_serves_one_of_several_times_its_size(
    started: tuple[RunConfig, str], data: TinyData, tmp_path: Path
) -> None:
    small = started[0]
    learned = Path(small.directory) / "routing_table.safetensors"
    shape = {"layers": 8, "hidden_size": 64, "ffn_hidden_size": 128}
    large = run_of("table", data, tmp_path / "large", model=shape, moe={"table": str(learned), "layers": [3]})
    sizes = [parameters(run).total for run in (small, large)]
    assert sizes[1] > 4 * sizes[0]
    train_run(large)
    followed = RoutingTable.read(Path(large.directory) / "routing_table.safetensors")
    assert np.array_equal(followed.expert_LVK, RoutingTable.read(learned).expert_LVK)
    assert (small.moe.layers, followed.blocks) == ([1], (3,))


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"table": "cooccurrence", "table_options": {"dim": 8}}, "unknown option dim"),
        ({"table": "cooccurrence", "table_options": {"max_load": 0.5}}, "max_load: got 0.5"),
        ({"table": "some.safetensors", "table_options": {"max_load": 1.5}}, "for a table that the run builds"),
        ({"table": None}, "random, even, scattered, cooccurrence"),
    ],
)
def test_options_of_a_table_that_cannot_be_built(
    moe: dict[str, Any], said: str, data: TinyData, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        run_of("table", data, tmp_path, moe=moe)


def test_a_foreign_table_is_refused_before_anything_is_written(
    trained: RunConfig, data: TinyData, tmp_path: Path
) -> None:
    table = RoutingTable.read(trained.moe.table or "")
    foreign = tmp_path / "foreign.safetensors"
    RoutingTable(table.expert_LVK, table.experts, table.blocks, "ab" * 32).save(foreign)
    run = run_of("table", data, tmp_path / "run", moe={"table": str(foreign)})
    file = run_file(run, tmp_path / "run.yaml")
    for words in (("train", file), ("config", "check", file)):
        answer = command(*words)
        assert answer.code == 2
        assert f"{foreign} is for ids of tokenizer abababababab, but the run has tokenizer" in answer.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
