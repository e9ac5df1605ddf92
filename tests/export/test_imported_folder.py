"""A folder of transformers as the beginning of a run: its logits before and after are equal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from stablemoe_ds.checkpoint.convert.conversion import convert
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.schema import StagesConfig
from stablemoe_ds.errors import UserError
from stablemoe_ds.export.exported_folder import export
from stablemoe_ds.export.imported_folder import import_folder
from tests.export.opened import some_ids
from tests.export.small_checkpoints import SavedModel
from tests.export.test_equal_logits import SHAPES
from tests.tiny import VOCAB, tiny_run
from tests.training.runs import command, history, run_file, tensors_of, train_run

if TYPE_CHECKING:
    from stablemoe_ds.config.schema import RunConfig
    from stablemoe_ds.distributed.groups import Groups

LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}


def dense_run(folder: Path, **model: Any) -> RunConfig:
    model = {"rope_base": 500, "embedding": "plain", "tie_embeddings": False, **model}
    return tiny_run(model=model, moe={"router": "dense", "layers": []}, run_dir=str(folder))


def llama(folder: Path, **changes: Any) -> Any:
    """A random Llama, saved there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def our_logits(run_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    from stablemoe_ds import open_model

    return open_model(run_dir).logits(ids, learned=Checkpoint.open(run_dir).progress.stage == 1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_was_exported_comes_back(
    saved: Callable[..., SavedModel], world_groups: Groups, tmp_path: Path, shape: dict[str, Any]
) -> None:
    before = saved(**shape)
    export(before.path, tmp_path / "out")
    sections = {name: section for name, section in shape.items() if name != "stage"}
    run = tiny_run(**sections, run_dir=str(tmp_path / "run"))
    if run.moe.facts.distilled:
        run = run.model_copy(update={"stages": StagesConfig(at_fraction=0.5)})
    written, _ = import_folder(tmp_path / "out", run)
    old, new = (tensors_of(path) for path in (before.path, written))
    assert old.keys() == new.keys()
    left_out = [name for name in old if not torch.equal(old[name], new[name])]
    assert all(".router.distilled." in name or name.endswith(".router.centroids") for name in left_out)
    ids = some_ids()
    torch.testing.assert_close(our_logits(tmp_path / "run", ids), before.logits(ids), atol=1e-5, rtol=1e-5)
    table = Checkpoint.open(written).table()
    assert (table and table.sha256) == (before.table and before.table.sha256)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("heads", [4, 2], ids=["a key a head", "grouped"])
def test_a_llama_computes_the_same_here_and_becomes_a_mixture(
    world_groups: Groups, tmp_path: Path, tied: bool, heads: int
) -> None:
    theirs = llama(tmp_path / "llama", tie_word_embeddings=tied, num_key_value_heads=heads)
    dense = dense_run(tmp_path / "dense", tie_embeddings=tied, kv_heads=heads)
    import_folder(tmp_path / "llama", dense)
    ids = some_ids()
    with torch.no_grad():
        wanted = theirs(ids).logits
    torch.testing.assert_close(our_logits(tmp_path / "dense", ids), wanted, atol=1e-5, rtol=1e-5)
    moe = {"router": "topk", "layers": [2, 3], "experts": 4, "top_k": 2, "placement": "replace"}
    sparse = dense.model_copy(
        update={"run_dir": str(tmp_path / "sparse"), "moe": tiny_run(moe=moe).moe},
    )
    convert(Checkpoint.open(tmp_path / "dense"), sparse)
    torch.testing.assert_close(our_logits(tmp_path / "sparse", ids), wanted, atol=1e-4, rtol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "scaled rope": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {},
        'rope_type: got "linear": this package computes "default" only',
    ),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}, "attention_bias: got true: this package computes false"),
    "wide heads": ({"head_dim": 16}, {}, "head_dim: got 16: this package computes 8 only"),
    "gelu": ({"hidden_act": "gelu"}, {}, 'hidden_act: got "gelu"'),
    "another width": ({}, {"ffn_hidden_size": 96}, "model.ffn_hidden_size: got 96, but"),
    "a scaled embedding": ({}, {"embedding": "scaled"}, 'model.embedding: got "scaled", but'),
    "another vocabulary": ({}, {"vocab_size": 60}, "the folder's model has 64 ids: expected model.vocab_size=64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_another_model_is_refused_in_words(world_groups: Groups, tmp_path: Path, case: str) -> None:
    theirs, ours, expected = REFUSED[case]
    llama(tmp_path / "llama", **theirs)
    with pytest.raises(UserError, match=re.escape(expected)):
        import_folder(tmp_path / "llama", dense_run(tmp_path / "run", **ours))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_damaged_folders_are_refused(world_groups: Groups, tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    run = dense_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"convert it to a run with moe\.router=dense first"):
        import_folder(tmp_path / "llama", tiny_run(moe={"router": "topk"}, run_dir=str(tmp_path / "moe")))
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UserError, match='model_type: got "mamba": expected stablemoe'):
        import_folder(tmp_path / "llama", run)
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        import_folder(tmp_path / "llama", run)


@pytest.mark.distributed
def test_a_run_goes_on_from_an_exported_folder(finished: RunConfig, tmp_path: Path) -> None:
    """In stage 2 from its first update on, along the table of the folder."""
    export(finished.directory, tmp_path / "out")
    run = finished.model_copy(update={"run_dir": str(tmp_path / "run")})
    answer = command(
        "checkpoint", "convert", str(tmp_path / "out"), "--to", run_file(run, tmp_path / "run.yaml"), "--json"
    )
    assert answer.code == 0, answer.err
    assert answer.json["what"].endswith("of a stablemoe model, with its table")
    train_run(run, 2)
    assert command("checkpoint", "verify", run.directory, "--json").json["step"] == run.schedule.steps
    first, last = (Checkpoint.open(directory).table() for directory in (finished.directory, run.directory))
    assert first is not None
    assert last is not None
    assert first.sha256 == last.sha256
    assert {line["stage"] for line in history(run, "train")} == {2}
