"""Records of where the probe tokens went, one file a record, so that a killed run loses none of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.errors import UserError

PROBE_IDS = "probe_ids.npy"
"""File in a run directory with the token ids of the probe, int [P], in the order of the records."""


@dataclass(frozen=True)
class RouteRecords:
    """The expert of each probe token over a run.

    steps: int64 [H], ascending; how many updates had been made. expert_HLP: int16 [H, L, P].
    """

    steps: NDArray[np.int64]
    expert_HLP: NDArray[np.int16]  # noqa: N815

    def __post_init__(self) -> None:
        if self.expert_HLP.ndim != 3 or self.steps.shape != self.expert_HLP.shape[:1]:
            raise ValueError(
                f"expected steps [H] and experts [H, L, P], got {self.steps.shape}, {self.expert_HLP.shape}"
            )
        if (np.diff(self.steps) <= 0).any():
            raise ValueError("record steps must ascend")

    def of_layers(self, rows: Sequence[int]) -> RouteRecords:
        """The same of some MoE layers, counted from 0."""
        return RouteRecords(self.steps, self.expert_HLP[:, list(rows)])


class RecordFolder:
    """A directory of records, ``00000123.npy`` for the one made after 123 updates."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def append(self, step: int, expert_LP: NDArray[np.int16]) -> None:
        """Write one record, whole or not at all; one of the same step is replaced."""
        if expert_LP.dtype != np.int16 or expert_LP.ndim != 2:
            raise ValueError(f"a record is int16 [L, P], got {expert_LP.dtype} {list(expert_LP.shape)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, expert_LP)
        os.replace(part, path)

    def steps(self) -> list[int]:
        """Steps that have a record, ascending; none if there is no directory yet."""
        return sorted(int(path.stem) for path in self.folder.glob("*.npy") if path.stem.isdigit())

    def load_all(self) -> RouteRecords | None:
        """All records in order; None if there are none. Raises UserError if one is damaged or of another probe."""
        steps = self.steps()
        if not steps:
            return None
        records = [self._load(step) for step in steps]
        for step, record in zip(steps, records, strict=True):
            if record.shape != records[0].shape:
                raise UserError(
                    f"{self._path(step)} holds {list(record.shape)} layers and tokens, {self._path(steps[0]).name} "
                    f"holds {list(records[0].shape)}: they come from different runs; move one of them away"
                )
        return RouteRecords(np.array(steps, dtype=np.int64), np.stack(records))

    def truncate_after(self, step: int) -> None:
        """Forget what came after ``step``: a resumed run records it again."""
        for later in self.steps():
            if later > step:
                self._path(later).unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.npy"

    def _load(self, step: int) -> NDArray[np.int16]:
        path = self._path(step)
        try:
            record = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"cannot read route record {path}: {error}; remove it to continue without it") from error
        if record.dtype != np.int16 or record.ndim != 2:
            raise UserError(
                f"{path} is no route record: it holds {record.dtype} {list(record.shape)}, not int16 [L, P]"
            )
        return record
