"""Another model's checkpoint as the beginning of a run: dense, or of more or fewer experts, it computes the same."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from stablemoe_ds.checkpoint.convert.resize_experts import check_replication, merge, replicate
from stablemoe_ds.config.moe_section import MoEConfig
from stablemoe_ds.config.schema import RunConfig, StagesConfig
from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.table import RoutingTable
from tests.checkpoint.moves import loss_here, train_here
from tests.distributed.cases import run_of, table_of
from tests.distributed.launch import run_distributed
from tests.training.runs import TinyData, checkpoint_of, command, differing, run_file, small_run, tensors_of, train_run

Trained = tuple[RunConfig, float]


def made_of(shape: str, moe: dict[str, Any] | None = None) -> RunConfig:
    """A run of one of the shapes of ``cases``, with a switch to come."""
    return run_of(shape, moe).model_copy(update={"stages": StagesConfig(at_step=5)})


def train(run: RunConfig, folder: Path, **options: Any) -> Trained:
    """A run in this folder after two updates, and the loss of its third."""
    run = run.model_copy(update={"run_dir": str(folder)})
    return run, run_distributed(1, train_here, run, *options.values())[0]


def converted(source: RunConfig, target: RunConfig, folder: Path) -> RunConfig:
    from stablemoe_ds.checkpoint.convert.conversion import convert
    from stablemoe_ds.checkpoint.reader import Checkpoint

    target = target.model_copy(update={"run_dir": str(folder)})
    convert(Checkpoint.open(source.directory), target)
    return target


def with_experts(run: RunConfig, experts: int) -> RunConfig:
    return run.model_copy(update={"moe": run.moe.model_copy(update={"experts": experts})})


def loss_of(run: RunConfig) -> float:
    loss: float = run_distributed(1, loss_here, run, Path(run.directory))[0]
    return loss


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """A dense model in each style of backbone."""
    return {
        shape: train(made_of(shape, {"router": "dense", "layers": []}), tmp_path_factory.mktemp("dense"))
        for shape in ("paper", "modern")
    }


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model of four experts a layer, two a token, in stage 2."""
    return train(made_of("modern"), tmp_path_factory.mktemp("sparse"), frozen=True)


UPCYCLED: dict[str, tuple[str, dict[str, Any], float]] = {
    "behind a block": ("paper", {"router": "stablemoe"}, 1e-6),
    "instead, hash": ("modern", {"router": "hash", "shared_experts": 1}, 1e-6),
    "instead, topk of 2": ("modern", {"router": "topk", "top_k": 2, "shared_experts": 0}, 1e-6),
    "instead, of two sublayers, biased": ("paper", {"router": "hash", "placement": "replace", "sublayers": 2}, 1e-6),
    "instead, gates of a half": ("modern", {"router": "stablemoe", "centroid_gain": 1e-5}, 1e-5),
    "instead, gates of one": ("modern", {"router": "stablemoe", "gate": "one"}, 1e-6),
    "instead, doubled gates": ("modern", {"router": "stablemoe", "gate": "doubled", "centroid_gain": 1e-5}, 1e-5),
    "instead, learned gates": ("modern", {"router": "hash", "gate": "learned", "centroid_gain": 1e-5}, 1e-5),
    "instead, a softmax": ("modern", {"router": "switch", "top_k": 1, "centroid_gain": 1e-5}, 1e-5),
}


MIXED = "modern, block 1 along a table"


def test_a_dense_model_becomes_one_with_a_table_in_one_layer(dense: dict[str, Trained], tmp_path: Path) -> None:
    source, loss = dense["modern"]
    moe = {"router": "topk", "shared_experts": 0, "table": "even", "table_layers": [1]}
    made = converted(source, made_of("modern", moe), tmp_path)
    assert run_distributed(1, loss_here, made, tmp_path, table_of(MIXED))[0] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(("frozen", "moe"), [(True, {}), (False, {"top_k": 1})], ids=["stage 2", "stage 1"])
