"""Attention that stays inside the documents of a sequence.

A training sequence is cut out of documents laid end to end, each closed by eos. Without a mask a token attends to
everything before it in the sequence, the ends of unrelated documents included.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stablemoe_ds.ops.documents import causal_mask

BLOCK = 128
"""Queries or keys of one block of the fast kernel."""
SMALLEST_HEAD = 16
"""Width of a head below which the fast kernel has no matrix product."""


@dataclass(frozen=True)
class Documents:
    """What attention has to know of a batch's documents, worked out once for all blocks.

    mask_BSS: see :func:`stablemoe_ds.ops.documents.causal_mask`; None where ``blocks`` stand for it.
    blocks: the same as a ``BlockMask`` of torch's flex_attention, which never holds S x S numbers.
    """

    mask_BSS: Tensor | None  # noqa: N815
    blocks: BlockMask | None = None

    @classmethod
    def of(cls, start_BS: Tensor, fast: bool) -> Documents:
        """From ``document_starts``, waiting for no device. fast: for the kernel of :func:`can_be_fast`."""
        return cls(None, block_mask(start_BS)) if fast else cls(causal_mask(start_BS))


def can_be_fast(device: torch.device, head_width: int, dropout: float) -> bool:
    """Whether flex_attention has a kernel: Triton's, on CUDA. It knows no dropout."""
    return device.type == "cuda" and find_spec("triton") is not None and head_width >= SMALLEST_HEAD and not dropout


def block_mask(start_BS: Tensor) -> BlockMask:
    """The causal mask of documents as a ``BlockMask``, from their borders alone.

    Starts never decrease along a sequence, so the first query of a block looks back the furthest and the last one the
    least: these two decide which blocks of keys are looked at, and which of them without a mask.
    """
    length = start_BS.shape[1]
    first_U = torch.arange(0, length, BLOCK, device=start_BS.device)  # of each block of queries, or of keys
    last_U = (first_U + BLOCK - 1).clamp_max(length - 1)
    furthest_BU, nearest_BU = start_BS[:, first_U], start_BS[:, last_U]
    earlier_UU = first_U < first_U[:, None]
    whole_BUU = (first_U >= nearest_BU[..., None]) & earlier_UU
    part_BUU = (last_U >= furthest_BU[..., None]) & (first_U <= first_U[:, None]) & ~whole_BUU

    def visible(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= start_BS[b, query])

    return BlockMask.from_kv_blocks(
        *_listed(part_BUU), *_listed(whole_BUU), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _listed(chosen_BUU: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [B, 1, U] and [B, 1, U, U]: how many blocks of keys are chosen for each block of queries, and which."""
    order = chosen_BUU.int().argsort(dim=-1, descending=True, stable=True)
    return chosen_BUU.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]
