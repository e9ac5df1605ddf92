"""Routing tables in the files of DeepSeek-V4: a tensor ``tid2eid`` [V, K] for each layer that follows a table.

In a safetensors file of the model, or one with nothing else in it, layer i, counted from 0, has the tensor
``model.layers.{i}.ffn.gate.tid2eid``, as the release and transformers write it, or
``model.layers.{i}.mlp.gate.tid2eid``, as transformers calls it in memory. Values are int64 in the release; some
programs want int32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.errors import UserError
from stablemoe_ds.files import follow_umask, open_file
from stablemoe_ds.tables.table import RoutingTable

NAME = "deepseek-v4"
"""The format on the command line, and the builder name of a table from another program's file."""
KEY = re.compile(r"(?:model\.)?layers\.(0|[1-9]\d{0,5})\.(?:ffn|mlp)\.gate\.tid2eid")
OURS = "stablemoe"
"""Metadata under which a file that this package has written keeps what the format has no place for."""
MOST_EXPERTS = 1 << 16
"""If the number of experts is unknown, a larger index is damage."""


def has_tid2eid(path: str | Path) -> bool:
    """Whether a file is of safetensors and has such a tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        open_file(path).close()
        with safe_open(str(path), framework="numpy") as file:
            return any(KEY.fullmatch(name) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def save_deepseek_v4(table: RoutingTable, path: str | Path, dtype: Literal["int64", "int32"] = "int64") -> None:
    """Write a table as DeepSeek-V4's layers keep it, block b as layer b - 1.

    Raises UserError, one line a layer, if an id has an expert twice or a layer is all zeros, which readers refuse.
    """
    from safetensors.numpy import save_file

    tensors = {
        f"model.layers.{block - 1}.ffn.gate.tid2eid": np.ascontiguousarray(expert_VK, dtype=dtype)
        for block, expert_VK in zip(table.blocks, table.expert_LVK, strict=True)
    }
    _refuse(
        f"the table cannot be written as {NAME}: {name}: {problem}"
        for name, expert_VK in tensors.items()
        for problem in _flaws(expert_VK, table.experts)
    )
    said = {"experts": table.experts, "tokenizer": table.tokenizer, "sha256": table.sha256, "made": dict(table.made)}
    save_file(tensors, str(path), {"format": "pt", OURS: json.dumps(said)})  # transformers wants a format it knows
    follow_umask(path)


def read_deepseek_v4(path: str | Path, experts: int | None = None) -> RoutingTable:
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
            _refuse(f"{path}: {problem}" for problem in _wrong_shapes(slices))
            layers = [file.get_tensor(name) for name in names.values()]
        known = said.get("experts") or _experts_of_config(Path(path)) or experts
        _refuse(
            f"{path}: {name}: {problem}"
            for name, layer_VK in zip(names.values(), layers, strict=True)
            for problem in _flaws(layer_VK, known)
        )
        expert_LVK = np.stack(layers).astype(np.int32)
        blocks = tuple(layer + 1 for layer in names)
        made, tokenizer = dict(said.get("made", {"builder": NAME})), str(said.get("tokenizer", ""))
        table = RoutingTable(expert_LVK, known or int(expert_LVK.max()) + 1, blocks, tokenizer, made)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a routing table that can be read: {error}") from error
    if said and table.sha256 != said.get("sha256"):
        raise UserError(f"routing table {path} is damaged or was changed: its sha256 does not match")
    return table


def _layer_names(path: str | Path, names: list[str]) -> dict[int, str]:
    """Layer number to the name of its tensor, ascending. Raises UserError if a layer has two."""
    found: dict[int, str] = {}
    for name in sorted(names):
        if match := KEY.fullmatch(name):
            layer = int(match[1])
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


def _flaws(expert_VK: NDArray[np.integer], experts: int | None) -> Iterator[str]:
    """What is wrong with the values of a layer. experts: N, or None if unknown."""
    if experts != 1 and not expert_VK.any():
        yield "all zeros: the table was never filled in, every id would go to expert 0"
        return
    limit = experts or MOST_EXPERTS
    wrong_VK = (expert_VK < 0) | (expert_VK >= limit)
    if wrong_VK.any():
        index = int(wrong_VK.any(1).argmax())
        value = int(expert_VK[index][wrong_VK[index]][0])
        yield f"id {index} goes to expert {value}, expected 0 to {limit - 1}"
    sorted_VK = np.sort(expert_VK, axis=1)
    twice_V = (sorted_VK[:, 1:] == sorted_VK[:, :-1]).any(1)
    if twice_V.any():
        index = int(twice_V.argmax())
        yield f"id {index} has an expert twice, {expert_VK[index].tolist()}, as {int(twice_V.sum())} ids have"


def _experts_of_config(path: Path) -> int | None:
    """N by the ``config.json`` next to a model's file; None if there is none, or if it does not say."""
    try:
        with open_file(path.with_name("config.json")) as file:
            experts = json.load(file)["n_routed_experts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return experts if type(experts) is int and experts > 0 else None


def _refuse(problems: Iterator[str]) -> None:
    if lines := list(problems):
        raise UserError("\n".join(lines))
