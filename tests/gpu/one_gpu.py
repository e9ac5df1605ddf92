"""Several ranks on one GPU. NCCL refuses two ranks of one device; gloo carries tensors of a GPU through host memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import deepspeed

from tests.distributed.launch import run_distributed


def run_on_one_gpu(ranks: int, target: Callable[..., Any], *args: Any) -> list[Any]:
    """As :func:`run_distributed`, with the first GPU as the device of all ranks."""
    return run_distributed(ranks, _on_the_first, target, args)


def _on_the_first(target: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if os.environ["WORLD_SIZE"] == "1":
        return target(*args)
    os.environ["LOCAL_RANK"] = "0"
    join = partial(_join_over_gloo, deepspeed.init_distributed)
    with mock.patch.object(deepspeed, "init_distributed", join):
        return target(*args)


def _join_over_gloo(join: Callable[..., None], **options: Any) -> None:
    join(**{**options, "dist_backend": "gloo"})
