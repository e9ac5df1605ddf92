"""Routing tables in the files of DeepSeek-V4 models: a tensor ``tid2eid`` [V, K] for each layer that follows a table.

In a safetensors file of the model, or one with nothing else in it, layer i, counted from 0, has the tensor
``model.layers.{i}.ffn.gate.tid2eid``, as the release and transformers write it,
``model.layers.{i}.mlp.gate.tid2eid``, as transformers and NeMo Automodel call it in memory, or
``decoder.layers.{i}.mlp.router.tid2eid``, as Megatron-LM does. Values are int64 in the release; some programs want
int32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stablemoe_ds.errors import UserError
from stablemoe_ds.files import open_file
from stablemoe_ds.tables.table import RoutingTable
from stablemoe_ds.tables.table_flaws import flaws, refuse
from stablemoe_ds.tables.tensor_file import save_tensors

STYLES = {"deepseek-v4": "model.layers.{}.ffn.gate.tid2eid", "megatron": "decoder.layers.{}.mlp.router.tid2eid"}
"""What each program calls the table of a layer. A table whose file does not say how it was made has one as builder."""
KEY = re.compile(
    r"(?:model\.)?(?:layers\.(0|[1-9]\d{0,5})\.(?:ffn|mlp)\.gate|decoder\.layers\.(0|[1-9]\d{0,5})\.mlp\.router)\.tid2eid"
)
OURS = "stablemoe"
"""Metadata under which a file that this package has written keeps what the format has no place for."""


def has_tid2eid(path: str | Path) -> bool:
    """Whether a file is of safetensors and has such a tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        open_file(path).close()
        with safe_open(str(path), framework="numpy") as file:
            return any(KEY.fullmatch(name) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def save_tid2eid(
    table: RoutingTable, path: str | Path, style: str = "deepseek-v4", dtype: Literal["int64", "int32"] = "int64"
) -> None:
    """Write a table as DeepSeek-V4's layers keep it, block b as layer b - 1, by the names of :data:`STYLES`.

    Raises UserError, one line a layer, if an id has an expert twice or a layer is all zeros, which readers refuse.
    """
    tensors = {
        STYLES[style].format(block - 1): np.ascontiguousarray(expert_VK, dtype=dtype)
        for block, expert_VK in zip(table.blocks, table.expert_LVK, strict=True)
    }
    refuse(
        f"the table cannot be written as {style}: {name}: {problem}"
        for name, expert_VK in tensors.items()
        for problem in flaws(expert_VK, table.experts)
    )
    said = {"experts": table.experts, "tokenizer": table.tokenizer, "sha256": table.sha256, "made": dict(table.made)}
    save_tensors(tensors, path, {"format": "pt", OURS: json.dumps(said)})  # transformers wants a format it knows


def read_tid2eid(path: str | Path, experts: int | None = None) -> RoutingTable:
    """Read every ``tid2eid`` of a safetensors file; other tensors are not looked at.

    experts: N of the run that is to follow the table. The file may know better: if this package wrote it, or if a
    ``config.json`` lies in the same folder. If neither does, N is the largest expert that occurs, plus one.
    Raises UserError, one line a problem, if tensors are no tables, or not of one V and K.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            said = json.loads((file.metadata() or {}).get(OURS, "{}"))
            names = _layer_names(path, list(file.keys()))
            slices = {name: file.get_slice(name) for name in names.values()}
            refuse(f"{path}: {problem}" for problem in _wrong_shapes(slices))
            layers = [file.get_tensor(name) for name in names.values()]
        known = said.get("experts") or _experts_of_config(Path(path)) or experts
        refuse(
            f"{path}: {name}: {problem}"
            for name, layer_VK in zip(names.values(), layers, strict=True)
            for problem in flaws(layer_VK, known)
        )
        expert_LVK = np.stack(layers).astype(np.int32)
        blocks = tuple(layer + 1 for layer in names)
        made = dict(said.get("made", {"builder": _style_of(next(iter(names.values())))}))
        tokenizer = str(said.get("tokenizer", ""))
        table = RoutingTable(expert_LVK, known or int(expert_LVK.max()) + 1, blocks, tokenizer, made)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a routing table that can be read: {error}") from error
    if said and table.sha256 != said.get("sha256"):
        raise UserError(f"routing table {path} is damaged or was changed: its sha256 does not match")
    return table


def _style_of(name: str) -> str:
    return "megatron" if ".router." in name else "deepseek-v4"


def _layer_names(path: str | Path, names: list[str]) -> dict[int, str]:
    """Layer number to the name of its tensor, ascending. Raises UserError if a layer has two."""
    found: dict[int, str] = {}
    for name in sorted(names):
        if match := KEY.fullmatch(name):
            layer = int(match[1] or match[2])
            if layer in found:
                raise UserError(f"{path}: layer {layer} has two tables, {found[layer]} and {name}: expected one")
            found[layer] = name
    return dict(sorted(found.items()))


def _wrong_shapes(slices: dict[str, Any]) -> Iterator[str]:
    """What is known to be wrong before a value is read."""
    first = next(iter(slices))
    expected = list(slices[first].get_shape())
    for name, tensor in slices.items():
        shape, dtype = list(tensor.get_shape()), tensor.get_dtype()
        if dtype not in ("I64", "I32"):
            yield f"{name}: its type is {dtype}, expected I64 or I32"
        if len(shape) != 2 or 0 in shape:
            yield f"{name}: its shape is {shape}, expected [ids, experts of an id]"
        elif shape != expected and len(expected) == 2:
            yield f"{name}: its shape is {shape}, but {first} has {expected}: expected one for all layers"


def _experts_of_config(path: Path) -> int | None:
    """N by the ``config.json`` next to a model's file; None if there is none, or if it does not say."""
    try:
        with open_file(path.with_name("config.json")) as file:
            experts = json.load(file)["n_routed_experts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return experts if type(experts) is int and experts > 0 else None
