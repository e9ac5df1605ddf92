"""A trained model with some of its experts in memory; the others stay in its checkpoint until tokens need them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from stablemoe_ds.checkpoint.attached import token_counts_of
from stablemoe_ds.checkpoint.mapped import MappedWeights
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.rules import two_stages
from stablemoe_ds.errors import UserError
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.model.layout import expert_tensor
from stablemoe_ds.moe.experts import Experts, ExpertShape, MakeExperts
from stablemoe_ds.moe.layer import MoELayer
from stablemoe_ds.moe.resident import ResidentExperts, Traffic
from stablemoe_ds.routing.source import RouteSource

IDS_AT_ONCE = 4096
"""Ids whose experts are asked for in one call."""


class Residency:
    """Which experts of a checkpoint's model are in memory.

    traffic: of all its layers together. announcing: makes each call of the model say beforehand which experts it needs.
    """

    announcing: RemovableHandle

    def __init__(self, checkpoint: Checkpoint, fraction: float, device: torch.device) -> None:
        """``fraction``: of the experts of each MoE layer whose routes follow from token ids, at least one each.

        Raises UserError for a fraction of no use, and for a model without such layers.
        """
        if not 0 < fraction <= 1:
            raise UserError(f"resident experts: got {fraction}: expected more than 0 and at most 1, such as 0.25")
        self._checkpoint, self._fraction, self._device = checkpoint, fraction, device
        self._blocks = _known_ahead(checkpoint)
        self.traffic = Traffic()
        self._thread = ThreadPoolExecutor(1, "experts")
        self._layers: list[tuple[MoELayer, ResidentExperts]] = []

    @property
    def experts_of(self) -> Mapping[int, MakeExperts]:
        """For the model that is to be built."""
        return dict.fromkeys(self._blocks, self._make)

    def _make(self, shape: ExpertShape, experts: int, _compiled: bool) -> nn.Module:
        places = max(1, int(self._fraction * experts + 1e-9))  # 0.29 of 100 is 29
        return ResidentExperts(shape, experts, places, self._device, self._thread, self.traffic)

    def fill(self, model: StableMoEGPT, routes: RouteSource) -> None:
        """Begin to bring the experts of most load, and let every call of the model say which ones it needs.

        The load is what ``routes`` make of the counts of the training text; where the checkpoint has no counts, every
        id counts alike. Raises UserError if the checkpoint's experts are of another shape.
        """
        load_by_block = expected_load(routes, model, _counts(self._checkpoint))
        for name, layer in model.named_modules():
            if isinstance(layer, MoELayer) and isinstance(layer.experts, ResidentExperts):
                self._fill_layer(name, layer, layer.experts, load_by_block[layer.block])
                self._layers.append((layer, layer.experts))
        self.announcing = model.decoder.register_forward_pre_hook(self._expect, with_kwargs=True)

    def _fill_layer(self, name: str, layer: MoELayer, experts: ResidentExperts, load_N: NDArray[np.int64]) -> None:
        held = layer.held_experts
        shapes = experts.shapes_of_one.items()
        tensors = {expert_tensor(name, expert, rest): shape for expert in held for rest, shape in shapes}
        for tensor, shape in tensors.items():
            self._checkpoint.check_shape(tensor, shape)
        mapped = MappedWeights(self._checkpoint, tensors)

        def fetch(number: int, into: Experts) -> None:
            for rest, weight in into.named_parameters():
                mapped.copy(expert_tensor(name, held[number], rest), weight.data[0])

        experts.fill(fetch, load_N[list(held)].tolist())

    def _expect(self, _stack: nn.Module, _arguments: Any, named: Mapping[str, Any]) -> None:
        """Before the first block of a call: what its routes say about all layers. A GPU is waited for once."""
        known = named["routing"].known
        layers = [(layer, experts) for layer, experts in self._layers if layer.block in known]
        if not layers:
            return
        expert_LTK = torch.stack([known[layer.block] for layer, _ in layers]).cpu()
        for (layer, experts), expert_TK in zip(layers, expert_LTK, strict=True):
            chosen = set(expert_TK.unique().tolist())
            experts.expect({number for number, expert in enumerate(layer.held_experts) if expert in chosen})

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of the experts that are in memory."""
        return sum(experts.in_memory * experts.bytes_of_one for _, experts in self._layers)

    def __str__(self) -> str:
        one = self._layers[0][1].bytes_of_one
        here = sum(experts.in_memory for _, experts in self._layers)
        all_ = sum(len(layer.held_experts) for layer, _ in self._layers)
        return (
            f"{here} of {all_} experts in memory ({here * one / 1e6:,.1f} of {all_ * one / 1e6:,.1f} MB); of "
            f"{self.traffic.served} that had tokens {self.traffic.fetched} were fetched "
            f"({self.traffic.fetched * one / 1e6:,.1f} MB), {self.traffic.waited:.2f} s of waiting for them"
        )


def _known_ahead(checkpoint: Checkpoint) -> list[int]:
    """Blocks of the MoE layers whose routes follow from token ids. Raises UserError if there are none."""
    run = checkpoint.run
    if not run.moe.facts.routed:
        raise UserError(f"resident experts: checkpoint {checkpoint.path} is a dense model: it has no experts")
    if checkpoint.progress.stage == 2 or two_stages(run):
        return list(run.moe.layers)
    if not run.moe.fixed_layers:
        raise UserError(
            f"resident experts: router {run.moe.router} of checkpoint {checkpoint.path} chooses from hidden states, so "
            "the experts that a token needs are not known before its layers compute: expected a model whose routes "
            "follow from token ids, such as one of router stablemoe; keep all experts of this one in memory"
        )
    return list(run.moe.fixed_layers)


def _counts(checkpoint: Checkpoint) -> NDArray[np.int64]:
    with suppress(UserError):
        return token_counts_of(checkpoint)
    return np.ones(checkpoint.vocab_size, dtype=np.int64)


@torch.no_grad()
def expected_load(
    routes: RouteSource, model: StableMoEGPT, counts_V: NDArray[np.int64]
) -> dict[int, NDArray[np.int64]]:
    """int64 [N] by block: (token, choice) pairs that each expert serves of a text with these counts of ids.

    Exact for a table that looks at one id. Where routes depend on ids before it, each id is asked about as if it stood
    alone.
    """
    experts, device = model.run_config.moe.experts, next(model.parameters()).device
    load = {block: np.zeros(experts, dtype=np.int64) for block in routes.blocks}
    for ids_B in torch.arange(len(counts_V), device=device).split(IDS_AT_ONCE):
        for block, expert_BK in routes(ids_B[:, None]).items():
            weight_B1 = np.broadcast_to(counts_V[ids_B.cpu().numpy(), None], expert_BK.shape)
            np.add.at(load[block], expert_BK.cpu().numpy(), weight_B1)
    return load
