"""Our MoE layer in one process, as benchmarks.moe_layer times it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import Shape
from stablemoe_ds.distributed.placement import ALONE
from stablemoe_ds.moe.experts import ExpertShape
from stablemoe_ds.moe.layer import MoELayer
from stablemoe_ds.moe.plan import LayerPlan, plan_dispatch
from stablemoe_ds.moe.routing_pass import RoutingPass
from stablemoe_ds.ops.rows import plain_torch
from stablemoe_ds.routing.distilled import DistilledRouter
from stablemoe_ds.routing.routes import TokenView
from stablemoe_ds.routing.stablemoe import StableMoERouter

VOCAB = 8192


class Ours(nn.Module):
    """Our layer in one process, its second weights drawn so that experts differ and do something."""

    def __init__(self, shape: Shape, compiled: bool = False) -> None:
        super().__init__()
        distilled = DistilledRouter("word", VOCAB, shape.experts, dim=50, layers=1, width=1, heads=1, positions=1)
        router = StableMoERouter(shape.hidden_size, shape.experts, 1, normalize=False, distilled=distilled)
        kind = ExpertShape(shape.hidden_size, shape.ffn_hidden_size, 1, "relu", "layernorm", 1e-5, bias=True)
        self.layer = MoELayer(router, kind, ALONE, block=1, index=0, compiled=compiled)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.02)
        self.to(shape.torch_dtype)

    def check(self, hidden: Tensor, expert_T: Tensor, out: Tensor) -> None:
        """Raise unless a few tokens' outputs are h + gate * expert(h), computed token by token in fp32."""
        w, (centroids, *_) = dict(self.layer.experts.sublayers[0].named_parameters()), self.layer.router.parameters()
        for t in range(0, hidden.shape[0], hidden.shape[0] // 8):
            h, e = hidden[t, 0].float(), int(expert_T[t])
            gate = torch.sigmoid(centroids[e] @ h)
            inner = F.layer_norm(h, h.shape) * w["norm_weight"][e].float() + w["norm_bias"][e].float()
            inner = F.relu(w["w1"][e].float() @ inner + w["b1"][e].float())
            wanted = h + gate * (w["w2"][e].float() @ inner + w["b2"][e].float())
            error = (out[t, 0].float() - wanted).norm() / wanted.norm()
            if not error < 2e-2:
                raise AssertionError(f"token {t}: relative error {error:.3g}")


class Stage(nn.Module):
    """Our layer as it runs in one of the two stages."""

    def __init__(self, ours: Ours, tokens: TokenView, expert_TK: Tensor | None) -> None:
        """expert_TK: the routes of stage 2."""
        super().__init__()
        self.ours, self.tokens, self.expert_TK = ours, tokens, expert_TK
        self.plan = None if expert_TK is None else plan_dispatch(expert_TK, ours.layer.num_experts, None)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.along(hidden, self.expert_TK, self.plan)

    def along(self, hidden: Tensor, expert_TK: Tensor | None, plan: LayerPlan | None) -> Tensor:
        """The layer's output with these routes."""
        layer = self.ours.layer
        known = {} if expert_TK is None else {layer.block: expert_TK}
        plans = {} if plan is None else {layer.block: plan}
        out, report = layer(hidden, RoutingPass(self.tokens, known, plans=plans))
        for loss in report.loss_sums.values():
            out = out + (loss / hidden.shape[0]).to(out.dtype)
        return out


class PlainStage(Stage):
    """The same without kernels."""

    def forward(self, hidden: Tensor) -> Tensor:
        with plain_torch():
            return super().forward(hidden)
