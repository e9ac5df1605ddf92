"""Weights that are copied out of a memory map: those that are read, and none of them stays mapped in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stablemoe_ds.checkpoint.mapped import MappedWeights
from stablemoe_ds.errors import UserError

WEIGHTS = {
    "a": torch.randn(3, 5),
    "odd": torch.randn(7).bfloat16(),
    "b": torch.randn(2, 3, 4).half(),
    "large": torch.randn(512, 4096),
}


def opened(folder: Path, names: list[str]) -> MappedWeights:
    """Weights of a checkpoint, of which only this is looked at: where it is, and which file has what."""
    checkpoint: Any = SimpleNamespace(path=folder, tensors=dict.fromkeys([*WEIGHTS, "lost"], "0000"))
    return MappedWeights(checkpoint, names)


def mapped_kilobytes(path: Path) -> int:
    """How much of a file is in this process's memory."""
    _, _, after = Path("/proc/self/smaps").read_text().partition(str(path))
    return int(after.partition("Rss:")[2].split()[0])


def test_what_is_copied_is_what_was_written_and_leaves_no_pages(tmp_path: Path) -> None:
    file = tmp_path / "weights-0000.safetensors"
    save_file(WEIGHTS, file)
    mapped = opened(tmp_path, list(WEIGHTS))
    for name, wanted in WEIGHTS.items():
        out = torch.empty_like(wanted)
        mapped.copy(name, out)
        assert torch.equal(out, wanted)
    assert mapped_kilobytes(file) < 1024 < WEIGHTS["large"].nbytes // 1024


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("unknown", None, "has no tensor unknown: it belongs to another model"),
        ("lost", None, "is damaged: weights-0000.safetensors: lost"),
        ("a", b"", "is damaged"),
        ("a", b"\x04\0\0\0\0\0\0\0nope", "is damaged"),
        ("a", b"\xff" * 64, "is damaged"),
    ],
)
def test_what_is_not_there_is_named(name: str, damage: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "weights-0000.safetensors"
    save_file(WEIGHTS, file)
    if damage is not None:
        file.write_bytes(damage)
    with pytest.raises(UserError, match=message):
        opened(tmp_path, [name])
