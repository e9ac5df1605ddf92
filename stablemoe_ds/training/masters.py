"""fp32 master weights and Adam moments of a DeepSpeed engine, by parameter, whatever ZeRO has done to them.

ZeRO 1 and 2 flatten each parameter group and give every data rank one partition of it; a parameter's
``_hp_mapping`` says which stretch of it lies in this rank's partition (``deepspeed.utils.tensor_fragment``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


class Masters:
    """Reads and writes fp32 state as tensors shaped like the local parameters."""

    def __init__(self, engine: Any) -> None:
        """``engine``: a DeepSpeed engine at ZeRO stage 0, 1 or 2."""
        self._sharded = engine.zero_optimization()
        self._wrapper = engine.optimizer
        self._adam: torch.optim.Optimizer = engine.optimizer.optimizer if self._sharded else engine.optimizer
        # The bf16 optimizer of ZeRO 1 names its partitions differently from the common one.
        flats = getattr(self._wrapper, "single_partition_of_fp32_groups", None)
        self._flats: list[Tensor] = flats or getattr(self._wrapper, "fp32_groups_flat_partition", [])
        self._holders: dict[nn.Parameter, list[int]] = {}

    def find_holders(self, parameters: Iterable[nn.Parameter]) -> None:
        """Learn which ranks ZeRO has given a part of each parameter to. Collective, once; for :meth:`holders`."""
        known = list(parameters)
        mine = [self._sharded and vars(p)["_hp_mapping"] is not None for p in known]
        everyone: list[Any] = [mine]
        if self._sharded and dist.get_world_size() > 1:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        for index, parameter in enumerate(known):
            replicas = dist.get_process_group_ranks(vars(parameter)["_dp_group"]) if self._sharded else []
            self._holders[parameter] = [at for at, rank in enumerate(replicas) if everyone[rank][index]]

    def holders(self, parameter: nn.Parameter) -> list[int]:
        """Its replicas, by rank in their group, that hold a part of its fp32 state; none at ZeRO 0: all hold all."""
        return self._holders[parameter]

    def view(self, parameter: nn.Parameter, key: str) -> Tensor:
        """As :meth:`read`, but local and not a copy where it need not be: for a rank that holds all of it."""
        if not self._sharded:
            if key == WEIGHT:
                return parameter.detach().float()
            state = self._adam.state.get(parameter, {})
            return state[key] if key in state else torch.zeros_like(parameter, dtype=torch.float32)
        stretch = self._stretch(parameter, key)
        if stretch is None or stretch[1].numel() != parameter.numel():
            raise ValueError("this rank does not hold the whole parameter")
        return stretch[1].view_as(parameter)

    @property
    def steps(self) -> int:
        """Updates Adam has made."""
        states = [state for state in self._adam.state.values() if "step" in state]
        return int(states[0]["step"]) if states else 0

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        """fp32 tensor shaped like ``parameter``: its master weight or a moment. Collective over its replicas."""
        if not self._sharded:
            return self.view(parameter, key).clone()
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        stretch = self._stretch(parameter, key)
        if stretch is not None:
            start, values = stretch
            whole[start : start + values.numel()] = values
        replicas = vars(parameter)["_dp_group"]
        if dist.get_world_size(replicas) > 1:
            dist.all_reduce(whole, group=replicas)
        return whole.view_as(parameter)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set a master weight (and the parameter made from it) or a moment. Local; call after :meth:`prepare`."""
        if key == WEIGHT:
            parameter.copy_(value)
        if not self._sharded:
            if key != WEIGHT:
                self._adam.state[parameter][key].copy_(value)
            return
        stretch = self._stretch(parameter, key)
        if stretch is not None:
            start, values = stretch
            values.copy_(value.reshape(-1)[start : start + values.numel()])

    def prepare(self, parameters: Iterable[nn.Parameter], steps: int) -> None:
        """Make Adam's state as it is after ``steps`` updates, with moments still zero."""
        for tensor in self._flats if self._sharded else parameters:
            self._adam.state[tensor] = {
                "step": torch.tensor(float(steps), device=tensor.device),
                **{key: torch.zeros_like(tensor, dtype=torch.float32) for key in MOMENTS},
            }

    def _stretch(self, parameter: nn.Parameter, key: str) -> tuple[int, Tensor] | None:
        """Where in the flattened parameter this rank's part begins, and a view of it; None if it has no part."""
        mapping = vars(parameter)["_hp_mapping"]
        if mapping is None:
            return None
        flat = self._flats[mapping.param_group_index]
        source = flat.detach() if key == WEIGHT else self._adam.state.get(flat, {}).get(key)
        if source is None:
            source = torch.zeros_like(flat)
        place = mapping.hp_fragment_address
        return mapping.lp_fragment_address.start, source.narrow(0, place.start, place.numel)
