"""Device-neutral stand-ins for the megatron-core parts that need CUDA, TransformerEngine or apex."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn


class SdpaAttention(nn.Module):
    """Core attention by ``torch.scaled_dot_product_attention``, causal, with grouped queries.

    Queries that are fewer than the keys stand at the end of the sequence (decoding with a key-value cache).
    """

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.dropout, self.scale = config.attention_dropout, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """[Sq, B, heads, d], [Sk, B, groups, d] twice -> [Sq, B, heads * d]. ``attention_mask`` must be None."""
        if attention_mask is not None:
            raise ValueError("only causal attention without a mask is supported")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        n_query, n_key = q.shape[2], k.shape[2]
        mask = None
        if 1 < n_query < n_key:  # one query sees every key; as many queries as keys are plain causal
            mask = torch.ones(n_query, n_key, dtype=torch.bool, device=q.device).tril(n_key - n_query)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=n_query == n_key,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class CachedSelfAttention(SelfAttention):
    """megatron-core's self-attention whose key-value cache lives where the weights live."""

    def _allocate_memory(self, length: int, batch: int, dim: int, dtype: torch.dtype) -> Tensor:
        weight = self.linear_proj.weight
        return torch.empty(length, batch, self.num_query_groups_per_partition, dim, dtype=dtype, device=weight.device)


class RowLinear(RowParallelLinear):
    """megatron-core's row-parallel linear layer, computing with the tensor-parallel group it was built with.

    megatron-core looks the group up anew in every call, with a warning that cuts a compiled graph in two.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super()._forward_impl(input, weight, *args, **{**kwargs, "tp_group": self.tp_group})


class Norm:
    """Builds torch's LayerNorm or RMSNorm from a ``TransformerConfig``, as megatron-core builds its own."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:  # type: ignore[misc]
        kinds: dict[str, type[nn.Module]] = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}
        return kinds[config.normalization](hidden_size, eps=eps)


class DeviceRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding whose frequencies stay fp32 and follow the input's device."""

    device: torch.device = torch.device("cpu")

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        self.inv_freq: Tensor = self.inv_freq.to(self.device)
        freqs = self.get_freqs_non_repeated(max_seq_len, offset)
        return torch.cat((freqs, freqs), dim=-1)[:, None, None, :]
