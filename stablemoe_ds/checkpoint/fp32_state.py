"""fp32 master weights and Adam moments of a DeepSpeed engine, by parameter, whatever ZeRO has done to them.

ZeRO 1 and 2 flatten each parameter group and give every data rank one partition of it; a parameter's
``_hp_mapping`` says which stretch of it lies in this rank's partition (``deepspeed.utils.tensor_fragment``).
ZeRO 3 cuts every parameter into equal parts, one a rank of ``ds_process_group``, and lays a rank's parts of a
group side by side (``deepspeed.runtime.zero.stage3``); the last part may reach beyond the end of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stablemoe_ds.model.layout import shape_of

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Stretch:
    """The part of a parameter, flattened, whose fp32 state this rank holds.

    held: what Adam works on, a partition of ZeRO's or at ZeRO 0 the parameter itself. at: where the part begins in
    it. start: where it begins in the parameter. numel: how long it is.
    """

    held: Tensor
    at: int
    start: int
    numel: int


class Fp32State:
    """Reads and writes fp32 state as tensors shaped like the local parameters."""

    def __init__(self, engine: Any) -> None:
        """``engine``: a DeepSpeed engine at any ZeRO stage."""
        self._sharded = engine.zero_optimization()
        self._weights_sharded = engine.zero_optimization_partition_weights()
        wrapper = self._wrapper = engine.optimizer
        self._adam: torch.optim.Optimizer = wrapper.optimizer if self._sharded else wrapper
        # ZeRO 3, the bf16 optimizer of ZeRO 1 and the common one of ZeRO 1 and 2 name their partitions differently.
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        self._flats: list[Tensor] = next((found for name in names if (found := getattr(wrapper, name, None))), [])
        self._holders: dict[nn.Parameter, list[int]] = {}

    def find_holders(self, parameters: Iterable[nn.Parameter]) -> None:
        """Learn which ranks ZeRO has given a part of each parameter to. Collective, once; for :meth:`holders`."""
        known = list(parameters)
        mine = [self._sharded and self.stretch(p) is not None for p in known]
        everyone: list[Any] = [mine]
        if self._sharded and dist.get_world_size() > 1:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        for index, parameter in enumerate(known):
            replicas = dist.get_process_group_ranks(self._replicas(parameter)) if self._sharded else []
            self._holders[parameter] = [at for at, rank in enumerate(replicas) if everyone[rank][index]]

    def holders(self, parameter: nn.Parameter) -> list[int]:
        """Its replicas, by rank in their group, that hold a part of its fp32 state; none at ZeRO 0: all hold all."""
        return self._holders[parameter]

    def stretch(self, parameter: nn.Parameter) -> Stretch | None:
        """Where this rank keeps the parameter's fp32 state; None if it has no part of it."""
        if not self._sharded:
            return Stretch(parameter, 0, 0, parameter.numel())
        if self._weights_sharded:
            group, at, part = self._wrapper.grad_position[self._wrapper.get_param_id(parameter)]
            start = part * dist.get_rank(self._replicas(parameter))
            numel = min(part, shape_of(parameter).numel() - start)
            return Stretch(self._flats[group], at, start, numel) if numel > 0 else None
        mapping = vars(parameter)["_hp_mapping"]
        if mapping is None:
            return None
        place = mapping.hp_fragment_address
        flat = self._flats[mapping.param_group_index]
        return Stretch(flat, place.start, mapping.lp_fragment_address.start, place.numel)

    def live(self, held: Tensor, key: str) -> Tensor:
        """float32 [its length]: the weights or a moment of what Adam works on; a view, once Adam has begun."""
        source = held.detach() if key == WEIGHT else self._adam.state.get(held, {}).get(key)
        return torch.zeros(held.numel(), device=held.device) if source is None else source.view(-1)

    def view(self, parameter: nn.Parameter, key: str) -> Tensor:
        """As :meth:`read`, but local and not a copy. Raises ValueError if this rank does not hold all of it."""
        stretch, shape = self.stretch(parameter), shape_of(parameter)
        if stretch is None or stretch.numel != shape.numel():
            raise ValueError("this rank does not hold the whole parameter")
        return self._part(stretch, key).view(shape)

    @property
    def steps(self) -> int:
        """Updates Adam has made."""
        return next((int(state["step"]) for state in self._adam.state.values() if "step" in state), 0)

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        """fp32 tensor shaped like ``parameter``: its master weight or a moment. Collective over its replicas."""
        shape = shape_of(parameter)
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=parameter.device)
        stretch = self.stretch(parameter)
        if stretch is not None:
            whole[stretch.start : stretch.start + stretch.numel] = self._part(stretch, key)
        if self._sharded and dist.get_world_size(self._replicas(parameter)) > 1:
            dist.all_reduce(whole, group=self._replicas(parameter))
        return whole.view(shape)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set a master weight (and the parameter made from it) or a moment. Local; call after :meth:`prepare`."""
        if key == WEIGHT and parameter.shape == value.shape:  # at ZeRO 3 it is empty unless it is gathered
            parameter.copy_(value)
        stretch = self.stretch(parameter)
        if stretch is not None:
            mine = value.reshape(-1)[stretch.start : stretch.start + stretch.numel]
            self._part(stretch, key).copy_(mine)
            if key == WEIGHT and self._weights_sharded:
                vars(parameter)["ds_tensor"][: stretch.numel].copy_(mine)

    def prepare(self, parameters: Iterable[nn.Parameter], steps: int) -> None:
        """Make Adam's state as it is after ``steps`` updates, with moments still zero."""
        for tensor in self._flats if self._sharded else parameters:
            self._adam.state[tensor] = {
                "step": torch.tensor(float(steps), device=tensor.device),
                **{key: torch.zeros_like(tensor, dtype=torch.float32) for key in MOMENTS},
            }

    def _replicas(self, parameter: nn.Parameter) -> dist.ProcessGroup:
        """The ranks that ZeRO shards a parameter over."""
        group: dist.ProcessGroup = vars(parameter)["ds_process_group" if self._weights_sharded else "_dp_group"]
        return group

    def _part(self, stretch: Stretch, key: str) -> Tensor:
        return self.live(stretch.held, key)[stretch.at : stretch.at + stretch.numel]
