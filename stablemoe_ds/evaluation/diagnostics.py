"""How the probe tokens were spread over the experts, record by record."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.evaluation.specialisation import use_of_pairs
from stablemoe_ds.run_directory.probe_records import RouteRecords


@dataclass(frozen=True)
class RoutingSeries:
    """One number a record and MoE layer, float64 [H, L], from the first expert of each probe token.

    load: largest over mean. load_cv: its standard deviation over its mean. unserved: share of tokens without an expert.
    nmi: mutual information of token id and expert over the entropy of the expert, so 1 means that the id decides.
    nmi_chance: the same with the experts shuffled over the tokens; a small sample has some whatever the router does.
    cohesion: bits of the ids an expert sees, mean over tokens. expert_bits: [H, L, N], the same of each expert.
    """

    steps: NDArray[np.int64]
    load: NDArray[np.float64]
    load_cv: NDArray[np.float64]
    unserved: NDArray[np.float64]
    nmi: NDArray[np.float64]
    nmi_chance: NDArray[np.float64]
    cohesion: NDArray[np.float64]
    expert_bits: NDArray[np.float64]


def routing_series(records: RouteRecords, ids: NDArray[np.integer], experts: int) -> RoutingSeries:
    """Measure every record. ids: int [P], the token ids of the probe. experts: of each layer."""
    count, layers, tokens = records.expert_HLP.shape
    if ids.shape != (tokens,):
        raise ValueError(f"expected the ids of {tokens} probe tokens, got shape {list(ids.shape)}")
    random = np.random.default_rng(0)
    names = ("load", "load_cv", "unserved", "nmi", "nmi_chance", "cohesion")
    numbers = {name: np.empty((count, layers)) for name in names}
    bits_HLN = np.empty((count, layers, experts))
    for at in np.ndindex(count, layers):
        expert_P = records.expert_HLP[at]
        use = use_of_pairs(ids, expert_P, experts, block=0)
        numbers["load"][at] = use.load_N.max()
        numbers["load_cv"][at] = use.load_cv
        numbers["unserved"][at] = (expert_P < 0).mean()
        numbers["nmi"][at] = use.id_decides
        numbers["nmi_chance"][at] = use_of_pairs(ids, random.permutation(expert_P), experts, block=0).id_decides
        numbers["cohesion"][at] = use.cohesion_bits
        bits_HLN[at] = use.entropy_N
    return RoutingSeries(records.steps, **numbers, expert_bits=bits_HLN)
