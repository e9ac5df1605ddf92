"""Several processes that train one torch model, with experts divided over them."""

from __future__ import annotations

import atexit

import torch
from torch import nn

from stablemoe_ds.distributed.groups import Groups, start_world, stop_world


def join_processes(expert_parallel: int = 1) -> Groups:
    """Connect the processes that ``torchrun``, ``mpirun`` or SLURM has started; without a launcher, this one alone.

    expert_parallel: how many processes share one set of experts; a divisor of their number. ``torch.distributed`` may
    already be initialised. Returns the ``groups`` for :class:`MoELayer`; ``groups.world`` has ``rank``, ``size`` and
    ``device``.
    Raises RunError if the processes do not find each other, UserError if ``expert_parallel`` is no divisor.
    """
    atexit.register(stop_world)  # without it gloo now and then aborts the interpreter
    return Groups(start_world(), tensor=1, expert=expert_parallel)


@torch.no_grad()
def average_gradients(model: nn.Module, groups: Groups) -> None:
    """Average gradients over all processes. Call it between ``backward`` and the optimizer's step. Collective.

    Afterwards every gradient is that of the mean of all processes' losses. Experts exist on some processes only and
    already have the gradients of all tokens sent to them. All other parameters must have the same initial values on
    every process (``torch.manual_seed``). Use this instead of DistributedDataParallel, which would make all experts
    equal.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:  # of a branch that this process did not take; others wait for it
            parameter.grad = torch.zeros_like(parameter)
        is_expert = not getattr(parameter, "allreduce", True)
        add_up = groups.sum_over_copies if is_expert else groups.sum_over_world
        parameter.grad = add_up(parameter.grad) / groups.world.size
