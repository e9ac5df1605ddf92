"""Process groups: from a launcher's environment to megatron-core's and DeepSpeed's groups, made once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from stablemoe_ds.distributed.environment import check_world_size, read_launcher_environment
from stablemoe_ds.distributed.placement import REPLICATED, LayerPlacement
from stablemoe_ds.distributed.rendezvous import agree_on_size, name_rendezvous
from stablemoe_ds.errors import CLUSTER_FAULT, RunError, UserError

JOINING = timedelta(minutes=1)
"""Processes of one job may start this far apart, however short its timeout is."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the run. timeout: how long a collective may wait."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=10)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_world(timeout_minutes: float = 10.0) -> World:
    """Join the run: torch.distributed over nccl or gloo, device chosen by local rank. Later calls join nothing new.

    timeout_minutes: how long a collective of this run may wait. Ranks have a minute at least to find each other.
    Raises RunError if they do not, UserError if they count different numbers of processes.
    """
    rank, size, local_rank = read_launcher_environment()
    if dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        return World(dist.get_rank(), dist.get_world_size(), local_rank, _device(local_rank), timeout)
    check_world_size(size)
    name_rendezvous(rank, size)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    device = _device(local_rank)
    # The shared-memory op only serves inference all-reduce; building it needs a compiler and a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=timeout_minutes)
    patience = max(timeout, JOINING)
    try:
        store = agree_on_size(rank, size, patience)
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=patience,
        )
        del store
    except (dist.DistError, RuntimeError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {patience.total_seconds():g} s"
        raise RunError(
            f"rank {rank}: the {size} processes of this run did not all connect to {where} "
            f"({str(error).splitlines()[0]}); did one fail to start, or is the port closed?",
            CLUSTER_FAULT,
        ) from error
    return World(rank, size, local_rank, device, timeout)


def _device(local_rank: int) -> torch.device:
    """This process's device, made torch's current one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def limit_waiting(timeout: timedelta) -> None:
    """Let no collective of any group of this process wait longer than ``timeout``.

    DeepSpeed makes groups without a limit of its own, so torch's apply to them: 30 minutes for gloo, 10 for nccl.
    """
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


def stop_world() -> None:
    """Leave the run in order; without it gloo now and then aborts the interpreter at exit."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class Groups:
    """megatron-core's groups, shared with DeepSpeed so that both libraries speak of the same ones.

    A process has them once: those that are there already are taken, if they have the same degrees.

    Ranks that share sequences are data ranks like others to both libraries, as weights are copied and gradients summed
    over them: data_rank counts them, too. reading_rank: which of the reading_size groups of ranks that share
    sequences this one belongs to, and sequence_rank: which part of each sequence it has.
    """

    def __init__(self, world: World, tensor: int, expert: int, sequence: int = 1) -> None:
        from megatron.core import parallel_state as ps

        for name, degree in (("tensor", tensor), ("expert", expert), ("sequence", sequence)):
            if world.size // (tensor if name == "sequence" else 1) % degree:
                raise UserError(f"parallel.{name}: {degree} does not divide the {world.size} processes of this run")
        self.world, self.tensor, self.expert, self.sequence = world, tensor, expert, sequence
        if not ps.model_parallel_is_initialized():
            ps.initialize_model_parallel(
                tensor_model_parallel_size=tensor,
                expert_model_parallel_size=expert,
                expert_tensor_parallel_size=1,
                create_gloo_process_groups=False,
            )
        found = (ps.get_tensor_model_parallel_world_size(), ps.get_expert_model_parallel_world_size())
        if found != (tensor, expert):
            raise UserError(
                f"these processes are laid out with tensor {found[0]} and expert {found[1]} already: got {tensor} and "
                f"{expert}, expected the same; start other processes for another layout"
            )
        self.data_group = ps.get_data_parallel_group()
        self.data_rank, self.data_size = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
        self.reading_rank, self.sequence_rank = divmod(self.data_rank, sequence)
        self.reading_size = self.data_size // sequence
        self.sequence_group = self._join_sequence_group() if sequence > 1 else None
        limit_waiting(world.timeout)
        self.tensor_rank = ps.get_tensor_model_parallel_rank()
        self.tensor_group = ps.get_tensor_model_parallel_group()
        self.expert_rank = ps.get_expert_model_parallel_rank()
        self._share_with_deepspeed()

    def _join_sequence_group(self) -> dist.ProcessGroup:
        """The group of consecutive data ranks that share sequences. Collective."""
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, dist.get_process_group_ranks(self.data_group))
        data_groups = sorted({tuple(ranks) for ranks in everyone})
        firsts = range(0, self.data_size, self.sequence)
        shared = [list(ranks[first : first + self.sequence]) for ranks in data_groups for first in firsts]
        group, _ = dist.new_subgroups_by_enumeration(shared)
        return group

    def _share_with_deepspeed(self) -> None:
        """Register the expert groups under the names DeepSpeed looks them up by."""
        from deepspeed.utils import groups
        from megatron.core import parallel_state as ps

        # A replicated expert is on all ranks, and exchanges tokens with none: its expert-parallel group is this rank
        # alone. Without pipeline stages, so is the pipeline group.
        named = {
            REPLICATED: (ps.get_pipeline_model_parallel_group(), ps.get_tensor_and_data_parallel_group()),
            f"ep_size_{self.expert}": (ps.get_expert_model_parallel_group(), ps.get_expert_data_parallel_group()),
        }
        for name, (expert, copies) in named.items():
            groups._EXPERT_PARALLEL_GROUP[name] = expert
            groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(expert)
            groups._EXPERT_DATA_PARALLEL_GROUP[name] = copies
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(copies)
        groups.expert_tensor_parallel_world_size = 1

    def among_copies(self, parameter: nn.Parameter) -> tuple[int, int]:
        """This rank among the ranks that sum the gradients of a parameter, and how many these are."""
        from deepspeed.utils import groups

        name = vars(parameter).get("group_name")  # of an expert's, see MoELayer
        if name is None:
            return self.data_rank, self.data_size
        return groups._get_expert_data_parallel_rank(name), groups._get_expert_data_parallel_world_size(name)

    def sum_over_data_ranks(self, tensor: Tensor) -> Tensor:
        """A new tensor, summed over the data-parallel ranks."""
        total = tensor.clone()
        if self.data_size > 1:
            dist.all_reduce(total, group=self.data_group)
        return total

    def sum_over_world(self, tensor: Tensor) -> Tensor:
        """A new tensor, summed over every process of the run."""
        total = tensor.clone()
        if self.world.size > 1:
            dist.all_reduce(total)
        return total

    def sum_over_copies(self, tensor: Tensor) -> Tensor:
        """A new tensor, summed over the processes that hold the same experts."""
        from megatron.core import parallel_state as ps

        total = tensor.clone()
        if self.world.size > self.expert:
            dist.all_reduce(total, group=ps.get_expert_data_parallel_group())
        return total

    @property
    def placement(self) -> LayerPlacement:
        """What an MoE layer has to know of all this."""
        tensor_group = self.tensor_group if self.tensor > 1 else None
        return LayerPlacement(
            self.expert,
            self.expert_rank,
            tensor_group,
            self.sum_over_data_ranks,
            sequence_group=self.sequence_group,
        )


class DeepSpeedMpu:
    """megatron-core's parallel state under the names DeepSpeed asks for (0.19.8)."""

    def get_model_parallel_world_size(self) -> int:
        from megatron.core import parallel_state as ps

        return dist.get_world_size(ps.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        from megatron.core import parallel_state as ps

        return dist.get_rank(ps.get_model_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        from megatron.core import parallel_state as ps

        return dist.get_process_group_ranks(ps.get_data_parallel_group())

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state as ps

        # DeepSpeed takes the presence of this one as a sign that there is no tensor parallelism.
        if name.startswith("__") or name == "initialize_sequence_parallel":
            raise AttributeError(name)
        return getattr(ps, name)
