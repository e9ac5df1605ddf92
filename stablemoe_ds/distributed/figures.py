"""Figures that every rank has a share of, by name: summed in one reduction, copied to the host in one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Figures:
    """Named sums on a device. What is added stays there until :meth:`totals` is asked for."""

    def __init__(self) -> None:
        self._parts: dict[str, Tensor] = {}

    def add(self, **values: Tensor | Iterable[Tensor]) -> None:
        """Add to the figures of these names; the first value of a name decides its shape.

        An iterable of tensors is added up; an empty one leaves the figure as it is, zero if it is new.
        """
        for name, value in values.items():
            for part in (value,) if isinstance(value, Tensor) else value:
                part = part.detach()
                known = self._parts.get(name)
                self._parts[name] = part if known is None else known + part

    def on_device(self, name: str, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor | None:
        """float64 like what was added: one figure over all ranks, without waiting for it. None if none was added."""
        return sum_over_ranks(self._parts[name].double()) if name in self._parts else None

    def totals(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> Totals:
        """All figures over all ranks. Waits for the device once. Collective: every rank has added the same names."""
        if not self._parts:
            return Totals({})
        packed = torch.cat([part.double().reshape(-1) for part in self._parts.values()])
        numbers = sum_over_ranks(packed).cpu()
        shares = numbers.split([part.numel() for part in self._parts.values()])
        return Totals(
            {
                name: share.view(part.shape).tolist()
                for (name, part), share in zip(self._parts.items(), shares, strict=True)
            }
        )


class Totals:
    """Figures on the host: a number, or nested lists of numbers, by name. A name that was never added is 0 or empty."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def number(self, name: str) -> float:
        return float(self._values.get(name, 0.0))

    def count(self, name: str) -> int:
        return int(self._values.get(name, 0))

    def rows(self, name: str) -> list[list[float]]:
        """A figure of shape [L, N]."""
        return list(self._values.get(name, []))
