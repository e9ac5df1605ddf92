"""Layers whose passes are CUDA graphs: the host starts all kernels of a forward or backward pass with one call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.our_layer import Stage
from stablemoe_ds.moe.plan import LayerPlan, plan_dispatch


class GraphedLayer(nn.Module):
    """A layer of hidden states, captured."""

    def __init__(self, layer: nn.Module, hidden: Tensor, *tensors: Tensor) -> None:
        """hidden, tensors: what the layer is called with. Copies of them are what the graphs read from then on."""
        super().__init__()
        places = (hidden.detach().clone().requires_grad_(), *(tensor.clone() for tensor in tensors))
        self.captured = torch.cuda.make_graphed_callables(layer.to(hidden.device), places, allow_unused_input=True)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.captured(hidden)
        return out


class FromTensors(nn.Module):
    """Stage 2 as a function of tensors: routes, and what of a plan is on the device.

    The sizes of ``plan``, on the host, stand for those of any other. On one rank, with experts that are served at once,
    only the number of rows is looked at, and there are as many as tokens.
    """

    def __init__(self, stage: Stage, plan: LayerPlan) -> None:
        super().__init__()
        self.stage, self.plan = stage, plan

    def forward(
        self, hidden: Tensor, expert_TK: Tensor, order_A: Tensor, position_TK: Tensor, ends_E: Tensor
    ) -> Tensor:
        (part,) = self.plan
        offsets = replace(part.offsets, ends_E=ends_E)
        part = replace(part, order_A=order_A, position_TK=position_TK, offsets=offsets)
        return self.stage.along(hidden, expert_TK, (part,))


def tensors_of(expert_TK: Tensor, plan: LayerPlan) -> tuple[Tensor, ...]:
    """What :class:`FromTensors` is called with besides hidden states."""
    (part,) = plan
    return expert_TK, part.order_A, part.position_TK, part.offsets.ends_E


class GraphedStage(GraphedLayer):
    """Stage 2, captured along other routes than its own; each call copies its own to where the graphs read."""

    def __init__(self, stage: Stage, hidden: Tensor) -> None:
        assert stage.expert_TK is not None
        assert stage.plan is not None
        other_TK = stage.expert_TK.roll(1, 0)
        plan = plan_dispatch(other_TK, stage.ours.layer.num_experts, None)
        super().__init__(FromTensors(stage, plan), hidden.roll(1, 0), *tensors_of(other_TK, plan))
        self.stage, self.own = stage, tensors_of(stage.expert_TK, stage.plan)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.captured(hidden, *self.own)
        return out
