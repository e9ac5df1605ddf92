"""The layers of the stack: megatron-core's transformer layer, and an MoE layer beside it in the residual stream.

The :class:`RoutingPass` of a forward call travels through ``TransformerBlock`` as its ``context`` argument,
which a decoder-only model leaves free. MoE layers read routes from it and append their reports to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stablemoe_ds.moe.experts import Experts, ExpertShape
from stablemoe_ds.moe.layer import MoELayer
from stablemoe_ds.moe.segments import Segments
from stablemoe_ds.routing.routes import RoutingPass


def _call(recompute: bool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call, keeping only the inputs for the backward pass if ``recompute``."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
    return function(*args, **kwargs)


class DenseBlock(TransformerLayer):
    """megatron-core's transformer layer, optionally recomputed in the backward pass."""

    def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recompute = recompute

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, RoutingPass | None]:
        routing = kwargs.pop("context", None)
        output, _ = _call(self.recompute and self.training, super().forward, hidden_states, **kwargs)
        return output, routing


class MoEBlock(MegatronModule):
    """An MoE layer as a member of ``TransformerBlock``."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        build: Callable[[], MoELayer],
        layer_number: int,
        recompute: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number, self.recompute = layer_number, recompute
        self.moe = build()

    def forward(self, hidden_states: Tensor, context: RoutingPass, **_: Any) -> tuple[Tensor, RoutingPass]:
        output, report = _call(self.recompute and self.training, self.moe, hidden_states, context)
        # Outside of what is recomputed, so that a report is made once per forward call.
        context.reports.append(report)
        return output, context


class DenseStack(MegatronModule):
    """What stands in the place of an MoE layer in a dense model of as many parameters: one stack for every token."""

    def __init__(
        self, config: TransformerConfig, *, shape: ExpertShape, layer_number: int, recompute: bool = False, **_: Any
    ) -> None:
        super().__init__(config)
        self.layer_number, self.recompute = layer_number, recompute
        self.stack = Experts(shape, 1)

    def forward(self, hidden_states: Tensor, context: RoutingPass, **_: Any) -> tuple[Tensor, RoutingPass]:
        rows = hidden_states.flatten(0, 1)
        added = _call(self.recompute and self.training, self.stack, rows, Segments.whole(rows.shape[0], rows.device))
        return hidden_states + added.view_as(hidden_states), context
