"""Counting what a thread reads back and sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.counting import counted

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x[0].item(), "_local_scalar_dense"),
        (lambda x: bool(x[0]), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x.nonzero(), "nonzero"),
    ],
)
def test_a_read_is_one_wait(read: Callable[[torch.Tensor], Any], name: str) -> None:
    with counted(CPU) as counts:
        read(torch.arange(3.0))
    assert counts.host_waits == {name: 1}


def test_a_backward_pass_is_counted() -> None:
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * grads[0].sum().item()

    with counted(CPU) as counts:
        Reading.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert counts.host_waits == {"_local_scalar_dense": 1}


def test_waiting_for_the_whole_device_is_counted() -> None:
    from deepspeed.accelerator import get_accelerator

    with counted(CPU) as counts:
        get_accelerator().synchronize()
    assert counts.host_waits == {"synchronize": 1}


def test_arithmetic_is_neither() -> None:
    with counted(CPU) as counts:
        (torch.ones(2, 2) @ torch.ones(2, 2)).to(torch.bfloat16).relu().sum()
    assert (counts.host_waits, counts.collectives) == ({}, {})


@pytest.mark.usefixtures("world_groups")
def test_collectives_have_their_names() -> None:
    x = torch.ones(2)
    with counted(CPU) as counts:
        dist.all_reduce(x)
        dist.all_gather([torch.empty(2)], x)
        dist.all_gather_into_tensor(torch.empty(2), x)
        dist.all_to_all_single(torch.empty(2), x)
        dist.broadcast(x, 0)
        dist.barrier()
    assert counts.collectives == {"all_reduce": 1, "all_gather": 2, "all_to_all": 1, "broadcast": 1, "barrier": 1}
