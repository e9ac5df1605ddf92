"""What lies in an exported folder, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stablemoe_ds.errors import UserError
from stablemoe_ds.export import weight_shards
from stablemoe_ds.export.exported_folder import export
from tests.export.opened import opened, some_ids
from tests.export.small_checkpoints import SavedModel

ALONE = '''
import sys

class Without:
    """A finder of modules that does not find these, as where they are not installed."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in ("stablemoe_ds", "deepspeed", "megatron")
        return None if missing else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
assert not any(name.partition(".")[0] == "stablemoe_ds" for name in sys.modules)
'''


@pytest.fixture(scope="module")
def ours(saved: Callable[..., SavedModel]) -> SavedModel:
    return saved()


def test_opens_where_this_package_is_not(ours: SavedModel, tmp_path: Path) -> None:
    export(ours.path, tmp_path / "out")
    torch.save(some_ids(), tmp_path / "ids.pt")
    paths = [str(tmp_path / name) for name in ("out", "ids.pt", "logits.pt")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-I", "-c", ALONE, *paths], check=True, cwd=tmp_path, env=environment)
    wanted = ours.logits(some_ids())
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, atol=1e-5, rtol=1e-5)


def test_shards_are_small_and_change_nothing(ours: SavedModel, tmp_path: Path) -> None:
    export(ours.path, tmp_path / "one")
    export(ours.path, tmp_path / "many", shard_bytes=30_000)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(shard.stat().st_size < 40_000 for shard in shards)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    with torch.no_grad():
        one, many = (opened(tmp_path / name)[0](some_ids()).logits for name in ("one", "many"))
    assert torch.equal(one, many)


def test_no_more_than_a_shard_is_read_at_a_time(
    ours: SavedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor that was read is gone before the next shard begins."""
    before: list[weakref.ref[torch.Tensor]] = []
    sizes: list[int] = []

    def watched(tensors: dict[str, torch.Tensor], path: str, metadata: dict[str, str]) -> None:
        Path(path).touch()
        assert all(tensor() is None for tensor in before)
        before.extend(map(weakref.ref, tensors.values()))
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))

    monkeypatch.setattr(weight_shards, "save_file", watched)
    export(ours.path, tmp_path / "out", shard_bytes=30_000)
    assert max(sizes) <= 30_000


def test_bf16_keeps_routers_in_fp32_and_tables_in_int32(ours: SavedModel, tmp_path: Path) -> None:
    export(ours.path, tmp_path / "out", "bf16")
    model, _ = opened(tmp_path / "out")
    kept = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    on_disk = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(str(shard), framework="pt") as file:
            on_disk |= {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    for name, dtype in on_disk.items():
        wanted = torch.int32 if name.endswith(".table") else torch.float32 if ".router." in name else torch.bfloat16
        assert (dtype, kept[name]) == (wanted, wanted), name
    wanted = ours.logits(some_ids())
    with torch.no_grad():
        found = model(some_ids()).logits.float()
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert ours.table is not None
    rows = [model.model.layers[block - 1].moe.router.table for block in ours.table.blocks]
    assert torch.equal(torch.stack(rows), torch.tensor(ours.table.expert_LVK))


def test_a_table_that_is_missing_is_an_error_and_not_expert_0(ours: SavedModel, tmp_path: Path) -> None:
    export(ours.path, tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    save_file({n: t for n, t in load_file(shard).items() if not n.endswith(".table")}, shard, {"format": "pt"})
    index = tmp_path / "out" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {n: f for n, f in content["weight_map"].items() if not n.endswith(".table")}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="weights contain no routing table"):
        opened(tmp_path / "out")[0](some_ids())


def test_a_folder_that_is_there_is_left_alone(ours: SavedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        export(ours.path, tmp_path)


def test_a_damaged_checkpoint_is_refused(saved: Callable[..., SavedModel], tmp_path: Path) -> None:
    folder = saved().path
    with (folder / "weights-0000.safetensors").open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"!")
    with pytest.raises(UserError, match="content has changed"):
        export(folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("embedding", "name"), [("plain", "LlamaForCausalLM"), ("scaled", "GraniteForCausalLM")])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_dense_model_of_the_modern_shape_needs_no_code(
    saved: Callable[..., SavedModel], tmp_path: Path, embedding: str, name: str, tied: bool
) -> None:
    """It opens as a class of transformers; logits, padding on the left and generation with a cache are ours."""
    from transformers import AutoModelForCausalLM

    shape = {"embedding": embedding, "tie_embeddings": tied, "rope_base": 500, "norm_epsilon": 1e-3}
    ours = saved(model=shape, moe={"router": "dense", "layers": []})
    _, text = export(ours.path, tmp_path / "out")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == name
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not list((tmp_path / "out").glob("*.py"))
    assert "trust_remote_code" not in text + (tmp_path / "out" / "README.md").read_text()
    ids = some_ids()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.logits(ids), atol=1e-5, rtol=1e-5)
        best = ours.logits(ids)[:, -1].argmax(-1)
    assert torch.equal(theirs.generate(ids, max_new_tokens=1, do_sample=False)[:, -1], best)
