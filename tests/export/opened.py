"""Exported folders, opened as somebody opens them who has transformers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tiny import VOCAB


def opened(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and what the library reports of loading it."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    return model.eval(), report


def some_ids(rows: int = 2, length: int = 12) -> Tensor:
    """int64 [rows, length]."""
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))
