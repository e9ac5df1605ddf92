"""How evenly experts share the work: the load of each as a multiple of the mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def relative_load(served: ArrayLike) -> NDArray[np.float64]:
    """float64 [..., N]: each expert's load as a multiple of the mean of its layer; 0 where no expert has anything.

    served: numbers [..., N], at least 0: what each of N experts serves, usually tokens.
    """
    counts = np.asarray(served)
    return counts * counts.shape[-1] / np.maximum(counts.sum(-1, keepdims=True), 1)


def max_loads(served_LN: Sequence[ArrayLike]) -> list[float]:
    """max/mean load of each layer: 1 is even, N is everything to one expert, 0 is nothing served.

    served_LN: numbers [L, N] as for :func:`relative_load`; there may be no layer at all.
    """
    return [float(relative_load(served_N).max()) for served_N in served_LN]
