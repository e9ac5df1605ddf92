"""Where the model really sends a fixed set of tokens: what routing fluctuation is measured on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.fixed import FixedRouting
from stablemoe_ds.routing.routes import LayerReport


def record_routes(
    model: StableMoEGPT, probe: Sequence[Batch], routing: FixedRouting | None, device: torch.device | str
) -> NDArray[np.int16]:
    """int16 [L, P]: the first expert of every real probe token, as the layers report it, not as a router predicts.

    Tokens stand batch by batch, sequence by sequence, without padding, so that two records of the same probe
    compare element by element. Under expert parallelism all ranks must call it together, each with as many batches.
    Raises ValueError without a batch or without an MoE layer: there is nothing to record.
    """
    if not probe or not model.moe_layers:
        raise ValueError(f"nothing to record: {len(probe)} probe batches, {len(model.moe_layers)} MoE layers")
    parts: list[Tensor] = []
    with inference(model):
        for cpu_batch in probe:
            batch = cpu_batch.to(device)
            output = model(batch, None if routing is None else routing(batch.ids))
            expert_LBS = torch.stack([_first_expert(layer, batch.ids.shape[0]) for layer in output.layers])
            parts.append(expert_LBS[:, batch.real])
    return torch.cat(parts, dim=1).to(torch.int16).cpu().numpy()


def _first_expert(layer: LayerReport, sequences: int) -> Tensor:
    """int64 [B, S] from the layer's sequence-first [S * B, K]."""
    return layer.expert_TK[:, 0].view(-1, sequences).transpose(0, 1)
