"""Weights as safetensors shards with an index, as transformers reads them, written one shard at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file

from stablemoe_ds.export.tensor_names import Exported
from stablemoe_ds.files import follow_umask


def write_shards(folder: Path, tensors: Iterable[Exported], shard_bytes: int) -> int:
    """Write all tensors, at most ``shard_bytes`` a file unless a single one is larger; bytes of all together.

    No more than one shard is in memory. Raises OSError.
    """
    shards = _shared_out(tensors, shard_bytes)
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({tensor.name: tensor.read() for tensor in shard}, str(folder / file), {"format": "pt"})
        follow_umask(folder / file)
        names |= {tensor.name: file for tensor in shard}
    total = sum(tensor.bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def _shared_out(tensors: Iterable[Exported], shard_bytes: int) -> list[list[Exported]]:
    shards: list[list[Exported]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    return shards
