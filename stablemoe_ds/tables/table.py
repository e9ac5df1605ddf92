"""The frozen product of stage 1: token id -> experts, for every MoE layer.

A table is plain data. It is made once (:meth:`RoutingTable.from_scores`), saved as a safetensors file that
any program can read, and only ever looked up afterwards. This file imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.errors import UserError
from stablemoe_ds.files import follow_umask, open_file
from stablemoe_ds.tables.expert_load import relative_load

FORMAT = "stablemoe-routing-table-1"


@dataclass(frozen=True)
class RoutingTable:
    """Which experts serve a token id.

    expert_LVK: int32 [L, V, K], expert index in [0, experts) for MoE layer, token id and choice.
    experts: number of experts of each layer.
    blocks: the L numbers of the blocks (counted from 1) with an MoE layer.
    tokenizer: sha256 of the tokenizer's model file, or "" if the ids were made without one.
    made: how it was made, as JSON values: builder, options, seed, corpus, version; empty if unknown.
    """

    expert_LVK: NDArray[np.int32]  # noqa: N815
    experts: int
    blocks: tuple[int, ...]
    tokenizer: str = ""
    made: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        array = self.expert_LVK
        if array.dtype != np.int32 or array.ndim != 3 or array.shape[0] != len(self.blocks):
            raise ValueError(f"expected int32 [{len(self.blocks)}, V, K], got {array.dtype} {list(array.shape)}")
        if array.size and (array.min() < 0 or array.max() >= self.experts):
            raise ValueError(f"expert index outside 0..{self.experts - 1}")
        array.setflags(write=False)

    @classmethod
    def from_scores(
        cls,
        scores_LVN: NDArray[np.float32],
        top_k: int,
        blocks: tuple[int, ...],
        tokenizer: str = "",
        made: Mapping[str, Any] | None = None,
    ) -> RoutingTable:
        """Take the ``top_k`` best experts of each id; on a tie the lowest index wins (docs/method.md).

        scores_LVN: float32 [L, V, N], distilled affinity of each id to each expert.
        Raises ValueError if a score is not finite: such a table would be arbitrary.
        """
        if scores_LVN.dtype != np.float32:
            raise ValueError(f"scores must be float32, got {scores_LVN.dtype}")
        if not np.isfinite(scores_LVN).all():
            raise ValueError("distilled scores hold NaN or infinity: refusing to freeze them into a table")
        order = np.argsort(-scores_LVN, axis=-1, kind="stable")[..., :top_k]
        return cls(np.ascontiguousarray(order, dtype=np.int32), scores_LVN.shape[-1], blocks, tokenizer, made or {})

    @property
    def vocab_size(self) -> int:
        return self.expert_LVK.shape[1]

    @property
    def top_k(self) -> int:
        return self.expert_LVK.shape[2]

    @property
    def sha256(self) -> str:
        """Digest of everything that decides routing: shape, experts, positions and entries."""
        head = f"{FORMAT} {list(self.expert_LVK.shape)} {self.experts} {list(self.blocks)}".encode()
        return hashlib.sha256(head + self.expert_LVK.astype("<i4").tobytes()).hexdigest()

    def only(self, blocks: Sequence[int]) -> RoutingTable:
        """The layers at these blocks, all of which it has."""
        if tuple(blocks) == self.blocks:
            return self
        rows = [self.blocks.index(block) for block in blocks]
        return RoutingTable(self.expert_LVK[rows], self.experts, tuple(blocks), self.tokenizer, self.made)

    def joined_to(self, other: RoutingTable) -> RoutingTable:
        """The layers of both, in the order of their blocks; the other's keep their own entry in ``made``."""
        layers = dict(zip(self.blocks + other.blocks, [*self.expert_LVK, *other.expert_LVK], strict=True))
        blocks = tuple(sorted(layers))
        made = {**self.made, "joined_to": {"blocks": list(other.blocks), **other.made}}
        expert_LVK = np.stack([layers[block] for block in blocks])
        return RoutingTable(expert_LVK, self.experts, blocks, self.tokenizer, made)

    def check_ids(self, tokenizer: str, vocab_size: int, what: str) -> None:
        """Raise UserError unless ``what`` has this table's ids: their number, and the tokenizer if both are known."""
        if self.tokenizer and tokenizer and self.tokenizer != tokenizer:
            raise UserError(
                f"the routing table is of tokenizer {self.tokenizer[:12]}, {what} of {tokenizer[:12]}: ids mean "
                "different pieces; use what belongs to the table's tokenizer"
            )
        if self.vocab_size != vocab_size:
            raise UserError(f"the routing table has {self.vocab_size} ids, {what} has {vocab_size}: expected as many")

    def expert_load(self, token_counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Tokens each expert serves, as a multiple of the mean: float64 [L, N].

        token_counts: int64 [V], how often each id occurs.
        """
        layers, _, top_k = self.expert_LVK.shape
        served_LN = np.zeros((layers, self.experts))
        weight = np.repeat(token_counts.astype(np.float64), top_k)
        for layer in range(layers):
            served_LN[layer] = np.bincount(self.expert_LVK[layer].reshape(-1), weights=weight, minlength=self.experts)
        return relative_load(served_LN)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the tensor ``expert_LVK``; everything else is in its metadata."""
        from safetensors.numpy import save_file

        metadata = {
            "format": FORMAT,
            "experts": str(self.experts),
            "blocks": ",".join(map(str, self.blocks)),
            "tokenizer": self.tokenizer,
            "sha256": self.sha256,
            "made": json.dumps(self.made),
        }
        save_file({"expert_LVK": np.ascontiguousarray(self.expert_LVK)}, str(path), metadata)
        follow_umask(path)

    @classmethod
    def read(cls, path: str | Path) -> RoutingTable:
        """Read what :meth:`save` wrote. Raises UserError if the file is missing, damaged or no table."""
        from safetensors import SafetensorError, safe_open

        try:
            open_file(path).close()
            with safe_open(str(path), framework="numpy") as file:
                meta = file.metadata() or {}
                if meta.get("format") != FORMAT:
                    raise UserError(
                        f"{path} is not a routing table (format {meta.get('format')!r}, expected {FORMAT!r})"
                    )
                blocks = tuple(int(b) for b in meta["blocks"].split(","))
                made = dict(json.loads(meta.get("made", "{}")))  # files of the first version do not say
                table = cls(file.get_tensor("expert_LVK"), int(meta["experts"]), blocks, meta["tokenizer"], made)
                said = meta["sha256"]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not a routing table that can be read: {error}") from error
        if table.sha256 != said:
            raise UserError(
                f"routing table {path} is damaged: its sha256 is {table.sha256[:12]}, it says {said[:12]!r}"
            )
        return table


def least_load(token_counts: NDArray[np.int64], experts: int, top_k: int) -> float:
    """The smallest max/mean load any table of ids can have: the commonest id alone fills an expert.

    Each id is served by ``top_k`` experts out of ``experts``, so the expert that gets id x sees at least
    count(x) of the top_k * T / N tokens of the mean (docs/method.md). Never below 1.
    """
    total = int(token_counts.sum())
    return max(1.0, float(token_counts.max()) * experts / (top_k * total)) if total else 1.0
