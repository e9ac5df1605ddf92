"""Several processes that train one torch model of somebody's own, with experts divided over them."""

from __future__ import annotations

import atexit

import torch
from torch import nn

from stablemoe_ds.distributed.groups import Groups, start_world, stop_world


def join_processes(expert_parallel: int = 1) -> Groups:
    """The processes that a launcher (``torchrun``, ``mpirun``, SLURM) has started, as one group; alone without one.

    expert_parallel: how many processes share one set of experts; it divides their number. ``torch.distributed`` may be
    initialised already. What is returned is what :class:`MoELayer` takes as ``groups``; ``groups.world`` has ``rank``,
    ``size`` and ``device``.
    Raises RunError if the processes do not find each other, UserError if ``expert_parallel`` does not divide them.
    """
    atexit.register(stop_world)  # without it gloo now and then aborts the interpreter
    return Groups(start_world(), tensor=1, expert=expert_parallel)


@torch.no_grad()
def average_gradients(model: nn.Module, groups: Groups) -> None:
    """Bring the gradients of all processes together: call it between ``backward`` and the optimizer's step.

    Afterwards each is the gradient of the mean of all processes' losses. An expert is held by some processes only, and
    has gradients of all tokens that came to it already. Whatever else the model consists of has to start alike
    everywhere (``torch.manual_seed``). In place of DistributedDataParallel, which would make experts equal. Collective.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:  # of a branch that this process did not take; others wait for it
            parameter.grad = torch.zeros_like(parameter)
        is_expert = not getattr(parameter, "allreduce", True)
        add_up = groups.sum_over_copies if is_expert else groups.sum_over_world
        parameter.grad = add_up(parameter.grad) / groups.world.size
