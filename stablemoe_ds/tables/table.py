"""The frozen product of stage 1: token id -> experts, for every MoE layer.

A table is plain data. It is made once (:meth:`RoutingTable.from_scores`), saved as a safetensors file that
any program can read, and only ever looked up afterwards. This file imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stablemoe_ds.errors import UserError
from stablemoe_ds.files import open_file
from stablemoe_ds.tables.expert_load import relative_load
from stablemoe_ds.tables.split_ids import SplitIds
from stablemoe_ds.tables.tensor_file import save_tensors

FORMAT = "stablemoe-routing-table-1"
SPLIT_FORMAT = "stablemoe-routing-table-2"
"""Of a table that splits ids: versions that do not know of them must not take it for one that does not."""
SPLIT = ("ids_J", "row_JV", "share_Q")
"""Arrays that split ids; files have them as tensors, with ``split_`` before their names."""


@dataclass(frozen=True)
class RoutingTable:
    """Which experts serve a token id.

    expert_LVK: int32 [L, V, K], expert index in [0, experts) for MoE layer, token id and choice. Where ids are split,
    further rows follow those of the V ids.
    experts: number of experts of each layer.
    blocks: the L numbers of the blocks (counted from 1) with an MoE layer.
    tokenizer: sha256 of the tokenizer's model file, or "" if the ids were made without one.
    made: how it was made, as JSON values: builder, options, seed, corpus, version; empty if unknown.
    split: ids that follow one of several rows, by the id before them; the same ones in all layers. None: no id does.
    """

    expert_LVK: NDArray[np.int32]  # noqa: N815
    experts: int
    blocks: tuple[int, ...]
    tokenizer: str = ""
    made: Mapping[str, Any] = field(default_factory=dict)
    split: SplitIds | None = None

    def __post_init__(self) -> None:
        array = self.expert_LVK
        if array.dtype != np.int32 or array.ndim != 3 or array.shape[0] != len(self.blocks):
            raise ValueError(f"expected int32 [{len(self.blocks)}, V, K], got {array.dtype} {list(array.shape)}")
        if array.size and (array.min() < 0 or array.max() >= self.experts):
            raise ValueError(f"expert index outside 0..{self.experts - 1}")
        if self.split is not None and self.split.vocab_size + self.split.further_rows != array.shape[1]:
            raise ValueError(
                f"{array.shape[1]} rows of experts, expected {self.split.vocab_size} of ids and "
                f"{self.split.further_rows} of split ids"
            )
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
        return self.expert_LVK.shape[1] - (self.split.further_rows if self.split else 0)

    @property
    def top_k(self) -> int:
        return self.expert_LVK.shape[2]

    @property
    def sha256(self) -> str:
        """Digest of everything that decides routing: shape, experts, positions, entries, and how ids are split."""
        head = f"{self._format} {list(self.expert_LVK.shape)} {self.experts} {list(self.blocks)}"
        if self.split is not None:
            head += f" {list(self.split.row_JV.shape)}"
        digest = hashlib.sha256(head.encode() + self.expert_LVK.astype("<i4").tobytes())
        for array in self.split_arrays().values():
            digest.update(array.astype("<i4").tobytes())
        return digest.hexdigest()

    @property
    def _format(self) -> str:
        return FORMAT if self.split is None else SPLIT_FORMAT

    def split_arrays(self) -> dict[str, NDArray[np.int32]]:
        """The arrays of ``split`` by name; none if it is None."""
        return {} if self.split is None else {name: getattr(self.split, name) for name in SPLIT}

    @property
    def id_of_row(self) -> NDArray[np.int64]:
        """int64 [V], or [V + Q] where ids are split: the id whose tokens follow each row."""
        return np.arange(self.vocab_size) if self.split is None else self.split.id_of_row

    def rows(self, ids: NDArray[np.integer]) -> NDArray[np.integer]:
        """Which row of ``expert_LVK`` each token follows: integers [..., S], of sequences from their first token on."""
        return ids if self.split is None else self.split.rows(ids)

    def with_rows_of(self, split: SplitIds) -> RoutingTable:
        """The same routes, with rows for ids that another table splits. Raises ValueError if it splits others."""
        if self.split is not None:
            if self.split is not split:
                raise ValueError("the table splits other ids")
            return self
        return replace(self, expert_LVK=np.ascontiguousarray(self.expert_LVK[:, split.id_of_row]), split=split)

    def only(self, blocks: Sequence[int]) -> RoutingTable:
        """The layers at these blocks, all of which it has."""
        if tuple(blocks) == self.blocks:
            return self
        layers = [self.blocks.index(block) for block in blocks]
        return replace(self, expert_LVK=self.expert_LVK[layers], blocks=tuple(blocks))

    def joined_to(self, other: RoutingTable) -> RoutingTable:
        """The layers of both, in the order of their blocks; the other's keep their own entry in ``made``.

        Where one splits ids, the other's layers get as many rows. Raises ValueError if both do.
        """
        if self.split is not other.split and (split := self.split or other.split):
            return self.with_rows_of(split).joined_to(other.with_rows_of(split))
        layers = dict(zip(self.blocks + other.blocks, [*self.expert_LVK, *other.expert_LVK], strict=True))
        blocks = tuple(sorted(layers))
        made = {**self.made, "joined_to": {"blocks": list(other.blocks), **other.made}}
        expert_LVK = np.stack([layers[block] for block in blocks])
        return replace(self, expert_LVK=expert_LVK, blocks=blocks, made=made)

    def check_ids(self, tokenizer: str, vocab_size: int, what: str) -> None:
        """Raise UserError unless ``what`` has this table's ids: their number, and the tokenizer if both are known."""
        if self.tokenizer and tokenizer and self.tokenizer != tokenizer:
            raise UserError(
                f"the routing table is of tokenizer {self.tokenizer[:12]}, {what} of {tokenizer[:12]}: ids mean "
                "different pieces; use what belongs to the table's tokenizer"
            )
        if self.vocab_size != vocab_size:
            raise UserError(f"the routing table has {self.vocab_size} ids, {what} has {vocab_size}: expected as many")

    def counts_of_rows(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64, how often each row is followed in a text.

        counts: that itself (``Corpus.row_counts``); or int64 [V], how often each id occurs, of which split ids are
        taken to come behind others as they did in the text that they were split by.
        """
        if self.split is not None and len(counts) == self.vocab_size:
            return self.split.estimated_counts(counts)
        return counts

    def expert_load(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Tokens each expert serves, as a multiple of the mean: float64 [L, N].

        counts: of ids or of rows, as :meth:`counts_of_rows` takes them.
        """
        layers, _, top_k = self.expert_LVK.shape
        served_LN = np.zeros((layers, self.experts))
        weight = np.repeat(self.counts_of_rows(counts).astype(np.float64), top_k)
        for layer in range(layers):
            served_LN[layer] = np.bincount(self.expert_LVK[layer].reshape(-1), weights=weight, minlength=self.experts)
        return relative_load(served_LN)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the tensor ``expert_LVK`` and what splits ids; the rest is in its metadata.

        Equal tables make equal files. Raises OSError if the file cannot be written.
        """
        metadata = {
            "format": self._format,
            "experts": str(self.experts),
            "blocks": ",".join(map(str, self.blocks)),
            "tokenizer": self.tokenizer,
            "sha256": self.sha256,
            "made": json.dumps(self.made),
        }
        split = {f"split_{name}": array for name, array in self.split_arrays().items()}
        save_tensors({"expert_LVK": self.expert_LVK, **split}, path, metadata)

    @classmethod
    def read(cls, path: str | Path) -> RoutingTable:
        """Read what :meth:`save` wrote. Raises UserError if the file is missing, damaged or no table."""
        from safetensors import SafetensorError, safe_open

        try:
            open_file(path).close()
            with safe_open(str(path), framework="numpy") as file:
                meta = file.metadata() or {}
                if (form := meta.get("format")) not in (FORMAT, SPLIT_FORMAT):
                    raise UserError(f"{path} is not a routing table (format {form!r}, expected {FORMAT!r})")
                blocks = tuple(int(b) for b in meta["blocks"].split(","))
                made = dict(json.loads(meta.get("made", "{}")))  # files of the first version do not say
                split = (
                    SplitIds(*(file.get_tensor(f"split_{name}") for name in SPLIT)) if form == SPLIT_FORMAT else None
                )
                rows = file.get_tensor("expert_LVK")
                table = cls(rows, int(meta["experts"]), blocks, meta["tokenizer"], made, split)
                said = meta["sha256"]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not a routing table that can be read: {error}") from error
        if table.sha256 != said:
            raise UserError(
                f"routing table {path} is damaged: its sha256 is {table.sha256[:12]}, it says {said[:12]!r}"
            )
        return table


def is_below(max_load: float, least: float) -> bool:
    """Whether a load is below what :func:`least_load` says of whole ids, by more than rounding: some ids are split."""
    return max_load <= 0.999 * least


def least_load(token_counts: NDArray[np.int64], experts: int, top_k: int) -> float:
    """The smallest max/mean load any table of ids can have: the commonest id alone fills an expert.

    Each id is served by ``top_k`` experts out of ``experts``, so the expert that gets id x sees at least
    count(x) of the top_k * T / N tokens of the mean (docs/method.md). Never below 1.
    """
    total = int(token_counts.sum())
    return max(1.0, float(token_counts.max()) * experts / (top_k * total)) if total else 1.0
