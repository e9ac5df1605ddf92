"""Safetensors files that are the same to the byte whenever their content is the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.files import follow_umask

ALIGNED = 8
"""Bytes of which the header's length is a multiple, as the format asks for."""


def save_tensors(tensors: Mapping[str, NDArray[Any]], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata, whose keys are sorted: the library takes them from a hash map, in another order each
    time. Raises OSError if the file cannot be written."""
    from safetensors.numpy import save

    plain = memoryview(save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, dict(metadata)))
    start = 8 + int.from_bytes(plain[:8], "little")
    header = json.loads(bytes(plain[8:start]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(plain[start:])
    follow_umask(path)
