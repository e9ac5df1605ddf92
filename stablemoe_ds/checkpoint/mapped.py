"""Weights of a checkpoint as a memory map: each is copied from the file when it is wanted, and stays nowhere else."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablemoe_ds.checkpoint.reader import Checkpoint, weights_file
from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.checkpoint_files import DamagedError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in a safetensors file."""


Header = dict[str, dict[str, Any]]
"""dtype, shape and data_offsets of each tensor of a safetensors file, by name."""


class MappedWeights:
    """Chosen weights of a checkpoint. Its files are held open: they may be deleted while a run that trains goes on."""

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        """``names``: canonical ones. Raises UserError if one is missing or a file is damaged."""
        self._weights: dict[str, tuple[Tensor, mmap.mmap, int]] = {}
        files: dict[str, tuple[mmap.mmap, int, Header]] = {}
        for name in names:
            if name not in checkpoint.tensors:
                raise UserError(f"checkpoint {checkpoint.path} has no tensor {name}: it belongs to another model")
            file = weights_file(checkpoint.tensors[name])
            try:
                if file not in files:
                    files[file] = _mapped(checkpoint.path / file)
                content, data, header = files[file]
                entry = header[name]
                start, shape, dtype = data + entry["data_offsets"][0], entry["shape"], DTYPES[entry["dtype"]]
                weight = torch.frombuffer(content, dtype=dtype, count=prod(shape), offset=start).view(shape)
            except (OSError, ValueError, KeyError) as error:
                raise DamagedError(f"checkpoint {checkpoint.path} is damaged: {file}: {name}: {error!r}") from error
            self._weights[name] = (weight, content, start)

    def copy(self, name: str, out: Tensor) -> None:
        """A weight into ``out``, which has its shape. The pages it was read from leave this process's memory again."""
        weight, content, start = self._weights[name]
        out.copy_(weight)
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        content.madvise(mmap.MADV_DONTNEED, page, start - page + weight.nbytes)


def _mapped(path: Path) -> tuple[mmap.mmap, int, Header]:
    """A safetensors file, where its data begin, and its header.

    The format: the length of the header in 8 bytes, the header as JSON, the data (safetensors' README).
    """
    with path.open("rb") as file:
        # Of a private map torch knows that it may be written to, or it would warn of every tensor in it.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    length = int.from_bytes(content[:8], "little")
    return content, 8 + length, json.loads(content[8 : 8 + length])
