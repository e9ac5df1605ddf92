"""ZeRO 3: a model that no rank ever holds whole, from its first weight on; and weights made whole for a moment."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from stablemoe_ds.config.schema import RunConfig
from stablemoe_ds.distributed.groups import DeepSpeedMpu, Groups
from stablemoe_ds.distributed.placement import LayerPlacement
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.model.initialize import give_memory, initialize_pieces, without_memory
from stablemoe_ds.model.layout import Piece, pieces
from stablemoe_ds.moe.layer import MoELayer
from stablemoe_ds.routing.distilled import Fp32Module
from stablemoe_ds.training.optimizer import parameters_in

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(run: RunConfig, vocab_size: int, placement: LayerPlacement) -> StableMoEGPT:
    """The model of a run, for an engine. At ZeRO 3 its weights have no memory until :func:`shard`."""
    with without_memory() if run.parallel.zero_stage == 3 else nullcontext():
        return StableMoEGPT(run, vocab_size, placement)


def shard(
    model: StableMoEGPT, run: RunConfig, groups: Groups, deepspeed_config: dict[str, Any]
) -> dict[nn.Parameter, Tensor]:
    """Make the weights of a model one after another, leaving each rank its share; before ``deepspeed.initialize``.

    Those without memory get their start values; the others keep theirs. A rank holds its shares and one whole weight at
    a time. Returns this rank's fp32 shares of weights that are to stay fp32, for :func:`keep_fp32`. Collective.
    """
    if model.moe_layers:
        # Gathered as one: which experts a rank serves, and in which order, differs from rank to rank.
        set_z3_leaf_modules(model, [MoELayer])
    if model.share_embeddings_and_output_weights:
        # The output layer is handed the embedding's weight, which DeepSpeed does not see.
        deepspeed.zero.register_external_parameter(model.output_layer, model.embedding.word_embeddings.weight)
    kept = dict.fromkeys(parameters_in(model, Fp32Module), torch.empty(0))
    sharding = deepspeed.zero.Init(
        module=nn.ParameterList(),
        data_parallel_group=groups.data_group,
        config_dict_or_path=deepspeed_config,
        mpu=DeepSpeedMpu(),
    )
    dtype = DTYPES[run.precision.dtype]
    # A parameter has none where no place of this rank has an expert.
    rows: dict[nn.Parameter, list[Piece]] = {parameter: [] for parameter in model.parameters()}
    for piece in pieces(model, groups.tensor):
        rows[piece.parameter].append(piece)
    for parameter, own in rows.items():
        if parameter.is_meta:
            give_memory(parameter)
            initialize_pieces(own, run)
        if name := vars(parameter).get("group_name"):  # of an expert
            copies = deepspeed_groups._get_expert_data_parallel_group(name)
            vars(parameter)["ds_zero_partition_process_group"] = copies
        if parameter not in kept:
            parameter.data = parameter.to(dtype)
        sharding._convert_to_zero_parameters([parameter])
        if parameter in kept:
            share = vars(parameter)["ds_tensor"]
            kept[parameter], share.data = share.clone(), share.to(dtype)
            parameter.data = torch.empty(0, dtype=dtype, device=parameter.device)
    model.to(groups.world.device)  # its buffers
    return kept


def keep_fp32(optimizer: Any, kept: dict[nn.Parameter, Tensor]) -> None:
    """Let some weights of a model in bf16 or fp16 be fp32; after ``deepspeed.initialize``.

    DeepSpeed lays the shares of all weights side by side, so they have to be of one dtype when it begins. After that,
    each optimizer group is updated on its own, and weights of different dtypes are gathered apart. The weights of a
    group that is to be fp32 become its fp32 masters, as DeepSpeed has it in a model that is fp32 throughout.

    optimizer: DeepSpeed's of ZeRO 3. kept: this rank's shares of the weights, which are optimizer groups of their own.
    """
    for group, parameters in enumerate(optimizer.fp16_groups):
        if parameters[0] not in kept:
            continue
        masters, held = optimizer.fp32_partitioned_groups_flat[group].detach(), parameters[0].ds_tensor
        masters.copy_(torch.cat([kept[parameter] for parameter in parameters]))
        weights = optimizer.fp16_partitioned_groups_flat[group] = masters.to(held.device)
        shares = weights.split([kept[parameter].numel() for parameter in parameters])
        for parameter, share in zip(parameters, shares, strict=True):
            parameter.ds_tensor.data = share
            parameter.data = torch.empty(0, dtype=share.dtype, device=parameter.device)


def gathered(modules: Iterable[nn.Module]) -> AbstractContextManager[object]:
    """While it is open, the parameters of ``modules`` are whole on every rank, to be read. Collective at ZeRO 3.

    Nothing is done at other stages, where they always are.
    """
    sharded = [p for module in modules for p in module.parameters() if hasattr(p, "ds_id")]
    gathering: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(sharded)
    return gathering
