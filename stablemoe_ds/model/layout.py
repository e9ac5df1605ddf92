"""How this rank's parameters relate to the whole model's, by name and global expert id.

Initialisation and checkpoints both speak of *whole* tensors: "decoder.layers.3.moe.experts.17.sublayers.0.w1"
is the same thing under every layout. A :class:`Piece` ties one such tensor to where it lives on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stablemoe_ds.moe.layer import MoELayer
from stablemoe_ds.tables.expert_places import NO_EXPERT


@dataclass(frozen=True)
class Piece:
    """One whole tensor, and the part of it this rank holds.

    name: canonical name, with the global expert id for an expert's weight.
    shape: of the whole tensor. parameter: the local parameter. row: the local expert's index in a stacked
    parameter, None for everything else. cut_dim, cut_blocks: dimension that tensor parallelism cuts, and how many
    blocks that are cut one by one are stacked along it (2 for the gate and value halves of swiglu); cut_dim is
    None if the tensor is not cut.
    """

    name: str
    shape: tuple[int, ...]
    parameter: nn.Parameter
    row: int | None = None
    cut_dim: int | None = None
    cut_blocks: int = 1

    @property
    def is_expert(self) -> bool:
        return self.row is not None

    def local_of(self, whole: Tensor, tensor_rank: int, tensor_ranks: int) -> Tensor:
        """The part of ``whole`` that belongs to this piece on a tensor-parallel rank."""
        if self.cut_dim is None or tensor_ranks == 1:
            return whole
        blocks = whole.chunk(self.cut_blocks, dim=self.cut_dim)
        return torch.cat([block.chunk(tensor_ranks, dim=self.cut_dim)[tensor_rank] for block in blocks], self.cut_dim)

    def whole_of(self, parts: list[Tensor]) -> Tensor:
        """The whole tensor from the parts of all tensor-parallel ranks, in order."""
        if self.cut_dim is None or len(parts) == 1:
            return parts[0]
        cut = [part.chunk(self.cut_blocks, dim=self.cut_dim) for part in parts]
        blocks = [torch.cat([part[b] for part in cut], self.cut_dim) for b in range(self.cut_blocks)]
        return torch.cat(blocks, self.cut_dim)

    def select(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor shaped like the local parameter (a weight, a moment)."""
        return tensor if self.row is None else tensor[self.row]


def moe_layer_name(moe_layers: Sequence[int], block: int) -> str:
    """Name of the MoE layer at a block in the model's stack, which has an entry for each block and each MoE layer."""
    return f"decoder.layers.{block + moe_layers.index(block)}.moe"


def expert_tensor(layer: str, expert: int, rest: str) -> str:
    """Canonical name of one expert's weight. layer: name of the MoE layer in the model. rest: of the weight in it."""
    return f"{layer}.experts.{expert}.{rest}"


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Shape of a rank's parameter, also where ZeRO 3 has left it without values until it is needed."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def pieces(model: nn.Module, tensor_ranks: int) -> Iterator[Piece]:
    """Every piece of every parameter on this rank, in the model's order; none of a place without an expert."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    stacks = {f"{at}.{stack}.": (at, held) for at, layer in layers.items() for stack, held in layer.stacks.items()}
    gated = getattr(getattr(model, "config", None), "gated_linear_unit", False)
    for name, parameter in model.named_parameters():
        stack = next((stack for stack in stacks if name.startswith(stack)), None)
        if stack is not None:
            (layer, held), rest, of_one = stacks[stack], name.removeprefix(stack), tuple(shape_of(parameter)[1:])
            for row, expert in enumerate(held):
                if expert != NO_EXPERT:
                    yield Piece(expert_tensor(layer, expert, rest), of_one, parameter, row)
            continue
        shape, cut_dim = list(shape_of(parameter)), None
        if getattr(parameter, "tensor_model_parallel", False) and tensor_ranks > 1:
            cut_dim = int(vars(parameter)["partition_dim"])
            shape[cut_dim] *= tensor_ranks
        blocks = 2 if gated and ".mlp.linear_fc1." in name else 1
        yield Piece(name, tuple(shape), parameter, None, cut_dim, blocks)
