"""Device-neutral stand-ins for the megatron-core parts that need CUDA, TransformerEngine or apex."""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import RowParallelLinear
from torch import Tensor, nn

from stablemoe_ds.routing.distilled import Fp32Module


class RowLinear(RowParallelLinear):
    """megatron-core's row-parallel linear layer, computing with the tensor-parallel group it was built with.

    megatron-core looks the group up again in every call, with a warning that cuts a compiled graph in two.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super()._forward_impl(input, weight, *args, **{**kwargs, "tp_group": self.tp_group})


class Norm:
    """Builds torch's LayerNorm or RMSNorm from a ``TransformerConfig``, as megatron-core builds its own."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:  # type: ignore[misc]
        kinds: dict[str, type[nn.Module]] = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}
        return kinds[config.normalization](hidden_size, eps=eps)


class DeviceRotaryEmbedding(Fp32Module, RotaryEmbedding):
    """Rotary embedding whose frequencies stay fp32 and move with the model.

    part: which part of every sequence this rank has, from 0 (sequence parallelism).
    """

    part = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        frequencies = cast(Tensor, self.inv_freq)
        del self.inv_freq  # a plain attribute, which would stay behind when the model moves
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, max_seq_len: int, offset: int = 0, **_: Any) -> Tensor:
        """[max_seq_len, 1, 1, width]: angles. megatron-core would keep those of an earlier call, on its device."""
        return self.get_emb(max_seq_len, offset + self.part * max_seq_len)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        freqs = cast(Tensor, RotaryEmbedding.get_freqs_non_repeated(self, max_seq_len, offset))
        return torch.cat((freqs, freqs), dim=-1)[:, None, None, :]
