"""Where the model really sends a fixed set of tokens: what routing fluctuation is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablemoe_ds.data.batch import Batch
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.moe.routing_pass import LayerReport, view_of
from stablemoe_ds.routing.source import RouteSource, routes_of


@dataclass(frozen=True)
class ProbeRecord:
    """Routing of this rank's probe tokens at one moment.

    expert_LP: int16 [L, P], the first expert of every real token, as the layers report it.
    served_LN: int64 [L, N], real tokens (times K) by the expert they chose.
    agreed, compared: (token, layer) pairs for which the distilled router names the learned expert, out of so many;
    none are compared when routing is fixed.
    """

    expert_LP: NDArray[np.int16]  # noqa: N815
    served_LN: NDArray[np.int64]  # noqa: N815
    agreed: int
    compared: int


def record_routes(
    model: StableMoEGPT, probe: Sequence[Batch], routes: RouteSource, device: torch.device | str
) -> ProbeRecord:
    """What the layers do with the probe tokens, not what a router predicts they would.

    Tokens stand batch by batch, sequence by sequence, without padding, so that two records of the same probe
    compare element by element. Under expert parallelism all ranks must call it together, each with as many batches.
    Raises ValueError without a batch or without an MoE layer: there is nothing to record.
    """
    if not probe or not model.moe_layers:
        raise ValueError(f"nothing to record: {len(probe)} probe batches, {len(model.moe_layers)} MoE layers")
    parts: list[Tensor] = []
    served: list[Tensor] = []
    agreed = compared = 0
    with inference(model):
        for cpu_batch in probe:
            batch = cpu_batch.to(device)
            layers = model(batch, routes_of(view_of(batch), routes)).layers
            expert_LBS = torch.stack([_first_expert(layer, batch.ids.shape[0]) for layer in layers])
            parts.append(expert_LBS[:, batch.real])
            served.append(torch.stack([layer.served_N for layer in layers]))
            known = [layer.agree for layer in layers if layer.agree is not None]
            agreed += sum(int(agree) for agree in known)
            compared += int(batch.real.sum()) * len(known)
    return ProbeRecord(
        expert_LP=torch.cat(parts, dim=1).to(torch.int16).cpu().numpy(),
        served_LN=torch.stack(served).sum(0).cpu().numpy(),
        agreed=agreed,
        compared=compared,
    )


def _first_expert(layer: LayerReport, sequences: int) -> Tensor:
    """int64 [B, S] from the layer's sequence-first [S * B, K]."""
    return layer.expert_TK[:, 0].view(-1, sequences).transpose(0, 1)
