"""Weights of a checkpoint as a memory map: each is copied from the file when it is wanted, and stays nowhere else."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from stablemoe_ds.checkpoint.reader import Checkpoint, weights_file
from stablemoe_ds.errors import UserError
from stablemoe_ds.run_directory.checkpoint_files import DamagedError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in a safetensors file."""


class MappedWeights:
    """Chosen weights of a checkpoint. Its files are held open: they may be deleted while a run that trains goes on."""

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        """``names``: canonical ones. Raises UserError if one is missing or a file is damaged."""
        self._places: dict[str, tuple[mmap.mmap, int, torch.dtype, list[int]]] = {}
        files: dict[str, tuple[mmap.mmap, int, dict[str, dict[str, list[int]]]]] = {}
        for name in names:
            if name not in checkpoint.tensors:
                raise UserError(f"checkpoint {checkpoint.path} has no tensor {name}: it belongs to another model")
            file = weights_file(checkpoint.tensors[name])
            try:
                if file not in files:
                    files[file] = _mapped(checkpoint.path / file)
                content, data, header = files[file]
                entry = header[name]
                place = (content, data + entry["data_offsets"][0], DTYPES[str(entry["dtype"])], entry["shape"])
            except (OSError, ValueError, KeyError) as error:
                raise DamagedError(f"checkpoint {checkpoint.path} is damaged: {file}: {name}: {error!r}") from error
            self._places[name] = place

    def copy(self, name: str, out: Tensor) -> None:
        """A weight into ``out``, which has its shape. The pages it was read from leave this process's memory again."""
        content, start, dtype, shape = self._places[name]
        raw = torch.frombuffer(content, dtype=torch.uint8, count=prod(shape) * dtype.itemsize, offset=start)
        out.copy_(raw.view(dtype).view(shape))
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        content.madvise(mmap.MADV_DONTNEED, page, start - page + raw.numel())


def _mapped(path: Path) -> tuple[mmap.mmap, int, dict[str, dict[str, list[int]]]]:
    """A safetensors file, where its data begin, and its header: dtype, shape and data_offsets by name.

    The format: the length of the header in 8 bytes, the header as JSON, the data (safetensors' README).
    """
    with path.open("rb") as file:
        # Of a private map torch knows that it may be written to, or it would warn of every tensor in it.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    length = int.from_bytes(content[:8], "little")
    return content, 8 + length, json.loads(content[8 : 8 + length])
