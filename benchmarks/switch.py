"""The same GPT with DeepSpeed's own MoE layer in it: Switch routing, top-1, as its users would build it."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.layer import MoE
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.groups import Groups
from stablemoe_ds.model.blocks import DenseStack
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.moe.routing_pass import LayerReport, RoutingPass


class SwitchBlock(MegatronModule):
    """DeepSpeed's layer as a member of ``RoutedStack``: h + gate * expert(h)."""

    def __init__(self, config: Any, moe: MoE, layer_number: int) -> None:
        super().__init__(config)
        self.moe, self.layer_number = moe, layer_number

    def forward(self, hidden_states: Tensor, *, routing: RoutingPass, **_: Any) -> Tensor:
        added: Tensor
        added, balance, served_N = self.moe(hidden_states)
        tokens = hidden_states.shape[0] * hidden_states.shape[1]
        none = served_N.new_zeros(())
        # Its loss is a mean over tokens, the engine wants a sum. Where a token went stays inside the layer.
        losses = {"balance": balance * tokens}
        report = LayerReport(self.layer_number, served_N.new_empty(0, 1), served_N, none, none, losses, None)
        routing.reports.append(report)
        return hidden_states + added


def switch_gpt(run: RunConfig, dense: RunConfig, groups: Groups, **options: Any) -> StableMoEGPT:
    """The dense model with a layer of ``run.moe.experts`` experts in place of each of its dense stacks.

    options: go to DeepSpeed's ``MoE``. Every expert starts as what the dense stack is, and adds nothing.
    """
    model = StableMoEGPT(dense, dense.model.vocab_size or 0, groups.placement)
    for number, block in enumerate(model.decoder.layers):
        if isinstance(block, DenseStack):
            moe = _layer(run, groups, options)
            model.decoder.layers[number] = SwitchBlock(block.config, moe, block.layer_number)
    return model


def _layer(run: RunConfig, groups: Groups, options: dict[str, Any]) -> MoE:
    """DeepSpeed's layer; LayerNorm, ReLU and biases inside an expert, as in the runs it is compared with."""
    d, f = run.model.hidden_size, run.moe.ffn_hidden_size or run.model.ffn_hidden_size
    torch.manual_seed(run.seed)  # gates and experts must start alike on every rank
    expert = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, f), nn.ReLU(), nn.Linear(f, d))
    moe = MoE(d, expert, run.moe.experts, ep_size=run.parallel.expert, use_rts=False, **options)
    if not options.get("drop_tokens", True):
        _check(moe.to(groups.world.device), expert.to(groups.world.device), d, groups)
    for name, parameter in moe.named_parameters():
        if ".deepspeed_experts." in name and name.split(".")[-2] == "3":
            nn.init.zeros_(parameter)
    return moe


@torch.no_grad()
def _check(moe: MoE, expert: nn.Module, width: int, groups: Groups) -> None:
    """Raise unless the layer computes what Switch says; all experts are alike, so the routes need not be known."""
    moe.set_deepspeed_parallelism()
    random = torch.Generator().manual_seed(groups.world.rank)
    hidden = torch.randn(64, 1, width, generator=random).to(groups.world.device)
    gate = moe.deepspeed_moe.gate
    wanted = torch.softmax(hidden @ gate.wg.weight.T, dim=-1).amax(-1, keepdim=True) * expert(hidden)
    torch.testing.assert_close(moe(hidden)[0], wanted, rtol=1e-3, atol=1e-5)
    gate.ep_group = None  # deepspeed.initialize sets it, and insists on being the first
