"""Tables in the files of DeepSeek-V4: written, read, refused, and followed by transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from stablemoe_ds.errors import UserError
from stablemoe_ds.tables.builders import random_table
from stablemoe_ds.tables.given import given_table
from stablemoe_ds.tables.table import RoutingTable
from stablemoe_ds.tables.table_file import read_table
from stablemoe_ds.tables.tid2eid import save_tid2eid

V, K, N = 50, 2, 8
FIT: dict[str, Any] = {"experts": N, "top_k": K, "blocks": (2, 4), "vocab_size": V, "tokenizer": "ab" * 32}


@pytest.fixture
def table() -> RoutingTable:
    return RoutingTable(random_table(V, N, K, 2, seed=1), N, (1, 3), "ab" * 32, {"builder": "random", "seed": 1})


def foreign(path: Path, layers: dict[int, NDArray[Any]], style: str = "ffn", prefix: str = "model.") -> Path:
    """A file as somebody else writes it, with other tensors in it."""
    tensors = {f"{prefix}layers.{i}.{style}.gate.tid2eid": array for i, array in layers.items()}
    weights = {f"model.layers.{i}.{style}.gate.weight": np.ones((N, 4), np.float32) for i in layers}
    save_file(tensors | weights, str(path))
    return path


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_round_trip(table: RoutingTable, tmp_path: Path, dtype: Literal["int64", "int32"]) -> None:
    path = tmp_path / "table"
    save_tid2eid(table, path, dtype=dtype)
    with safe_open(str(path), framework="numpy") as file:
        names = ["model.layers.0.ffn.gate.tid2eid", "model.layers.2.ffn.gate.tid2eid"]
        assert sorted(file.keys()) == names
        assert [file.get_slice(name).get_shape() for name in names] == [[V, K]] * 2
        assert {file.get_tensor(name).dtype for name in names} == {np.dtype(dtype)}
    again = read_table(path)
    assert np.array_equal(again.expert_LVK, table.expert_LVK)
    assert (again.sha256, again.made, again.tokenizer) == (table.sha256, table.made, table.tokenizer)
    assert given_table(path, **FIT).blocks == (2, 4)


@pytest.mark.parametrize(("style", "prefix"), [("ffn", "model."), ("mlp", "model."), ("ffn", "")])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_files_of_others(table: RoutingTable, tmp_path: Path, style: str, prefix: str, dtype: Any) -> None:
    """Layers come in the order of their numbers: 10 behind 9, as no sorting of names has it."""
    layers = dict(zip((10, 9), table.expert_LVK.astype(dtype), strict=True))
    path = foreign(tmp_path / "model.safetensors", layers, style, prefix)
    read = read_table(path)
    assert np.array_equal(read.expert_LVK, table.expert_LVK[::-1])
    assert (read.blocks, read.experts, read.tokenizer) == ((10, 11), int(table.expert_LVK.max()) + 1, "")
    assert np.array_equal(given_table(path, **FIT).expert_LVK, table.expert_LVK[::-1]), "it cannot name its tokenizer"


@pytest.mark.parametrize("prefix", ["", "model."])
def test_files_of_megatron(table: RoutingTable, tmp_path: Path, prefix: str) -> None:
    """Its layers are counted from 0, too, and hold their tables as a buffer of the router."""
    layers = dict(zip((10, 9), table.expert_LVK.astype(np.int64), strict=True))
    tensors = {f"{prefix}decoder.layers.{i}.mlp.router.tid2eid": array for i, array in layers.items()}
    save_file({**tensors, "decoder.layers.9.mlp.router.weight": np.ones((N, 4), np.float32)}, str(tmp_path / "m"))
    read = read_table(tmp_path / "m")
    assert np.array_equal(read.expert_LVK, table.expert_LVK[::-1])
    assert (read.blocks, read.made) == ((10, 11), {"builder": "megatron"})
    save_tid2eid(table, tmp_path / "ours", "megatron")
    names = [f"decoder.layers.{i}.mlp.router.tid2eid" for i in (0, 2)]
    assert sorted(load_file(tmp_path / "ours")) == names
    assert read_table(tmp_path / "ours").sha256 == table.sha256


def test_the_number_of_experts_comes_from_whoever_knows(tmp_path: Path) -> None:
    path = foreign(tmp_path / "model.safetensors", {0: np.array([[0, 1], [1, 2]])})
    assert read_table(path).experts == 3
    assert read_table(path, 6).experts == 6
    (tmp_path / "config.json").write_text(json.dumps({"n_routed_experts": 5}))
    assert (read_table(path).experts, read_table(path, 6).experts) == (5, 5)
    with pytest.raises(UserError, match=r"is for 5 experts, but moe.experts is 8"):
        given_table(path, **FIT | {"blocks": (1,), "vocab_size": None})
    for unusable in ("{", "[]", '{"n_routed_experts": "many"}'):
        (tmp_path / "config.json").write_text(unusable)
        assert read_table(path, 6).experts == 6


def changed(row: int, *experts: int) -> NDArray[np.int64]:
    array = np.array(random_table(V, N, K, 1, seed=2)[0], np.int64)
    array[row] = experts
    return array


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (changed(7, 3, 3), r"layers.1.\w+.gate.tid2eid: id 7 has an expert twice, \[3, 3\], as 1 ids have"),
        (changed(9, 1, 8), "layers.1.*: id 9 goes to expert 8, expected 0 to 7"),
        (changed(0, -1, 2), "layers.1.*: id 0 goes to expert -1, expected 0 to 7"),
        (changed(0, 2**32, 2), "layers.1.*: id 0 goes to expert 4294967296, expected 0 to 7"),
        (np.zeros((V, K), np.int64), "layers.1.*: all zeros: the table was never filled in"),
        (changed(0, 1, 2)[:-1], r"layers.1.*: its shape is \[49, 2\], but .*layers.0.* has \[50, 2\]"),
        (changed(0, 1, 2)[:, :1].copy(), r"layers.1.*: its shape is \[50, 1\], but .*layers.0.* has \[50, 2\]"),
        (changed(0, 1, 2)[0], r"layers.1.*: its shape is \[2\], expected \[ids, experts of an id\]"),
        (changed(0, 1, 2).astype(np.float32), "layers.1.*: its type is F32, expected I64 or I32"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(array: NDArray[Any], said: str, tmp_path: Path) -> None:
    path = foreign(tmp_path / "model.safetensors", {0: changed(0, 1, 2), 1: array})
    with pytest.raises(UserError, match=said) as caught:
        read_table(path, N)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match=said):
        given_table(path, **FIT)


def test_a_number_that_no_expert_has_is_damage_even_where_nobody_says_how_many_there_are(tmp_path: Path) -> None:
    path = foreign(tmp_path / "model.safetensors", {0: changed(3, 1, 2**31 + 1)})
    with pytest.raises(UserError, match="id 3 goes to expert 2147483649"):
        read_table(path)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"vocab_size": V + 1}, f"has {V} ids, but model.vocab_size is {V + 1}"),
        ({"top_k": 1}, "gives an id 2 experts, but moe.top_k is 1"),
        ({"blocks": (3,)}, r"has the layers of blocks \[1, 2\], but the run follows it at \[3\]"),
    ],
)
def test_a_run_of_another_shape_refuses_it(other: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = foreign(tmp_path / "model.safetensors", {0: changed(0, 1, 2), 1: changed(0, 1, 2)})
    with pytest.raises(UserError, match=said) as caught:
        given_table(path, **FIT | other)
    assert len(str(caught.value).splitlines()) == 1


def test_a_layer_with_two_tables_and_each_flaw_has_a_line(tmp_path: Path) -> None:
    twice = {f"model.layers.0.{style}.gate.tid2eid": changed(0, 1, 2) for style in ("ffn", "mlp")}
    save_file(twice, str(tmp_path / "twice"))
    with pytest.raises(UserError, match="layer 0 has two tables"):
        read_table(tmp_path / "twice")
    path = foreign(tmp_path / "flaws", {0: changed(1, 3, 3), 1: changed(1, 9, 1), 2: changed(1, 1, 2)})
    with pytest.raises(UserError) as caught:
        read_table(path, N)
    assert len(str(caught.value).splitlines()) == 2


def test_damage_to_a_file_of_ours_is_noticed(table: RoutingTable, tmp_path: Path) -> None:
    path = tmp_path / "table"
    save_tid2eid(table, path)
    good = path.read_bytes()
    values = 2 * V * K * 8
    for offset in (0, values // 2, values - 8):
        bad = bytearray(good)
        bad[len(good) - values + offset] ^= 1
        path.write_bytes(bad)
        with pytest.raises(UserError, match=f"{path}"):
            read_table(path)


@pytest.mark.parametrize(
    "said", ["5", "[", '"text"', '{"experts": "8"}', '{"experts": 8, "made": 5}', '{"experts": 8}']
)
def test_damaged_metadata_is_refused_in_one_line(said: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    save_file({"model.layers.0.ffn.gate.tid2eid": changed(0, 1, 2)}, str(path), {"stablemoe": said})
    with pytest.raises(UserError, match=f"{path}") as caught:
        read_table(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_table_that_readers_refuse_is_not_written(tmp_path: Path) -> None:
    expert_LVK = np.stack([changed(4, 5, 5), np.zeros((V, K))]).astype(np.int32)
    with pytest.raises(UserError) as caught:
        save_tid2eid(RoutingTable(expert_LVK, N, (1, 2)), tmp_path / "table")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "layers.0.ffn.gate.tid2eid: id 4 has an expert twice" in lines[0]
    assert "layers.1.ffn.gate.tid2eid: all zeros" in lines[1]
    assert not (tmp_path / "table").exists()


def test_one_expert_is_all_zeros_by_right(tmp_path: Path) -> None:
    save_tid2eid(RoutingTable(np.zeros((1, V, 1), np.int32), 1, (1,)), tmp_path / "table")
    assert read_table(tmp_path / "table").experts == 1


def test_transformers_follows_our_table_and_gives_it_back(table: RoutingTable, tmp_path: Path) -> None:
    """Its own model of DeepSeek-V4: our table in, its choice equal to ours token by token, its file back in, equal."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DeepseekV4ForCausalLM"):
        pytest.skip("transformers without DeepSeek-V4")
    import torch

    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "head_dim": 16, "q_lora_rank": 16, "o_lora_rank": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "index_n_heads": 2, "index_head_dim": 8, "o_groups": 2}
    config = transformers.DeepseekV4Config(
        **(sizes | heads),
        vocab_size=V,
        num_hidden_layers=3,
        num_experts_per_tok=K,
        n_routed_experts=N,
        layer_types=["sliding_attention"] * 3,
        mlp_layer_types=["hash_moe", "moe", "hash_moe"],
        sliding_window=16,
        index_topk=4,
        hc_mult=2,
        max_position_embeddings=128,
        partial_rotary_factor=0.5,
    )
    folder, exported = tmp_path / "model", tmp_path / "table"
    transformers.DeepseekV4ForCausalLM(config).save_pretrained(folder)
    with pytest.raises(UserError, match="all zeros"):
        read_table(folder / "model.safetensors")
    save_tid2eid(table, exported)
    entries = load_file(folder / "model.safetensors") | load_file(exported)
    save_file(entries, str(folder / "model.safetensors"), {"format": "pt"})

    model, loading = transformers.DeepseekV4ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert [len(loading[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")] == [0, 0, 0]
    chosen: list[torch.Tensor] = []
    for block in table.blocks:
        gate = model.model.layers[block - 1].mlp.gate
        gate.register_forward_hook(lambda _, inputs, output: chosen.append(output[2]))
    ids = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids)
    for choice_TK, expert_VK in zip(chosen, table.expert_LVK, strict=True):
        assert np.array_equal(choice_TK.numpy(), expert_VK[ids.reshape(-1).numpy()])

    model.save_pretrained(tmp_path / "again")
    again = read_table(tmp_path / "again" / "model.safetensors")
    assert (again.sha256, again.experts, again.blocks) == (table.sha256, N, (1, 3))
