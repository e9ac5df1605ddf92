"""The MoE layers that people would use instead, each as a function of hidden states [T, 1, d]."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, nn

from stablemoe_ds.routing.auction import balanced_assignment

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # its layer asks for this name, which is only there with TransformerEngine


@dataclass(frozen=True)
class Shape:
    """tokens T, width d, inner width f, experts N; load: uniform, or skewed as Zipf's law has token ids."""

    tokens: int
    hidden_size: int
    ffn_hidden_size: int
    experts: int
    load: str
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]


class Ffn(nn.Module):
    """W2 relu(W1 LN(x)): an expert where a layer takes any module, and the dense bound."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.hidden_size)
        self.up = nn.Linear(shape.hidden_size, shape.ffn_hidden_size)
        self.down = nn.Linear(shape.ffn_hidden_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(x))))


class Residual(nn.Module):
    """h + layer(h)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.layer(hidden)


class DeepSpeedLayer(nn.Module):
    """h + DeepSpeed's ``MoE``, top-1, and its balance loss."""

    def __init__(self, shape: Shape, **options: Any) -> None:
        super().__init__()
        self.moe = MoE(shape.hidden_size, Ffn(shape), shape.experts, use_rts=False, **options)
        self.moe.set_deepspeed_parallelism()
        self.to(shape.torch_dtype)
        self.moe.deepspeed_moe.gate.wg.float()

    def forward(self, hidden: Tensor) -> Tensor:
        out, balance, _ = self.moe(hidden)
        return hidden + out + balance.to(out.dtype)


class EinsumLayer(DeepSpeedLayer):
    """The same with the dense masks that DeepSpeed's gate still offers: [T, N, C], einsum there and back (GShard)."""

    def forward(self, hidden: Tensor) -> Tensor:
        layer, rows_TD = self.moe.deepspeed_moe, hidden.flatten(0, 1)
        balance, combine_TNC, dispatch_TNC, _ = layer.gate(rows_TD)
        rows_NCD = torch.einsum("tnc,td->ncd", dispatch_TNC.to(rows_TD.dtype), rows_TD)
        served_NCD = layer.experts(rows_NCD[None])[0]
        out_TD = torch.einsum("tnc,ncd->td", combine_TNC.to(rows_TD.dtype), served_NCD)
        return hidden + out_TD.view_as(hidden) + balance.to(out_TD.dtype)


class BaseStyleLayer(nn.Module):
    """BASE: one expert a rank, tokens shared out evenly by an auction; one rank's part, without the exchange.

    This rank assigns its T tokens to N ranks, orders them, and its expert serves the T that it would be sent.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.expert = Ffn(shape)
        self.centroids = nn.Parameter(torch.randn(shape.experts, shape.hidden_size) / math.sqrt(shape.hidden_size))
        self.to(shape.torch_dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        rows_TD = hidden.flatten(0, 1)
        scores_TN = F.linear(rows_TD, self.centroids).float()
        with torch.no_grad():
            expert_T = balanced_assignment(scores_TN)
            order_T = expert_T.argsort(stable=True)
        served_TD = self.expert(rows_TD[order_T])
        gate_T = torch.sigmoid(scores_TN.gather(1, expert_T[:, None])).to(rows_TD.dtype)
        back_TD = torch.zeros_like(rows_TD).index_copy(0, order_T, served_TD)
        return hidden + (gate_T * back_TD).view_as(hidden)


class MegatronLayer(nn.Module):
    """h + megatron-core's ``MoELayer`` of LN(h), top-1, with its balance loss and without biases, which it refuses."""

    def __init__(self, shape: Shape, dispatcher: str) -> None:
        super().__init__()
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.spec_utils import build_module
        from megatron.core.transformer.transformer_config import TransformerConfig

        on_gpu = torch.cuda.is_available()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=shape.hidden_size,
            num_attention_heads=1,
            ffn_hidden_size=shape.ffn_hidden_size,
            num_moe_experts=shape.experts,
            moe_router_topk=1,
            moe_router_pre_softmax=True,
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=0.01,
            moe_token_dispatcher_type=dispatcher,
            moe_grouped_gemm=False,
            activation_func=F.relu,
            add_bias_linear=False,
            use_cpu_initialization=not on_gpu,
            params_dtype=shape.torch_dtype,
            bf16=shape.dtype == "bf16",
        )
        if on_gpu:  # its parameters are drawn from a random state on the GPU that somebody has to seed
            model_parallel_cuda_manual_seed(1)
        with cuda_calls_on_the_cpu():
            self.norm = nn.LayerNorm(shape.hidden_size, dtype=shape.torch_dtype)
            self.moe = build_module(get_moe_module_spec(use_te=False, num_experts=shape.experts), config=config)
            self.moe.set_layer_number(1)

    def forward(self, hidden: Tensor) -> Tensor:
        with cuda_calls_on_the_cpu():
            return hidden + self.moe(self.norm(hidden))[0]


@contextlib.contextmanager
def cuda_calls_on_the_cpu() -> Iterator[None]:
    """megatron-core's layer asks for the current GPU and its streams whatever the device: without one, answer."""
    answers: dict[str, Callable[..., Any]] = {
        "current_device": lambda: torch.device("cpu"),
        "synchronize": lambda *_: None,
        "current_stream": lambda *_: mock.MagicMock(),
        "Stream": lambda *_, **__: mock.MagicMock(),
        "stream": lambda *_: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield
