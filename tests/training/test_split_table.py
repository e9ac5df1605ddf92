"""Runs along a table that splits its hottest ids: the same on several ranks, continued, evaluated and generating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stablemoe_ds import open_model
from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.data.corpus import PreparedInfo
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.evaluation.generate import generate
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.table import RoutingTable
from tests.tables.texts import slow_experts, split_at_random
from tests.training.runs import (
    STEPS,
    SWITCH,
    VOCAB,
    TinyData,
    checkpoint_of,
    command,
    differing,
    history,
    restarted,
    run_file,
    small_run,
    tensors_of,
    train_run,
)
from tests.training.test_expert_order import LARGE_EPSILON, assert_same_training

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def split_run(data: TinyData, folder: Path, **sections: Any) -> RunConfig:
    """Two layers along a random table that splits the ten commonest ids, documents apart."""
    file = folder.parent / "table.safetensors"
    tokenizer = Tokenizer(data.tokenizer)
    hottest = np.argsort(-PreparedInfo.read(data.train).token_counts())[:10]
    plain = RoutingTable(random_table(VOCAB, 4, 1, 2, seed=7), 4, (1, 2), tokenizer.fingerprint)
    split_at_random(plain, sorted(hottest.tolist()), 2).save(file)
    return small_run(
        data,
        folder,
        moe={"router": "table", "table": str(file), "layers": [1, 2], "gate": "doubled"},
        data={"tokenizer": data.tokenizer, "document_mask": "attention"},
        optimizer=LARGE_EPSILON,
        stages={"at_step": None},
        checkpoint={"every": SWITCH, "keep": 9},
        **sections,
    )


@pytest.fixture(scope="module")
def trained(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run = split_run(data, tmp_path_factory.mktemp("split") / "run")
    train_run(run)
    return run


@pytest.mark.parametrize("parallel", [{"sequence": 2}, {"expert_placement": "load"}], ids=str)
def test_two_processes_train_what_one_does(
    parallel: dict[str, Any], trained: RunConfig, data: TinyData, tmp_path: Path
) -> None:
    spread = split_run(data, tmp_path / "spread", parallel={"expert": 2, **parallel})
    train_run(spread, ranks=2)
    assert_same_training(trained, spread)


def test_a_run_that_continues_is_the_same_to_the_bit(trained: RunConfig, tmp_path: Path) -> None:
    """Also without the file of the table, which is in the checkpoint."""
    resumed = restarted(trained, tmp_path / "resumed", SWITCH)
    moe = resumed.moe.model_copy(update={"table": str(tmp_path / "gone")})
    train_run(resumed.model_copy(update={"moe": moe}))
    assert history(resumed) == history(trained)
    assert differing(tensors_of(checkpoint_of(resumed, STEPS)), tensors_of(checkpoint_of(trained, STEPS))) == []


def test_evaluation_and_the_table_of_the_run(trained: RunConfig) -> None:
    (final,) = (line for line in history(trained, "valid") if line["step"] == STEPS)
    assert command("eval", trained.directory, "--json").json["perplexity"] == pytest.approx(final["perplexity"])
    table = RoutingTable.read(trained.moe.table or "")
    shown = command("table", "show", trained.directory, "--json").json
    assert (shown["sha256"], shown["split"]["rows"], len(shown["split"]["ids"])) == (table.sha256, 30, 10)
    report = command("routing", "report", trained.directory, "--json").json
    counts_V = np.load(checkpoint_of(trained, STEPS) / "token_counts.npy")
    for layer, load_N in zip(report["layers"], table.expert_load(counts_V), strict=True):
        assert layer["load"] == pytest.approx(load_N.tolist())


def test_the_model_computes_what_it_does_with_routes_given_one_by_one(trained: RunConfig) -> None:
    opened, table = open_model(trained.directory), RoutingTable.read(trained.moe.table or "")
    model, vocab = opened.trained.model, torch.Generator().manual_seed(3)
    assert table.split is not None
    ids_BS = torch.randint(VOCAB, (3, 32), generator=vocab)
    ids_BS[:, ::2] = torch.tensor(table.split.ids_J)[torch.randint(10, (3, 16), generator=vocab)].long()
    by_hand = torch.tensor([slow_experts(table, row) for row in ids_BS.tolist()])  # [B, L, S, K]
    known = {block: by_hand[:, layer].transpose(0, 1).flatten(0, 1) for layer, block in enumerate((1, 2))}
    with inference(model):
        assert torch.equal(opened.logits(ids_BS), model.logits(ids_BS, known))
    assert torch.equal(opened.routes(ids_BS), by_hand.transpose(0, 1))


def test_generation_is_the_same_cached_and_among_other_prompts(trained: RunConfig) -> None:
    opened = open_model(trained.directory)
    table = RoutingTable.read(trained.moe.table or "")
    assert table.split is not None
    hot = table.split.ids_J.tolist()
    prompts = [hot[:3], [*hot[2:8], 5, hot[1]], [hot[4]]]
    routes = opened.trained.routes
    together = generate(opened.trained.model, prompts, routes, max_new_tokens=12)
    assert together == generate(opened.trained.model, prompts, routes, max_new_tokens=12, use_cache=False)
    for prompt, new in zip(prompts, together, strict=True):
        assert generate(opened.trained.model, [prompt], routes, max_new_tokens=12) == [new]
    words = ("generate", trained.directory, "--prompt", "def wrap(self", "--tokens", "8", "--json")
    assert command(*words, "--resident-experts", "0.5").json == command(*words).json


def test_routers_do_not_start_from_it(trained: RunConfig, data: TinyData, tmp_path: Path) -> None:
    moe = {"router": "stablemoe", "layers": [1, 2], "start_table": trained.moe.table}
    run = small_run(data, tmp_path / "run", moe=moe, data={"tokenizer": data.tokenizer})
    said = command("train", run_file(run, tmp_path / "run.yaml"))
    assert said.code == 2
    assert "splits 10 ids over several rows by the id before them" in said.err
