"""What has to be settled before DeepSpeed and megatron-core are imported."""

from __future__ import annotations

import ctypes
import logging
import os
import warnings

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