def test_experts_of_a_model_with_a_table_in_one_layer_are_copied_and_merged(
    frozen: bool, moe: dict[str, Any], tmp_path: Path
) -> None:
    followed = table_of(MIXED)
    assert followed is not None
    table = RoutingTable(followed.expert_LVK[..., : moe.get("top_k", 2)].copy(), followed.experts, followed.blocks)
    source, loss = train(made_of(MIXED, moe), tmp_path / "source", frozen=frozen, table=table)
    more = converted(source, with_experts(source, 8), tmp_path / "more")
    assert loss_of(more) == pytest.approx(loss, abs=1e-6 if frozen else 1e-2)
    grown, few = (tensors_of(checkpoint_of(run, 2)) for run in (more, source))
    name = "decoder.layers.1.moe.router.centroids"  # of the layer that follows the table, and so never chooses
    assert torch.equal(grown[name], few[name].repeat_interleave(2, 0))
    back = converted(more, source, tmp_path / "back")
    kept = RoutingTable.read(checkpoint_of(back, 2) / "routing_table.safetensors")
    assert kept.only((1,)).sha256 == table.sha256
    assert loss_of(back) == pytest.approx(loss, abs=1e-6 if frozen else 1e-2)


@pytest.mark.parametrize("case", UPCYCLED)
def test_an_upcycled_model_computes_what_the_dense_one_did(
    case: str, dense: dict[str, Trained], tmp_path: Path
) -> None:
    shape, moe, tolerance = UPCYCLED[case]
    source, loss = dense[shape]
    made = converted(source, made_of(shape, moe), tmp_path)
    assert loss_of(made) == pytest.approx(loss, abs=tolerance)


def test_gates_that_are_not_a_half_move_the_function_a_little(dense: dict[str, Trained], tmp_path: Path) -> None:
    source, loss = dense["modern"]
    made = converted(source, made_of("modern", {"router": "stablemoe", "centroid_gain": 10}), tmp_path)
    assert loss_of(made) != pytest.approx(loss, abs=1e-6)
    assert loss_of(made) == pytest.approx(loss, abs=0.1)


def test_copied_experts_compute_the_same_along_a_table(sparse: Trained, tmp_path: Path) -> None:
    source, loss = sparse
    made = converted(source, with_experts(source, 12), tmp_path)
    assert loss_of(made) == pytest.approx(loss, abs=1e-6)


def test_merging_copies_gives_the_model_back(sparse: Trained, tmp_path: Path) -> None:
    source, _ = sparse
    more = converted(source, with_experts(source, 8), tmp_path / "more")
    back = converted(more, source, tmp_path / "back")
    weights = {n: v for n, v in tensors_of(checkpoint_of(source, 2)).items() if "/exp_avg" not in n}
    assert differing(tensors_of(checkpoint_of(back, 2)), weights) == []


def test_copies_are_told_apart_where_routers_choose(tmp_path: Path) -> None:
    source, loss = train(made_of("paper"), tmp_path / "source")
    made = converted(source, with_experts(source, 8), tmp_path / "made")
    assert loss_of(made) == pytest.approx(loss, abs=1e-2)
    centroids = tensors_of(checkpoint_of(made, 2))["decoder.layers.1.moe.router.centroids"]
    assert len({tuple(row.tolist()) for row in centroids}) == 8


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "as it is": ("sparse", {}, "nothing to convert"),
    "no whole factor": ("sparse", {"moe": {"experts": 6}}, "moe.experts: got 6: expected 4 times"),
    "another expert": (
        "sparse",
        {"moe": {"experts": 8, "sublayers": 2}},
        "moe.sublayers: got 2, but",
    ),
    "another width": ("dense", {"model": {"hidden_size": 32}}, "model.hidden_size: got 32, but the checkpoint has 16"),
    "narrow experts": ("dense", {"moe": {"ffn_hidden_size": 8}}, "moe.ffn_hidden_size: got 8: experts become copies"),
    "experts that choose": ("dense", {"moe": {"router": "expert_choice"}}, "moe.router: got 'expert_choice'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused_in_one_line(
    case: str, dense: dict[str, Trained], sparse: Trained, tmp_path: Path
) -> None:
    kind, changes, expected = REFUSED[case]
    source = sparse[0] if kind == "sparse" else dense["modern"][0]
    tree = made_of("modern").model_dump()
    for section, values in changes.items():
        tree[section] |= values
    with pytest.raises(UserError, match=re.escape(expected)) as told:
        converted(source, RunConfig.model_validate(tree), tmp_path / "made")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.distributed
