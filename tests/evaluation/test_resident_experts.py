"""Experts that stay in the checkpoint until tokens need them: the same to the bit, in less memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.distributed.groups import start_world, stop_world
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.generate import generate
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.evaluation.resident_experts import expected_load
from stablemoe_ds.evaluation.trained_model import TrainedModel
from stablemoe_ds.run_directory.checkpoint_files import read_manifest, write_manifest
from tests.distributed.launch import run_distributed
from tests.evaluation.test_generate import PROMPTS, frozen
from tests.export.small_checkpoints import save_model
from tests.tiny import VOCAB, tiny_run

PAPER = {"positions": "learned", "norm": "layernorm", "activation": "gelu", "bias": True, "kv_heads": None}
SHAPES = {
    "word": (2, {"model": PAPER, "moe": {"sublayers": 2, "experts": 8}}),
    "stage 1": (1, {"moe": {"placement": "replace", "top_k": 2, "shared_experts": 1}}),
    "bigram": (2, {"moe": {"distilled": {"kind": "bigram"}}}),
    "cnn": (2, {"moe": {"distilled": {"kind": "cnn"}}}),
    "transformer": (2, {"moe": {"distilled": {"kind": "transformer"}}}),
    "hash": (2, {"moe": {"router": "hash", "top_k": 2, "experts": 8}}),
    "a table in one layer": (1, {"moe": {"router": "topk", "top_k": 2, "table": "even", "table_layers": [3]}}),
}
CALLS = (
    {"max_new_tokens": 8},
    {"max_new_tokens": 8, "use_cache": False},
    {"max_new_tokens": 9, "temperature": 1.0, "top_p": 0.9, "seed": 3},
)


@pytest.fixture(scope="module", params=SHAPES)
def saved(request, world_groups, tmp_path_factory):
    """A checkpoint, opened with all of its experts in memory."""
    stage, sections = SHAPES[request.param]
    folder = tmp_path_factory.mktemp("saved")
    save_model(tiny_run(**sections), VOCAB, stage, world_groups.placement, folder)
    return TrainedModel(Checkpoint.open(folder), world_groups.world)


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_logits_and_continuations_are_those_with_all_experts_in_memory(saved, fraction):
    part = TrainedModel(saved.checkpoint, saved.groups.world, fraction)
    for options in CALLS:
        ids = generate(part.model, PROMPTS, part.routes, **options)
        assert ids == generate(saved.model, PROMPTS, saved.routes, **options)
        assert len({i for row in ids for i in row}) > 1, "a model that repeats one id proves nothing"
    assert part.residency.traffic.fetched > 0
    ids_BS = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(5))
    learned = [saved.learned] if saved.run.moe.learned_layers else []  # not known ahead, and served all the same
    for routes in (saved.routes, *learned):
        with inference(part.model), inference(saved.model):
            assert torch.equal(*(model.logits(ids_BS, routes(ids_BS)) for model in (part.model, saved.model)))


def test_experts_of_most_load_are_there_first_and_are_not_fetched(world_groups, tmp_path):
    save_model(tiny_run(moe={"experts": 8}), VOCAB, 2, world_groups.placement, tmp_path)
    part = TrainedModel(Checkpoint.open(tmp_path), world_groups.world, 0.25)
    expert_LV = part.routes.table.expert_LVK[..., 0]
    most = [np.argsort(-np.bincount(layer, minlength=8), kind="stable")[:2].tolist() for layer in expert_LV]
    common = [i for i in range(VOCAB) if all(layer[i] in top for layer, top in zip(expert_LV, most, strict=True))]
    with inference(part.model):
        part.model.logits(torch.tensor([common]), part.routes(torch.tensor([common])))
    assert part.residency.traffic.served > 1
    assert part.residency.traffic.fetched == 0


def test_what_all_layers_need_is_fetched_from_before_the_first_block(world_groups, tmp_path):
    save_model(tiny_run(moe={"experts": 8}), VOCAB, 2, world_groups.placement, tmp_path)
    part = TrainedModel(Checkpoint.open(tmp_path), world_groups.world, 0.25)
    traffic, begun = part.residency.traffic, []
    part.model.decoder.layers[0].register_forward_pre_hook(lambda *_: begun.append(traffic.fetched))

    def read_each():
        """Fetches begun before each call of one id, before its first block, and by its end."""
        for i in range(8):
            before = traffic.fetched
            with inference(part.model):
                part.model.logits(torch.tensor([[i]]), part.routes(torch.tensor([[i]])))
            yield before, begun[-1], traffic.fetched

    announced = list(read_each())
    assert all(first == end for _, first, end in announced)
    part.residency.announcing.remove()
    on_demand = list(read_each())
    assert all(first == before for before, first, _ in on_demand)
    assert announced[-1][2] > 1
    assert on_demand[-1][2] > announced[-1][2] + 1


WIDE = {"model": {"hidden_size": 128, "ffn_hidden_size": 1024}, "moe": {"experts": 16}}
"""16 experts of 1.6 MB in each of two layers, which is most of the model."""


def growth(folder, fraction):
    """Bytes that a process takes at most, beyond those it has, to open a model and to read; and what it writes."""
    world = start_world()
    before = int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])
    trained = TrainedModel(Checkpoint.open(folder), world, fraction)
    ids = generate(trained.model, [list(range(14))], trained.routes, max_new_tokens=2)
    most = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    stop_world()
    return (most - before) * 1024, ids


@pytest.mark.distributed
def test_a_process_takes_less_memory_by_the_experts_that_are_absent(world_groups, tmp_path):
    saved = save_model(tiny_run(**WIDE), VOCAB, 2, world_groups.placement, tmp_path)
    experts = sum(weight.nbytes for layer in saved.model.moe_layers for weight in layer.experts.parameters())
    ((whole, ids),) = run_distributed(1, growth, tmp_path, 1.0)
    ((quarter, same_ids),) = run_distributed(1, growth, tmp_path, 0.25)
    assert same_ids == ids
    assert experts > 50e6
    assert whole - quarter > 0.7 * experts  # 0.75 of them never come into memory


def continued(folder, fraction):
    """What one of several processes makes of the prompts."""
    world = start_world()
    trained = TrainedModel(Checkpoint.open(folder), world, fraction)
    ids = generate(trained.model, PROMPTS, trained.routes, max_new_tokens=6)
    held = [len(layer.held_experts) for layer in trained.model.moe_layers]
    stop_world()
    return ids, held


@pytest.mark.distributed
def test_ranks_that_divide_the_experts_keep_a_part_of_theirs(world_groups, tmp_path):
    run = tiny_run(moe={"experts": 8}, parallel={"expert": 2, "dispatch_parts": 2})
    save_model(run, VOCAB, 2, world_groups.placement, tmp_path)
    whole = TrainedModel(Checkpoint.open(tmp_path), world_groups.world)
    ids = generate(whole.model, PROMPTS, whole.routes, max_new_tokens=6)
    assert run_distributed(2, continued, tmp_path, 0.25) == [(ids, [4, 4])] * 2


@pytest.mark.parametrize("kind", ["word", "bigram"])
def test_expected_load_is_that_of_a_text_with_these_counts(build, kind):
    model = build(moe={"distilled": {"kind": kind}, "top_k": 2})
    routes, counts_V = frozen(model), np.arange(VOCAB)
    load = expected_load(routes, model, counts_V)
    for block in (2, 3):
        by_hand = [0] * 4
        for i in range(VOCAB):
            for expert in routes(torch.tensor([[i]]))[block][0].tolist():
                by_hand[expert] += i
        assert load[block].tolist() == by_hand


def test_a_checkpoint_of_another_shape_is_refused(world_groups, tmp_path):
    save_model(tiny_run(), VOCAB, 2, world_groups.placement, tmp_path)
    manifest = read_manifest(tmp_path)
    manifest["run"]["moe"]["ffn_hidden_size"] = 48
    write_manifest(tmp_path, manifest)
    with pytest.raises(UserError, match=r"belongs to another model: .*experts.0.*has shape \[128, 32\].* \[96, 32\]"):
        TrainedModel(Checkpoint.open(tmp_path), world_groups.world, 0.5)


@pytest.mark.parametrize(
    ("sections", "fraction", "message"),
    [
        ({"moe": {"router": "switch"}}, 0.5, "router switch of checkpoint .* chooses from hidden states"),
        ({"moe": {"router": "dense_deeper", "experts": 1}}, 0.5, "is a dense model: it has no experts"),
        ({}, 0.0, "resident experts: got 0.0: expected more than 0 and at most 1"),
        ({}, 1.5, "resident experts: got 1.5"),
        ({}, float("nan"), "resident experts: got nan"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(sections, fraction, message, world_groups, tmp_path):
    save_model(tiny_run(**sections), VOCAB, 1, world_groups.placement, tmp_path)
    with pytest.raises(UserError, match=message):
        TrainedModel(Checkpoint.open(tmp_path), world_groups.world, fraction)
