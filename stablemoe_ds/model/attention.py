"""Core attention by torch's own kernels, and which of them suits what."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.sequence.layer import DistributedAttention
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from stablemoe_ds.model.document_mask import Documents
from stablemoe_ds.ops.compiler import compile_once

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class SdpaAttention(nn.Module):
    """Core attention by ``torch.scaled_dot_product_attention``, causal, with grouped queries.

    Queries that are fewer than the keys stand at the end of the sequence (decoding with a key-value cache).
    """

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.dropout, self.scale = config.attention_dropout, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Documents | None, **_: Any) -> Tensor:
        """[Sq, B, heads, d], [Sk, B, groups, d] twice -> [Sq, B, heads * d].

        attention_mask: keeps documents apart, with as many queries as keys; None: causal and nothing else. Raises
        TypeError for a mask of another kind, which would pass for causal.
        """
        return self.attend(query, key, value, attention_mask).flatten(2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Documents | None) -> Tensor:
        """As :meth:`forward`, -> [Sq, B, heads, d]."""
        if not isinstance(attention_mask, Documents | None):
            raise TypeError(f"expected Documents for a mask, got {type(attention_mask).__name__}")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if attention_mask is not None and attention_mask.blocks is not None:
            # As it is written it computes every score; compiled, it is one kernel that leaves out what is masked.
            flex = flex_attention if torch.compiler.is_compiling() else compile_once(flex_attention)
            out = flex(q, k, v, block_mask=attention_mask.blocks, scale=self.scale, enable_gqa=_grouped(q, k))
        else:
            out = self._sdpa(q, k, v, None if attention_mask is None else attention_mask.mask_BSS)
        return out.permute(2, 0, 1, 3)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask_BSS: Tensor | None) -> Tensor:
        n_query, n_key = q.shape[2], k.shape[2]
        mask = None if mask_BSS is None else mask_BSS[:, None]
        causal = mask is None and n_query == n_key
        if 1 < n_query < n_key:  # one query sees every key; as many queries as keys are plain causal
            mask = torch.ones(n_query, n_key, dtype=torch.bool, device=q.device).tril(n_key - n_query)
        if _grouped(q, k) and wants_whole_heads(q.device.type, q.dtype, mask is not None):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        with kernels_for(q.device.type, self.training):
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=causal,
                dropout_p=self.dropout if self.training else 0.0,
                scale=self.scale,
                enable_gqa=_grouped(q, k),
            )


class UlyssesAttention(SdpaAttention):
    """Core attention of ranks that share sequences: each has S consecutive positions of all heads.

    DeepSpeed's all-to-alls exchange these before attention, so that each rank has all positions of its share of the
    heads, and exchange them back afterwards (Jacobs et al. 2023, arXiv 2309.14509).
    """

    def __init__(self, config: Any, layer_number: int, *, group: dist.ProcessGroup, **options: Any) -> None:
        """``group``: the ranks that share sequences, in the order of their parts."""
        super().__init__(config, layer_number, **options)
        self.ranks = dist.get_world_size(group)
        # Traced into a compiled graph, DeepSpeed's all-to-all would lose its gradient.
        self.trade = torch.compiler.disable(DistributedAttention(self.attend, group).forward)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Documents | None, **_: Any) -> Tensor:
        """[S, B, heads, d], [S, B, groups, d] twice -> [S, B, heads * d]. Collective.

        attention_mask: of the whole sequences. Keys and values are repeated where a rank would have less than one.
        """
        copies = self.ranks // math.gcd(self.ranks, key.shape[2])
        if copies > 1:
            key, value = (x.repeat_interleave(copies, dim=2) for x in (key, value))
        batch_dim, no_rotation = 1, None
        out: Tensor = self.trade(query, key, value, batch_dim, no_rotation, attention_mask)
        return out.flatten(2)


def _grouped(q: Tensor, k: Tensor) -> bool:
    return q.shape[1] != k.shape[1]


def wants_whole_heads(device: str, dtype: torch.dtype, masked: bool) -> bool:
    """Whether grouped keys and values are repeated for each query's head.

    On CUDA only flash and cuDNN take groups, and neither takes fp32; flash takes no mask. What is left would be the
    plain formula, which keeps a score for every pair; the memory-efficient kernel wants whole heads.
    """
    return device == "cuda" and (masked or dtype not in (torch.bfloat16, torch.float16))


def kernels_for(device: str, training: bool) -> AbstractContextManager[Any]:
    """In training torch's own choice. Otherwise lengths change from call to call, and cuDNN plans for each new one."""
    return sdpa_kernel(WITHOUT_PLANS) if device == "cuda" and not training else nullcontext()


class CachedSelfAttention(SelfAttention):
    """megatron-core's self-attention whose key-value cache lives where the weights live."""

    def _allocate_memory(self, length: int, batch: int, dim: int, dtype: torch.dtype) -> Tensor:
        weight = self.linear_proj.weight
        return torch.empty(length, batch, self.num_query_groups_per_partition, dim, dtype=dtype, device=weight.device)
