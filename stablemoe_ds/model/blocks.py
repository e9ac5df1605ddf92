"""The layers of the stack: megatron-core's transformer layer, followed by an MoE layer in the residual stream.

The :class:`RoutingPass` of a forward call travels through :class:`stablemoe_ds.model.stack.RoutedStack` as an argument.
MoE layers read routes from it and append their reports to it.
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

from stablemoe_ds.moe.expert_offsets import ExpertOffsets
from stablemoe_ds.moe.experts import Experts, ExpertShape
from stablemoe_ds.moe.layer import MoELayer
from stablemoe_ds.moe.routing_pass import RoutingPass
from stablemoe_ds.ops.compiler import compile_once


def _call(recompute: bool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call, keeping only the inputs for the backward pass if ``recompute``."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
    return function(*args, **kwargs)


class DenseBlock(TransformerLayer):
    """megatron-core's transformer layer, optionally compiled, and recomputed in the backward pass."""

    def __init__(self, *args: Any, recompute: bool = False, compiled: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recompute, self.compiled = recompute, compiled

    def forward(self, hidden_states: Tensor, *, routing: RoutingPass, **kwargs: Any) -> Tensor:
        if routing.ended:
            return hidden_states
        # Parameters are arguments, so blocks of one shape share what was compiled.
        # Not with a key-value cache: it grows with every call, and each length would be compiled again.
        compiled = self.compiled and kwargs.get("inference_context") is None
        layer = compile_once(TransformerLayer.forward) if compiled else TransformerLayer.forward
        output: Tensor
        output, _ = _call(self.recompute and self.training, layer, self, hidden_states, **kwargs)
        return output


class MoEBlock(MegatronModule):
    """An MoE layer as a member of ``RoutedStack``."""

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

    def forward(self, hidden_states: Tensor, *, routing: RoutingPass, **_: Any) -> Tensor:
        output: Tensor
        output, report = _call(self.recompute and self.training, self.moe, hidden_states, routing)
        # Outside of what is recomputed, so that a report is made once per forward call.
        routing.reports.append(report)
        return output


class DenseStack(MegatronModule):
    """What stands in the place of an MoE layer in a dense model of as many parameters: one stack for every token."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        shape: ExpertShape,
        layer_number: int,
        recompute: bool = False,
        compiled: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number, self.recompute = layer_number, recompute
        self.stack = Experts(shape, 1, compiled)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        rows = hidden_states.flatten(0, 1)
        added = _call(
            self.recompute and self.training, self.stack, rows, ExpertOffsets.whole(rows.shape[0], rows.device)
        )
        stream: Tensor = hidden_states + added.view_as(hidden_states)
        return stream
