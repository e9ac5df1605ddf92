"""What ZeRO 3 has to know of the model, and weights made whole for a moment under it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import deepspeed
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

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


def gathered(modules: Iterable[nn.Module]) -> AbstractContextManager[object]:
    """While it is open, the parameters of ``modules`` are whole on every rank, to be read. Collective at ZeRO 3.

    Nothing is done at other stages, where they always are.
    """
    sharded = [p for module in modules for p in module.parameters() if hasattr(p, "ds_id")]
    gathering: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(sharded)
    return gathering
