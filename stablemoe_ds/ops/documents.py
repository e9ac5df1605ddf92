"""Where the documents of a sequence begin, and which tokens see which. Prepared text ends each document with eos."""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(ids_BS: Tensor, eos_id: int | None) -> Tensor:
    """int64 [B, S]: where in its sequence the document of each token begins.

    eos is the last token of its document. eos_id: None if a sequence is one document, whatever ids it has.
    """
    position_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
    begins_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    if eos_id is not None:
        begins_BS[:, 1:] = ids_BS[:, :-1] == eos_id
    return torch.where(begins_BS, position_S, 0).cummax(1).values


def causal_mask(start_BS: Tensor) -> Tensor:
    """bool [B, S, S]: which keys a query sees: those of its document that are not later."""
    position_S = torch.arange(start_BS.shape[1], device=start_BS.device)
    return (position_S >= start_BS[..., None]) & (position_S <= position_S[:, None])
