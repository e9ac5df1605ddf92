"""Which rows belong to which expert, when rows stand sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertOffsets:
    """Consecutive rows, one run of them an expert.

    sizes: rows of each expert, on the host. ends_E: int32 [E], where each expert's rows end, on the device of the rows.
    """

    sizes: Sequence[int]
    ends_E: Tensor  # noqa: N815

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device | str = "cpu") -> ExpertOffsets:
        """From sizes alone; copies their sums to the device and waits for it."""
        return cls(sizes, torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device))

    @classmethod
    def whole(cls, rows: int, device: torch.device) -> ExpertOffsets:
        """All rows for a single expert; does not wait for the device."""
        return cls([rows], torch.full((1,), rows, dtype=torch.int32, device=device))

    def split(self, *tensors_RI: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Views of each expert's rows in all these tensors."""
        return zip(*(rows_RI.split(list(self.sizes)) for rows_RI in tensors_RI), strict=True)

    def divided(self, experts: int) -> tuple[int, ExpertOffsets, ExpertOffsets]:
        """How many rows the first ``experts`` have, their offsets, and those of the others among their own rows."""
        rows = sum(self.sizes[:experts])
        first, others = self.ends_E[:experts], self.ends_E[experts:] - rows
        return rows, ExpertOffsets(self.sizes[:experts], first), ExpertOffsets(self.sizes[experts:], others)

    def map(self, change: Callable[[Tensor], Tensor]) -> ExpertOffsets:
        """The same with its tensor changed."""
        return replace(self, ends_E=change(self.ends_E))


def owners(ends_E: Tensor, rows: int) -> Tensor:
    """int32 [R]: the expert of each of so many rows."""
    rows_R = torch.arange(rows, dtype=torch.int32, device=ends_E.device)
    return torch.searchsorted(ends_E, rows_R, right=True, out_int32=True)
