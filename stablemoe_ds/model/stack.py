"""The stack of blocks, which hands the routing of a call from one to the next."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import WrappedTensor
from torch import Tensor

from stablemoe_ds.moe.routing_pass import RoutingPass


class RoutedStack(TransformerBlock):
    """megatron-core's ``TransformerBlock`` with one argument more: ``routing``, for layers that route.

    megatron-core's own forward gives layers a fixed list of arguments. ``context``, which decoders of an
    encoder-decoder model need for the encoder's output, is among them and stays free.
    """

    def forward(self, hidden_states: Tensor | WrappedTensor, *, routing: RoutingPass, **arguments: Any) -> Tensor:
        """hidden [S, B, D] through all blocks and the last norm.

        arguments: what megatron-core's layers take besides. Activations are recomputed by the blocks themselves, and
        nothing of megatron-core's forward is left out that a configuration of this package can turn on.
        """
        stream: Tensor = hidden_states.unwrap() if isinstance(hidden_states, WrappedTensor) else hidden_states
        for layer in self.layers:
            stream = layer(stream, routing=routing, **arguments)
        last: Tensor = self.final_layernorm(stream)
        return last
