"""What ZeRO 3 has to know of the model, and weights made whole for a moment under it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from stablemoe_ds.checkpoint.fp32_state import WEIGHT, Fp32State
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.moe.layer import MoELayer


def prepare_for_sharding(model: StableMoEGPT) -> None:
    """Call before ``deepspeed.initialize`` at ZeRO 3."""
    if model.moe_layers:
        # Gathered as one: which experts a rank serves, and in which order, differs from rank to rank.
        set_z3_leaf_modules(model, [MoELayer])
    if model.share_embeddings_and_output_weights:
        # The output layer is handed the embedding's weight, which DeepSpeed does not see.
        deepspeed.zero.register_external_parameter(model.output_layer, model.embedding.word_embeddings.weight)


def keep_fp32(engine: Any, kept: dict[nn.Parameter, Tensor]) -> None:
    """Let some weights of a model in bf16 or fp16 be fp32; call after ``deepspeed.initialize`` at ZeRO 3.

    DeepSpeed lays the shares of all weights side by side, so they have to be of one dtype when it begins. After that,
    each optimizer group is updated on its own, and weights of different dtypes are gathered apart. The weights of a
    group that is to be fp32 become its fp32 masters, as DeepSpeed has it in a model that is fp32 throughout.

    kept: their values, whole. They have to make up optimizer groups of their own.
    """
    optimizer, fp32 = engine.optimizer, Fp32State(engine)
    for group, parameters in enumerate(optimizer.fp16_groups):
        if parameters[0] not in kept:
            continue
        masters = optimizer.fp32_partitioned_groups_flat[group].detach().to(parameters[0].ds_tensor.device)
        optimizer.fp16_partitioned_groups_flat[group] = masters
        shares = masters.split([parameter.ds_tensor.numel() for parameter in parameters])
        for parameter, share in zip(parameters, shares, strict=True):
            parameter.ds_tensor.data = share
            parameter.data = torch.empty(0, dtype=masters.dtype, device=parameter.device)
            fp32.write(parameter, WEIGHT, kept[parameter].to(share.device))


def gathered(modules: Iterable[nn.Module]) -> AbstractContextManager[object]:
    """While it is open, the parameters of ``modules`` are whole on every rank, to be read. Collective at ZeRO 3.

    Nothing is done at other stages, where they always are.
    """
    sharded = [p for module in modules for p in module.parameters() if hasattr(p, "ds_id")]
    gathering: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(sharded)
    return gathering
