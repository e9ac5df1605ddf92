"""Every router by its name in short real runs: it trains, goes on where it stopped, and is evaluated as it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stablemoe_ds.config.routers import ROUTERS
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.corpus import token_counts
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.routing.fixed import hash_table
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
    small_run,
    tensors_of,
    train_run,
)

pytestmark = pytest.mark.timeout(900)  # the first test of them waits for a run of every router
DISTILLED = [name for name, facts in ROUTERS.items() if facts.distilled]
LAYOUT_INDEPENDENT = [name for name, facts in ROUTERS.items() if not facts.by_micro_batch]
STATE = {"topk": "bias_N", "expert_choice": "threshold_N"}


def table_of(data: TinyData) -> str:
    """A file with the table that router hash makes for :func:`run_of`."""
    path = Path(data.tokenizer).with_name("table.safetensors")
    run = run_of("hash", data, path)
    size = run.model.vocab_size or 0
    hash_table(run.moe, np.zeros(size, np.int64), run.seed, Tokenizer(data.tokenizer).fingerprint).save(path)
    return str(path)


def run_of(name: str, data: TinyData, folder: Path, /, **sections: Any) -> RunConfig:
    """A small run by that router with every second checkpoint; its ``stages`` are ignored by most."""
    needed = {"layers": []} if name == "dense" else {"table": table_of(data)} if name == "table" else {}
    moe = {"router": name, "bias_step": 0.01, **needed, **sections.pop("moe", {})}
    base: dict[str, Any] = {
        "data": {"tokenizer": data.tokenizer},
        "checkpoint": {"every": 2, "keep": 99},
        "optimizer": {"lr": 1e-2},
    }
    return small_run(data, folder, moe=moe, **{**base, **sections})


@pytest.fixture(scope="module")
def trained(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """A finished run of every router."""
    folder = tmp_path_factory.mktemp("routers")
    runs = {name: run_of(name, data, folder / name) for name in ROUTERS}
    for run in runs.values():
        train_run(run)
    return runs


def records(run: RunConfig) -> dict[int, Any]:
    """Experts of the probe tokens by update."""
    return {int(name.split(".")[0]): np.load(Path(run.directory) / "probe" / name) for name in probe_records(run)}


@pytest.mark.parametrize("name", ROUTERS)
def test_trains_and_tells_what_it_has(name: str, trained: dict[str, RunConfig]) -> None:
    run, facts = trained[name], ROUTERS[name]
    lines = history(run, "train")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    first = 2 if facts.fixed else 1
    last = 2 if facts.fixed or facts.distilled else 1
    assert [line["stage"] for line in lines] == [first] * SWITCH + [last] * (STEPS - SWITCH)
    assert [line["step"] for line in history(run, "switch")] == [SWITCH] * facts.distilled
    learning = [line for line in lines if line["stage"] == 1]
    assert all((line["balance_loss"] is not None) == bool(facts.balance_weight) for line in learning)
    assert all((line["distill_loss"] is not None) == facts.distilled for line in learning)
    assert all((line["agreement"] is not None) == facts.distilled for line in learning)
    assert all(len(line["load"]) == int(facts.routed) for line in lines)
    unserved = [line["unserved_rate"] for line in lines]
    if name == "expert_choice":
        assert all(0 < rate < 1 for rate in unserved)
        assert all(line["load"] == [1.0] for line in lines)
    else:
        assert set(unserved) == {None}
    if name.startswith("base"):
        assert all(line["load"] == [1.0] for line in learning), "128 tokens, 32 for each expert"


@pytest.mark.parametrize("name", ROUTERS)
def test_resume_is_bit_exact(name: str, trained: dict[str, RunConfig], tmp_path: Path) -> None:
    whole = trained[name]
    end = tensors_of(checkpoint_of(whole, STEPS))
    if name in STATE:
        state = f"decoder.layers.1.moe.router.{STATE[name]}"
        assert not torch.equal(end[state], tensors_of(checkpoint_of(whole, 2))[state])
    resumed = restarted(whole, tmp_path / "resumed", SWITCH - 2)
    train_run(resumed)
    assert differing(tensors_of(checkpoint_of(resumed, STEPS)), end) == []
    assert history(resumed) == history(whole)
    assert probe_records(resumed) == probe_records(whole)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_checkpoint_evaluates_as_the_run_did(name: str, trained: dict[str, RunConfig]) -> None:
    (final,) = (line for line in history(trained[name], "valid") if line["step"] == STEPS)
    said = command("eval", trained[name].directory, "--json").json
    assert said["perplexity"] == pytest.approx(final["perplexity"], rel=1e-6)
    assert said["load"] == final["load"]
    assert said["stage"] == final["stage"]


@pytest.mark.parametrize("name", DISTILLED)
def test_stage_1_evaluates_with_both_routers(name: str, trained: dict[str, RunConfig]) -> None:
    at_switch = history(trained[name], "valid")[0]
    assert at_switch["step"] == SWITCH
    said = command("eval", str(checkpoint_of(trained[name], SWITCH - 2)), "--json").json
    for facts in (said, at_switch):
        assert facts["stage"] == 1
        assert facts["perplexity"] != facts["perplexity_distilled"] is not None
    assert 0 <= said["agreement"] <= 1


@pytest.mark.parametrize("name", ["expert_choice", "base", "topk", "hash", "dense_wider"])
def test_generation_does_not_depend_on_the_cache(name: str, trained: dict[str, RunConfig]) -> None:
    """What a token's expert depends on in use is there when the token is read: nothing looks ahead."""
    asked = ("generate", trained[name].directory, "--prompt", "def wrap(self", "--tokens", "6", "--json")
    assert command(*asked).json == command(*asked, "--no-cache").json


