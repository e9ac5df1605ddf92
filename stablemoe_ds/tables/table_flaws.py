"""What is wrong with a table of somebody else's making."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.errors import UserError

MOST_EXPERTS = 1 << 16
"""Where nobody says how many there are, a larger number is damage and no expert."""


def flaws(expert_VK: NDArray[np.integer], experts: int | None) -> Iterator[str]:
    """What is wrong with the values of a layer. experts: N, or None where nobody says."""
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


def refuse(problems: Iterator[str]) -> None:
    """Raise UserError with a line for each problem, if there is one."""
    if lines := list(problems):
        raise UserError("\n".join(lines))