def test_a_dense_run_becomes_a_run_with_experts(data: TinyData, tmp_path: Path) -> None:
    source = small_run(data, tmp_path / "dense", moe={"router": "dense", "layers": []}, schedule={"steps": 4})
    train_run(source)
    target = small_run(data, tmp_path / "sparse", moe={"placement": "replace"})
    file = run_file(target, tmp_path / "sparse.yaml")
    answer = command("checkpoint", "convert", source.directory, "--to", file, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["to"] == str(checkpoint_of(target, 0))
    shown = command("checkpoint", "show", target.directory, "--json").json
    assert (shown["step"], shown["stage"], shown["experts"], shown["optimizer_steps"]) == (0, 1, 4, 0)
    train_run(target, 2)
    assert command("checkpoint", "verify", target.directory, "--json").json["step"] == target.schedule.steps
    again = command("checkpoint", "convert", source.directory, "--to", file)
    assert again.code == 2
    assert "has checkpoints already" in again.err


@pytest.mark.distributed
def test_a_table_that_training_builds_is_missing_before_it_in_words(data: TinyData, tmp_path: Path) -> None:
    source = small_run(data, tmp_path / "dense", moe={"router": "dense", "layers": []}, schedule={"steps": 2})
    train_run(source)
    moe = {"router": "topk", "top_k": 2, "layers": [1, 2], "table_layers": [1], "table": "cooccurrence"}
    target = small_run(data, tmp_path / "mixed", moe=moe)
    command("checkpoint", "convert", source.directory, "--to", run_file(target, tmp_path / "mixed.yaml"))
    early = command("eval", target.directory)
    assert early.code == 2
    assert re.search("the table of builder 'cooccurrence' has not been built: .* train this run first", early.err)
    train_run(target)
    assert command("eval", target.directory, "--json").json["step"] == target.schedule.steps


@pytest.mark.parametrize(
    ("moe", "stage", "refused"),
    [
        ({"top_k": 2}, 1, True),
        ({"top_k": 2}, 2, False),
        ({"top_k": 2, "distilled": {"kind": "bigram"}}, 2, True),
        ({"top_k": 1, "distilled": {"kind": "bigram"}}, 2, False),
        ({"top_k": 2, "router": "hash"}, 2, False),
    ],
)
def test_experts_are_not_copied_where_several_are_still_chosen(moe: dict[str, Any], stage: int, refused: bool) -> None:
    with pytest.raises(UserError, match="copies of one") if refused else nullcontext():
        check_replication(MoEConfig(layers=[1], experts=4, **moe), stage)


def test_experts_are_not_copied_where_a_copy_would_take_from_the_gate() -> None:
    with pytest.raises(UserError, match="'switch' with top_k 1: its experts cannot be copied: a softmax over copies"):
        check_replication(MoEConfig(router="switch", layers=[1]), 1)
    check_replication(MoEConfig(router="switch", layers=[1], gate="doubled"), 1)
    with pytest.raises(UserError, match="each copy would choose the same tokens"):
        check_replication(MoEConfig(router="expert_choice", layers=[1], gate="doubled"), 1)


def test_what_gates_learn_is_copied_and_merged_with_the_experts() -> None:
    weights = {f"moe.router.gate.{name}": torch.randn(3) for name in ("scale_N", "bias_N")}
    grown = replicate(weights, 2, seed=5)
    for name, value in weights.items():
        assert grown[name].tolist() == [number for number in value.tolist() for _ in range(2)]
    assert differing(merge(grown, 2), weights) == []