@pytest.mark.parametrize("name", DISTILLED)
def test_nothing_moves_what_was_frozen(name: str, trained: dict[str, RunConfig]) -> None:
    run = trained[name]
    found = records(run)
    assert all((found[step] == found[SWITCH]).all() for step in found if step >= SWITCH)
    tables, routers = set(), []
    for step in range(SWITCH, STEPS + 1, 2):
        checkpoint = checkpoint_of(run, step)
        tables.add(RoutingTable.read(checkpoint / "routing_table.safetensors").sha256)
        weights = load_file(checkpoint / "weights-0000.safetensors")
        routers.append({key: value for key, value in weights.items() if ".distilled." in key})
    assert len(tables) == 1
    assert all(differing(routers[0], later) == [] for later in routers)
    before = load_file(checkpoint_of(run, SWITCH - 2) / "weights-0000.safetensors")
    assert differing(routers[0], {key: before[key] for key in routers[0]}) != [], "before the switch it does move"


def test_balanced_table_keeps_its_limit(trained: dict[str, RunConfig]) -> None:
    (switch,) = history(trained["stablemoe_balanced"], "switch")
    assert switch["load"] <= max(1.1, switch["least_load"]) + 1e-6
    (plain,) = history(trained["stablemoe"], "switch")
    assert switch["load"] < plain["load"]
    assert switch["agreement"] == plain["agreement"], "until the switch the two are the same run"


@pytest.mark.parametrize("kind", ["random", "even"])
def test_hash_follows_one_table_from_the_first_update(kind: str, data: TinyData, tmp_path: Path) -> None:
    run = run_of("hash", data, tmp_path / "run", moe={"hash_table": kind})
    train_run(run)
    counts = token_counts(run.data.train, Tokenizer(data.tokenizer), run.model.vocab_size or 0)
    made = hash_table(run.moe, counts, run.seed, "").sha256
    paths = [checkpoint_of(run, step) for step in range(2, STEPS + 1, 2)]
    assert {RoutingTable.read(path / "routing_table.safetensors").sha256 for path in paths} == {made}
    found = list(records(run).values())
    assert all((record == found[0]).all() for record in found)


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUT_INDEPENDENT)
def test_two_processes_train_what_one_does(name: str, data: TinyData, tmp_path: Path) -> None:
    runs = []
    bare = {"data": {"tokenizer": data.tokenizer, "valid": []}, "checkpoint": {}, "logging": {"probe_every": STEPS}}
    for ranks in (1, 2):
        parallel = {"expert": ranks if ROUTERS[name].routed else 1}
        run = run_of(name, data, tmp_path / str(ranks), parallel=parallel, optimizer={"lr": 1e-3}, **bare)
        train_run(run, ranks)
        runs.append(history(run, "train"))
    for one, two in zip(*runs, strict=True):
        for figure in ("loss", "balance_loss", "distill_loss", "grad_norm"):
            assert two[figure] == (one[figure] and pytest.approx(one[figure], rel=1e-3, abs=1e-5)), figure
    assert [line["load"] for line in runs[0][:3]] == [line["load"] for line in runs[1][:3]]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["base_fixed", "expert_choice", "topk"])
def test_every_rank_shares_experts_and_state(name: str, data: TinyData, tmp_path: Path) -> None:
    """Two processes, each with half of the experts, go on from what they saved together."""
    whole = run_of(name, data, tmp_path / "whole", parallel={"expert": 2})
    train_run(whole, 2)
    resumed = restarted(whole, tmp_path / "resumed", 4)
    train_run(resumed, 2)
    assert history(resumed) == history(whole)
    assert differing(tensors_of(checkpoint_of(resumed, STEPS)), tensors_of(checkpoint_of(whole, STEPS))) == []
