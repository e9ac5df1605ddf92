"""What has to be settled before DeepSpeed and megatron-core are imported, and how the latter is imported quickly."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``."""
SHAPES_KEPT = 8192
"""Matrix products that oneDNN remembers. An expert's row count changes with every batch, and a product of a new shape
is compiled first: with oneDNN's own limit of 1024, 64 experts in bf16 compile without end, at twice the time."""


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of handing them back to the kernel.

    A training step allocates the same sizes over and over. By default each large block is mapped again and its pages
    are faulted in one by one: a sixth of the time of an MoE layer with 32 experts on a CPU (benchmarks/moe_layer.py).
    Does nothing without glibc, or where the environment has settings of its own.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def settle_libraries() -> None:
    """Choose DeepSpeed's accelerator, and silence messages of the libraries that do not concern a user.

    Both say at import that TransformerEngine, apex or a GPU are missing, which this project does not need.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(SHAPES_KEPT))
        keep_freed_memory()
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    # Workers of a loader and launched ranks are new interpreters, so each is given the module patterns again.
    for module in (r"megatron\.", r"deepspeed\.", r"torch\.distributed\."):
        warnings.filterwarnings("ignore", module=module)
    for name in ("DeepSpeed", "megatron", "megatron.core"):
        logging.getLogger(name).setLevel(logging.ERROR)


def import_megatron() -> None:
    """Import megatron-core without loading ``torch.compile``, which takes as long again.

    megatron-core compiles its small functions where it defines them, and imports most of itself at once; this package
    calls none of them. They are compiled when somebody does.
    """
    import torch

    at_once = torch.compile
    torch.compile = compiled_when_called  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = at_once


def compiled_when_called(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """As ``torch.compile``, but for when."""
    import torch

    @cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, **options)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the code that calls it, with which it is compiled
            return function(*args, **kwargs)
        return compiled()(*args, **kwargs)

    return call
